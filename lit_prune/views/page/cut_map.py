"""The map: what was cut of each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.decoder import KINDS
from lit_prune.views.page.elements import section, table, tag

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from lit_prune.decoder import SubBlockKind
    from lit_prune.views.page.elements import Child
    from lit_prune.views.page.outline import Outline, Part

_MOST_CELLS = 16  # KV groups that are drawn one by one; more of them become a bar
_COLUMNS = 48  # of the strip of MLP channels
_MANY_LAYERS = 40


def cut_map(outline: Outline, *, dry_run: bool) -> Element:
    """Return the map as a table, so that it can be read aloud: one row for each layer."""
    gone = set(outline.whole_layers())
    rows: list[list[Child]] = []
    for layer in range(outline.num_layers):
        parts = [_cell(outline.parts[kind][layer], kind, exact=outline.exact) for kind in KINDS]
        name = tag("span", str(layer), tag("b", " removed") if layer in gone else None)
        rows.append([name, *parts])
    notes: list[Child] = [
        tag(
            "p",
            tag("span", tag("span", class_="cell kept"), " kept"),
            tag("span", tag("span", class_="cell cut"), " cut (striped)"),
            "Attention is cut in KV groups, each with the query heads that it serves; an MLP in "
            "channels, of which neighbours share a bar: as high as the share of them that is kept.",
            class_="legend",
        )
    ]
    if not outline.exact:
        notes.append(
            tag(
                "p",
                "This plan does not say how many units there were: the highest kept index "
                "stands for it, so that less is shown as cut than was.",
                class_="note",
            )
        )
    many = " many" if outline.num_layers > _MANY_LAYERS else ""
    shown = table("What each layer keeps", ["Layer", "Attention", "MLP"], rows, class_=f"map{many}")
    title = f"What {'would be' if dry_run else 'was'} cut, layer by layer"
    return section("map", title, *notes, shown)


def _cell(part: Part, kind: SubBlockKind, *, exact: bool) -> Element:
    if not part.total:
        return tag("span", "none: pruned earlier", class_="note")
    if part.removed:
        words = "removed whole"
    else:
        of = f" of {part.total:,}" if exact else ""
        words = f"{len(part.kept):,}{of}"
    drawn = _groups(part) if kind == "attention" and part.total <= _MOST_CELLS else _strip(part)
    return tag("div", drawn, tag("span", tag("b", words) if part.removed else words), class_="part")


def _groups(part: Part) -> Element:
    kept = set(part.kept)
    cells = [
        tag(
            "span",
            class_="cell kept" if group in kept else "cell cut",
            title=f"KV group {group}: {'kept' if group in kept else 'cut'}",
        )
        for group in range(part.total)
    ]
    return tag("span", *cells, class_="cells", aria_hidden="true")


def _strip(part: Part) -> Element:
    """Return the units as columns, each as high as the share of it that stays."""
    columns = min(_COLUMNS, part.total)
    bounds = [round(i * part.total / columns) for i in range(columns + 1)]
    kept = [0] * columns
    column = 0
    for unit in part.kept:
        while unit >= bounds[column + 1]:
            column += 1
        kept[column] += 1
    bars = []
    for i, count in enumerate(kept):
        height = count / (bounds[i + 1] - bounds[i])
        if height:
            bars.append(
                tag("rect", x=i, y=f"{10 * (1 - height):.2f}", width=1, height=f"{10 * height:.2f}")
            )
    return tag(
        "svg",
        *bars,
        viewBox=f"0 0 {columns} 10",
        preserveAspectRatio="none",
        class_="strip",
        aria_hidden="true",
    )
