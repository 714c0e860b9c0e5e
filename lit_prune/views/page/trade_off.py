"""The trade-off: what each budget of a sweep costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.config import RESOURCES
from lit_prune.views.page.chart import Chart, figure, height_axis, width_axis
from lit_prune.views.page.elements import section, table
from lit_prune.views.page.figures import percent, short

if TYPE_CHECKING:
    from collections.abc import Sequence
    from xml.etree.ElementTree import Element

    from lit_prune.sweep import SweepPoint


def trade_off_of(points: Sequence[SweepPoint]) -> Element | None:
    """Return curve and table of a sweep; None where there was none.

    Args:
        points: What `lit_prune.sweep` returned. Where they were measured, the excess over the dense
            model is shown.
    """
    if not points:
        return None
    predicted = [
        (p.achieved, p.predicted_damage)
        for p in points
        if p.achieved is not None and p.predicted_damage is not None
    ]
    measured = [
        (p.achieved, p.excess_nll)
        for p in points
        if p.achieved is not None and p.excess_nll is not None
    ]
    resource = RESOURCES[points[0].budget]
    pictures = []
    if predicted or measured:
        every = predicted + measured
        axis = width_axis(0.0, max(x for x, _ in every) * 1.05)
        chart = Chart(axis, height_axis([y for _, y in every]), "What each budget costs")
        for found, shape, words in (
            (predicted, "dot", "predicted"),
            (measured, "triangle", "measured excess loss"),
        ):
            chart.line(found, f"{shape}-line")
            for x, y in found:
                chart.mark(x, y, shape, f"{percent(x)} removed: {short(y)} nats per token, {words}")
        entries = [("dot", "predicted")] * bool(predicted)
        entries += [("triangle", "measured excess loss, on the choose side")] * bool(measured)
        picture = chart.svg(f"{resource} removed", "nats per token", x_name=lambda v: f"{v:.0%}")
        pictures = [figure(picture, "Further right is smaller, further up worse.", entries)]
    rows = [
        [
            percent(p.requested),
            "–" if p.achieved is None else percent(p.achieved),
            short(p.predicted_damage),
            short(p.excess_nll),
            p.note,
        ]
        for p in points
    ]
    header = ["Asked", "Removed", "Predicted (nats)", "Measured excess loss (nats)", "Note"]
    shown = table(f"Budgets: share of the {resource}", header, rows, numbers=(1, 2, 3))
    return section("trade-off", "The trade-off", *pictures, shown)
