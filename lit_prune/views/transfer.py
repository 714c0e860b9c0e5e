"""Picture: how much each block, attention and MLP matters to the output."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from lit_prune.decoder import KINDS
from lit_prune.views.canvas import (
    CUT,
    GREEN,
    KEPT,
    ORANGE,
    clean,
    layer_ticks,
    new_figure,
    outcomes,
    removed_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lit_prune.decoder import DecoderSpec
    from lit_prune.plan import PruningPlan

BypassKind = Literal["block", "attention", "mlp"]
_STYLE: dict[BypassKind, tuple[str, str, str, float]] = {  # label, colour, marker, offset
    "block": ("whole layer", KEPT, "s", -0.25),
    "attention": ("attention", ORANGE, "o", 0.0),
    "mlp": ("MLP", GREEN, "^", 0.25),
}


def transfer_entropy(
    spec: DecoderSpec,
    plan: PruningPlan,
    transfer: Mapping[tuple[int, BypassKind], float],
    *,
    unit: str = "nats",
) -> Figure:
    """Draw the transfer entropy of each block, attention and MLP; what is removed is ringed.

    The axis is logarithmic where the values span more than two decades.

    Args:
        spec: The model before pruning.
        plan: What stays.
        transfer: Transfer entropy by layer and ``block``, ``attention`` or ``mlp``; what is
            missing or not finite is not drawn.
        unit: Of the values (``std_sum``, one of the paper's estimators, is not in nats).

    Returns:
        A figure that pyplot does not know about.

    Raises:
        PlanMismatchError: If the plan is for another model.
    """
    gone: set[tuple[int, BypassKind]] = {(layer, "block") for layer in removed_blocks(spec, plan)}
    for kind in KINDS:
        gone |= {(row.layer, kind) for row in outcomes(spec, plan, kind) if row.removed}
    known = {key: value for key, value in transfer.items() if math.isfinite(value)}
    figure = new_figure(12, 5, "How much the output changes when a part is skipped")
    axes = clean(figure.add_subplot())
    _scale(axes, list(known.values()))
    for layer in range(0, len(spec.blocks), 2):  # bands keep the three dots of a layer together
        axes.axvspan(layer - 0.5, layer + 0.5, color="#f2f2f2", linewidth=0, zorder=0)
    for bypassed, (label, colour, marker, offset) in _STYLE.items():
        here = {layer + offset: value for (layer, k), value in known.items() if k == bypassed}
        if here:
            axes.scatter(
                list(here), list(here.values()), 36, colour, marker=marker, label=label, zorder=3
            )
    ringed = {key[0] + _STYLE[key[1]][3]: known[key] for key in sorted(gone) if key in known}
    if ringed:
        axes.scatter(
            list(ringed),
            list(ringed.values()),
            150,
            facecolors="none",
            edgecolors=CUT,
            linewidths=2,
            label="removed by the plan",
            zorder=4,
        )
    ticks = list(layer_ticks(len(spec.blocks)))
    axes.set_xticks(ticks, [str(spec.blocks[i].index) for i in ticks])
    axes.set_xlim(-0.6, len(spec.blocks) - 0.4)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(f"transfer entropy ({unit})\nlow: hardly missed")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _scale(axes: Axes, values: list[float]) -> None:
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= 100 * min(positive):
        highest = max(values, default=0.0) or 1.0
        axes.set_ylim(-0.06 * highest, 1.12 * highest)
        return
    if len(positive) == len(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:  # a zero has no logarithm: linear below the least positive value
        axes.set_yscale("symlog", linthresh=min(positive))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color="#d0d0d0", linewidth=0.6)
