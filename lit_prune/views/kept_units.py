"""Picture: how much of each layer stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.decoder import KINDS
from lit_prune.views.canvas import (
    CUT,
    GREY,
    KEPT,
    PALE_CUT,
    clean,
    layer_ticks,
    new_figure,
    outcomes,
    removed_blocks,
    unit_word,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lit_prune.decoder import DecoderSpec
    from lit_prune.plan import PruningPlan
    from lit_prune.views.canvas import Outcome

_ANNOTATED_LAYERS = 12  # more, and the numbers would run into each other


def kept_units(spec: DecoderSpec, plan: PruningPlan) -> Figure:
    """Draw the kept share of KV groups and of MLP channels (or experts) for each layer.

    Args:
        spec: The model before pruning.
        plan: What stays.

    Returns:
        A figure that pyplot does not know about; what is cut is pale, what goes whole is hatched.

    Raises:
        PlanMismatchError: If the plan is for another model.
    """
    from matplotlib.patches import Patch

    gone = removed_blocks(spec, plan)
    figure = new_figure(12, 6.4, "What each layer keeps")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, kind in zip((upper, lower), KINDS, strict=True):
        _bars(clean(axes), outcomes(spec, plan, kind), unit_word(spec, kind))
    ticks = list(layer_ticks(len(spec.blocks)))
    lower.set_xticks(ticks, [str(spec.blocks[i].index) for i in ticks])
    for i, text in zip(ticks, lower.get_xticklabels(), strict=True):
        if spec.blocks[i].index in gone:
            text.set(color=CUT, fontweight="bold")
    lower.set_xlabel("decoder layer" + (" (bold: the whole layer is removed)" if gone else ""))
    lower.set_xlim(-0.7, len(spec.blocks) - 0.3)
    rows = [row for kind in KINDS for row in outcomes(spec, plan, kind)]
    handles = [Patch(color=KEPT, label="kept"), Patch(color=PALE_CUT, label="cut")]
    if any(row.removed for row in rows):
        whole = Patch(facecolor=PALE_CUT, edgecolor=CUT, hatch="///", label="removed whole")
        handles.append(whole)
    if any(row.absent for row in rows):
        handles.append(
            Patch(
                facecolor="white", edgecolor=GREY, linestyle=":", label="had none (pruned earlier)"
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _bars(axes: Axes, rows: list[Outcome], unit: str) -> None:
    numbers = len(rows) <= _ANNOTATED_LAYERS
    for row in rows:
        if row.absent:
            axes.bar(row.layer, 100, 0.8, fill=False, edgecolor=GREY, linestyle=":")
            text = "none"
        elif row.removed:
            axes.bar(row.layer, 100, 0.8, color=PALE_CUT, edgecolor=CUT, hatch="///")
            text = "removed"
        else:
            axes.bar(row.layer, 100, 0.8, color=PALE_CUT)
            axes.bar(row.layer, 100 * len(row.kept) / row.total, 0.8, color=KEPT)
            text = f"{len(row.kept)} of {row.total}"
        if numbers:
            axes.annotate(
                text,
                (row.layer, 100),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=CUT if row.removed else "black",
                fontweight="bold" if row.removed else "normal",
            )
    total, kept = sum(row.total for row in rows), sum(len(row.kept) for row in rows)
    share = 100 * kept / total if total else 0.0
    axes.axhline(share, color="black", linewidth=1, linestyle="--")
    axes.set_ylim(0, 113 if numbers else 103)
    axes.set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_ylabel("kept")
    axes.set_title(
        f"{unit}s: {kept:,} of {total:,} kept, {share:.1f} % (dashed line)",
        loc="left",
        fontsize=10,
    )
