"""Why this was cut: what losing each part is predicted or measured to cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import KINDS
from lit_prune.views.page.chart import Chart, figure, height_axis, width_axis
from lit_prune.views.page.elements import listed, section, table, tag
from lit_prune.views.page.figures import short
from lit_prune.views.page.outline import NAMES

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from lit_prune.decoder import SubBlockKind
    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport
    from lit_prune.views.page.elements import Child
    from lit_prune.views.page.outline import Outline

_SHAPES = {"block": "square", "attention": "dot", "mlp": "triangle"}
_WORDS = {"block": "whole layer", "attention": "attention", "mlp": "MLP"}
_LABELLED = 12  # curves that get the number of their layer
_APART = 10.0  # between two labels, in the units of the picture


def prices(report: PruningReport, plan: PruningPlan, outline: Outline) -> Element:
    """Return why these parts and not others, as far as plan and report hold it."""
    source, rule = (plan.provenance.get(name) for name in ("source", "rule"))
    intro = f"The preset `{report.preset}`"
    intro += f" ({source})" if isinstance(source, str) else ""
    intro += f" decided: {rule}." if isinstance(rule, str) else " decided."
    children: list[Child] = [tag("div", listed([intro], class_="plain"))]
    found = plan.provenance.get("prices") or {}
    whole = {kind: _numbers(found, "whole", kind, outline) for kind in _SHAPES}
    if any(value is not None for row in whole.values() for value in row):
        children += _charts(found, whole, outline)
    else:
        children.append(
            tag("p", "It puts no price on whole parts that could be shown here.")
            if not _steps(report) and not _influence(report, outline)
            else None
        )
    children += [_steps(report), _influence(report, outline)]
    return section("why", "Why these parts", *children)


def _charts(found: Any, whole: dict[str, list[float | None]], outline: Outline) -> list[Child]:  # noqa: ANN401 - JSON
    measure, unit = str(found.get("measure", "price")), str(found.get("unit", ""))
    shown: list[Child] = [
        tag(
            "p",
            f"The dearer a part, the less of it goes. Price: {measure}, in {unit}, of losing the "
            "part whole.",
        ),
        _dots(measure, unit, whole, outline),
    ]
    if "curves" in found:
        curves = (_curves(found, kind, unit, outline) for kind in KINDS)
        shown.append(tag("div", *curves, class_="pair"))
    shown.append(_numbers_table(found, measure, unit, whole, outline))
    return shown


def _dots(
    measure: str, unit: str, whole: dict[str, list[float | None]], outline: Outline
) -> Element:
    values = [value for row in whole.values() for value in row if value is not None]
    title = f"{measure} of losing each part whole, by layer"
    chart = Chart(width_axis(-0.5, outline.num_layers - 0.5), height_axis(values), title)
    gone: dict[str, set[int]] = {"block": set(outline.whole_layers())}
    gone |= {k: {i for i, p in enumerate(outline.parts[k]) if p.removed} for k in KINDS}
    used, ringed = [], False
    for number, (kind, row) in enumerate(whole.items()):
        known = [(layer, value) for layer, value in enumerate(row) if value is not None]
        used += [kind] * bool(known)
        for layer, value in known:
            at = layer + (number - 1) * 0.2
            name = f"{_WORDS[kind]} of layer {layer}" if kind != "block" else f"layer {layer}"
            words = f"{name}: {short(value)} {unit}"
            if layer in gone[kind]:
                ringed = True
                chart.mark(at, value, "ring", f"{words}, removed whole")
            chart.mark(at, value, _SHAPES[kind], words)
    step = max(1, -(-outline.num_layers // 12))
    ticks = [float(i) for i in range(0, outline.num_layers, step)]
    picture = chart.svg("layer", unit, x_name=lambda value: f"{value:.0f}", x_ticks=ticks)
    entries = [(_SHAPES[kind], _WORDS[kind]) for kind in used]
    if ringed:
        entries.append(("ring", "removed whole"))
    words = f"{title[0].upper()}{title[1:]}. Low: hardly missed."
    return figure(picture, words, entries)


def _curves(found: Any, kind: SubBlockKind, unit: str, outline: Outline) -> Element | None:  # noqa: ANN401 - JSON
    rows = found["curves"].get(kind) or []
    curves = {
        layer: [_number(value) for value in row]
        for layer, row in enumerate(rows)
        if isinstance(row, list) and len(row) > 1 and layer < outline.num_layers
    }
    curves = {layer: row for layer, row in curves.items() if None not in row}
    cut = _numbers(found, "cut", kind, outline)
    ends = [value for row in curves.values() for value in row if value]
    if not ends:
        return None
    title = f"Damage curves of every {NAMES[kind]}"
    # what costs least whole sets the scale: below a hundredth of it nothing is of interest
    least = min(max(v for v in row if v is not None) for row in curves.values()) / 100
    axis = height_axis([max(value, least) for value in ends])
    chart = Chart(width_axis(0.0, 1.08), axis, title)
    labels: list[float] = []
    for layer, row in sorted(curves.items(), key=lambda item: -(item[1][-1] or 0.0)):
        points = [(i / (len(row) - 1), value or 0.0) for i, value in enumerate(row)]
        chart.line(points, "curve")
        at = axis.at(points[-1][1]) + 4
        if len(curves) <= _LABELLED and all(abs(at - other) >= _APART for other in labels):
            labels.append(at)
            chart.text(chart.x.at(1.0) + 5, at, str(layer))
    for layer in curves:
        stopped, price = 1 - outline.parts[kind][layer].share, cut[layer]
        if price is not None:
            words = f"layer {layer}: {stopped:.0%} cut, {short(price)} {unit}"
            chart.mark(stopped, price, "ring" if stopped == 1 else "stop", words)
    picture = chart.svg(
        "share removed", unit, x_name=lambda v: f"{v:.0%}", x_ticks=[0, 0.25, 0.5, 0.75, 1]
    )
    entries = [("curve", "one layer"), ("stop", "where the search stopped")]
    words = f"{title}: what losing a growing share of it is predicted to cost"
    numbered = "; numbers at the right are layers." if labels else "."
    return figure(picture, words + numbered, entries)


def _numbers_table(
    found: Any,  # noqa: ANN401 - JSON
    measure: str,
    unit: str,
    whole: dict[str, list[float | None]],
    outline: Outline,
) -> Element:
    kinds = [kind for kind, row in whole.items() if any(value is not None for value in row)]
    cut = {kind: _numbers(found, "cut", kind, outline) for kind in kinds} if "cut" in found else {}
    header, columns = ["Layer"], []
    for kind in kinds:
        header.append(f"{_WORDS[kind]}, whole")
        columns.append(whole[kind])
        if kind in cut:
            header.append(f"{_WORDS[kind]}, what was cut")
            columns.append(cut[kind])
    rows = [
        [str(layer), *(short(column[layer]) for column in columns)]
        for layer in range(outline.num_layers)
    ]
    if cut:
        sums = [short(math.fsum(v for v in column if v is not None)) for column in columns]
        rows.append(["sum", *sums])
    shown = table(f"{measure} ({unit})", header, rows, numbers=range(1, len(header)))
    return tag("details", tag("summary", "The numbers"), shown)


def _steps(report: PruningReport) -> Element | None:
    """Return what was removed in which order, for methods that go step by step."""
    steps = report.search.get("steps")
    if not isinstance(steps, list) or not steps:
        return None
    rows = [
        [
            str(number),
            ", ".join(str(name) for name in step.get("removed", [])),
            short(_number(step.get("mean_nll_on_calibrate_text"))),
        ]
        for number, step in enumerate(steps, 1)
        if isinstance(step, dict)
    ]
    return table(
        "Step by step, each time the part without which the loss on the calibration text was least",
        ["Step", "Removed", "Loss after it (nats per token)"],
        rows,
        numbers=(2,),
    )


def _influence(report: PruningReport, outline: Outline) -> Element | None:
    """Return block influences, for the method that goes by them."""
    found = report.search.get("block_influence")
    if not isinstance(found, list):
        return None
    gone = set(outline.whole_layers())
    rows = [
        [str(layer), short(_number(value)), "removed" if layer in gone else "kept"]
        for layer, value in enumerate(found)
    ]
    caption = "Block influence: how little a layer's output is like its input; low leaves first"
    return table(caption, ["Layer", "Influence", ""], rows, numbers=(1,))


def _numbers(found: Any, what: str, kind: str, outline: Outline) -> list[float | None]:  # noqa: ANN401 - JSON
    """Return one value a layer, None where the plan has none."""
    rows = found.get(what) if isinstance(found, dict) else None
    row = rows.get(kind) if isinstance(rows, dict) else None
    values = [_number(value) for value in row] if isinstance(row, list) else []
    return [*values, *[None] * outline.num_layers][: outline.num_layers]


def _number(value: object) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None  # type: ignore[arg-type]
