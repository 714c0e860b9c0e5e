"""The rest of the page: before and after, the text, warnings, how to load, how to reproduce."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING

from lit_prune.config import PruningConfig
from lit_prune.report import format_value
from lit_prune.views.page.elements import code, listed, section, table, tag
from lit_prune.views.page.figures import change

if TYPE_CHECKING:
    from collections.abc import Sequence
    from xml.etree.ElementTree import Element

    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport
    from lit_prune.views.page.elements import Child

_VERDICTS = {"better": "▲ better", "worse": "▼ worse", "same": "= same", "unknown": "–"}


def before_and_after(report: PruningReport) -> Element:
    """Return every row of the report."""
    rows: list[Sequence[Child]] = [
        [
            row.label,
            format_value(row.before, row.unit),
            format_value(row.after, row.unit),
            change(row.ratio),
            tag(
                "div",
                tag("span", _VERDICTS[row.verdict], class_=row.verdict),
                tag("small", f" {row.note}") if row.note else None,
            ),
        ]
        for row in report.rows
    ]
    header = ["Quantity", "Before", "After", "Change", "Verdict"]
    shown = table("The model before and after", header, rows, numbers=(1, 2, 3))
    notes = [str(words) for words in report.conditions.get("words", [])]
    quality = [words for words in notes if words.startswith(("perplexity", "accuracy"))]
    return section("table", "Before and after", shown, listed(quality, class_="note plain"))


def calibration(report: PruningReport) -> Element:
    """Return what is known of the text behind the decision."""
    found = report.calibration
    tokens = found.get("tokens")
    sides = tokens if isinstance(tokens, dict) else {}
    rows: list[Sequence[Child]] = [
        ["samples", _count(found.get("samples")), ""],
        ["tokens to calibrate on", _count(sides.get("calibrate")), "statistics are made on them"],
        ["tokens to choose on", _count(sides.get("choose")), "options are decided on them"],
        ["tokens to score on", _count(sides.get("score")), "perplexity is measured on them"],
        ["longest sample", _count(found.get("longest_sample")), "tokens"],
        ["tokens for each channel", _count(found.get("tokens_per_channel")),
         "of the widest projection; below 5 covariances are noisy"],
        ["statistics from", str(found.get("statistics_from", "–")), ""],
        ["digest of the text", tag("code", str(found.get("data_digest", "–"))), ""],
    ]  # fmt: skip
    shown = table("The text behind it", ["What", "Value", "Meaning"], rows)
    split = [str(found["split"])] if "split" in found else []
    return section("calibration", "Calibration data", shown, listed(split, class_="note plain"))


def warnings(report: PruningReport) -> Element:
    """Return what a reader should know before concluding anything."""
    shown = listed(report.warnings) or tag("p", "None.")
    return section("warnings", "Warnings", shown)


def loading(load: Sequence[tuple[str, Sequence[str]]]) -> Element:
    """Return how to load the model that lies beside the page."""
    children: list[Child] = []
    for words, lines in load:
        if words:
            children.append(tag("div", listed([words], class_="plain")))
        children.append(code(lines))
    if not children:
        children.append(
            tag(
                "p",
                "No model lies beside this page: these are plan and report of a run. ",
                tag("code", "save_pruned"),
                " writes one, with this page in it.",
            )
        )
    return section("load", "How to load it", *children)


def reproduction(report: PruningReport, plan: PruningPlan) -> Element:
    """Return what makes the same plan again, and what it was made with."""
    config = report.config
    options = [
        f"    {field.name}={config[field.name]!r},"
        for field in fields(PruningConfig)
        if field.name in config and config[field.name] != _listed(field.default)
    ]
    lines = ["from lit_prune import prune", "", "result = prune(", "    model,", "    batches,"]
    lines += [*options, ")", f'assert result.plan.digest == "{plan.digest}"']
    rows: list[Sequence[Child]] = [
        ["plan", tag("code", plan.digest)],
        ["model", tag("code", plan.model_fingerprint)],
        ["text", tag("code", str(report.calibration.get("data_digest", "–")))],
        *([package, version] for package, version in sorted(report.versions.items())),
    ]
    whole = json.dumps(report.config, indent=1, sort_keys=True, default=str)
    return section(
        "reproduce",
        "How to reproduce it",
        tag("p", "The same weights, the same text and these options make the same plan:"),
        code(lines),
        table("Digests and versions", ["What", "Value"], rows),
        tag("details", tag("summary", "The whole request"), code(whole.splitlines())),
    )


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _count(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
