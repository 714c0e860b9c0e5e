"""Picture: the report's table, with a bar for each ratio."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from lit_prune.report import format_value
from lit_prune.views.canvas import CUT, GREY, KEPT, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lit_prune.report import PruningReport, ReportRow, Verdict

_LONGEST_BAR = 2.0
_STYLE: dict[Verdict, tuple[str, str]] = {
    "better": (KEPT, ""),
    "worse": (CUT, "///"),
    "same": (GREY, ""),
}


def before_after(report: PruningReport) -> Figure:
    """Draw each quantity of a report: its numbers before and after, and a bar for after / before.

    Args:
        report: Before and after; rows that were not measured keep their numbers and have no bar.

    Returns:
        A figure that pyplot does not know about.
    """
    from matplotlib.patches import Patch

    rows = report.rows
    figure = new_figure(12, 0.42 * max(len(rows), 2) + 2.2, "Before and after pruning")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(report.headline(), 112), fontsize=9, pad=10)
    for y, row in enumerate(rows):
        if row.ratio is not None and math.isfinite(row.ratio):
            length = min(row.ratio, _LONGEST_BAR)
            colour, hatch = _STYLE[row.verdict]
            axes.barh(y, length, 0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            more = " ▸" if row.ratio > _LONGEST_BAR else ""
            axes.annotate(
                f"× {row.ratio:.3f}{more}",
                (length, y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the dashed line
            )
        else:
            axes.annotate(
                "not compared",
                (0, y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=GREY,
            )
    axes.axvline(1, color="black", linewidth=1, linestyle="--", zorder=2)
    axes.set_xlim(0, _LONGEST_BAR * 1.12)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_words(row) for row in rows], fontsize=9)
    axes.set_xlabel("after / before (dashed line: unchanged)", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    handles = [
        Patch(color=KEPT, label="better"),
        Patch(facecolor=CUT, edgecolor="white", hatch="///", linewidth=0, label="worse"),
        Patch(color=GREY, label="no difference to claim"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _words(row: ReportRow) -> str:
    numbers = f"{format_value(row.before, row.unit)} → {format_value(row.after, row.unit)}"
    note = f"\n{textwrap.shorten(row.note, 70, placeholder=' …')}" if row.note else ""
    return f"{row.label}:  {numbers}{note}"
