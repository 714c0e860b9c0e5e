"""Figure: damage curves of all sub-blocks, and where the search stopped on each."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from lit_prune.decoder import KINDS
from lit_prune.views.canvas import CUT, clean, new_figure, outcomes, unit_word

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from lit_prune.decoder import DecoderSpec, SubBlock
    from lit_prune.plan import PruningPlan

_APART = 10.0  # between two numbers, in pixels


def damage_curves(
    spec: DecoderSpec, plan: PruningPlan, damage: Mapping[SubBlock, Tensor], *, unit: str = "nats"
) -> Figure:
    """Draw predicted damage against the fraction of units removed, one line a layer.

    Args:
        spec: The model before pruning.
        plan: What stays; a dot on each line marks what the plan removes.
        damage: Predicted damage of removing 0, 1, … all units of each sub-block.
        unit: What damage is measured in.
    """
    from matplotlib import colormaps

    figure = new_figure(11.0, 4.8, "What each sub-block is predicted to cost")
    shades = colormaps["viridis"]
    last = max(len(spec.blocks) - 1, 1)
    for number, kind in enumerate(KINDS):
        axes, least = clean(figure.add_subplot(1, 2, number + 1)), math.inf
        ends: dict[int, float] = {}
        for outcome in outcomes(spec, plan, kind):
            if outcome.absent or (outcome.layer, kind) not in damage:
                continue
            curve = damage[outcome.layer, kind].tolist()
            least = min(least, max(curve))
            share = [removed / outcome.total for removed in range(len(curve))]
            axes.plot(share, curve, color=shades(outcome.layer / last), linewidth=1.2)
            cut = outcome.total - len(outcome.kept)
            axes.plot([share[cut]], [curve[cut]], "o", color=CUT, markersize=4)
            ends[outcome.layer] = curve[-1]
        axes.set_title(f"{kind}: {unit_word(spec, kind)}s", fontsize=10)
        axes.set(xlabel="removed", ylabel=f"predicted damage ({unit} per token)" * (number == 0))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if least < math.inf:
            # sub-blocks differ by orders of magnitude: linear up to a hundredth of the least of all
            linear = least / 100 or 1.0
            axes.set_yscale("symlog", linthresh=linear)
            axes.yaxis.set_major_formatter(partial(_label, linear))
        axes.set_ylim(bottom=0)
        _number(axes, ends)
        axes.grid(alpha=0.3)
    figure.supxlabel("dots: what the plan removes; numbers: layers", fontsize=9)
    return figure


def _number(axes: Axes, ends: Mapping[int, float]) -> None:
    """Write the layer at the end of each line, where it does not run into another number."""
    taken: list[float] = []
    for layer, value in sorted(ends.items(), key=lambda item: -item[1]):
        height = float(axes.transData.transform((1.0, value))[1])
        if all(abs(height - other) >= _APART for other in taken):
            taken.append(height)
            axes.annotate(str(layer), (1.02, value), fontsize=7, va="center")


def _label(linear: float, value: float, _position: int | None) -> str:
    """Name a tick; decades in the linear part crowd around zero and get no name."""
    return "" if 0 < value < linear else f"{value:g}"
