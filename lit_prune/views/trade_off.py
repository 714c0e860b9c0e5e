"""Figure: predicted and measured cost of every budget of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.config import RESOURCES
from lit_prune.errors import ConfigError
from lit_prune.views.canvas import CUT, KEPT, clean, new_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from lit_prune.sweep import SweepPoint


def trade_off(points: Sequence[SweepPoint]) -> Figure:
    """Draw the cost of pruning against the ratio that is removed.

    Args:
        points: What `lit_prune.sweep.sweep` returned; where they were measured, the excess over
            the dense model is drawn beside the prediction.

    Raises:
        ConfigError: If no point has anything to draw.
    """
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
    if not predicted and not measured:
        raise ConfigError(
            "no point of this sweep has a prediction or a measurement: ask sweep(...) for "
            "measured=True, or for ratios that can be reached."
        )
    figure = new_figure(8.0, 4.5, "What each budget costs")
    axes = clean(figure.add_subplot())
    if predicted:
        xs, ys = zip(*predicted, strict=True)
        axes.plot(xs, ys, color=KEPT, marker="o", label="predicted damage")
    if measured:
        xs, ys = zip(*measured, strict=True)
        axes.plot(xs, ys, color=CUT, marker="s", label="measured excess NLL, choose side")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel=f"{RESOURCES[points[0].budget]} removed", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
