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


def trade_off(points: Sequence[SweepPoint], *, dense_nll: float | None = None) -> Figure:
    """Draw the cost of pruning against the ratio that is removed.

    Args:
        points: What `lit_prune.sweep.sweep` returned.
        dense_nll: NLL of the dense model on the choose side; where it and measurements are there,
            the excess is drawn beside the prediction.

    Raises:
        ConfigError: If no point has anything to draw.
    """
    predicted = [
        (p.achieved, p.predicted_damage)
        for p in points
        if p.achieved is not None and p.predicted_damage is not None
    ]
    measured = [
        (p.achieved, p.mean_nll - (dense_nll or 0.0))
        for p in points
        if p.achieved is not None and p.mean_nll is not None
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
        words = "measured NLL" if dense_nll is None else "measured excess NLL"
        axes.plot(xs, ys, color=CUT, marker="s", label=words)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel=f"{RESOURCES[points[0].budget]} removed", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
