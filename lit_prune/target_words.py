"""What a report says about a target: asked, predicted, achieved."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_prune.report import ReportRow, format_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_prune.measurement import Measurement

# The row in which each target is read.
_ROWS = {
    "target_parameters": "total_parameters",
    "target_bytes": "weight_bytes",
    "target_speedup": "whole_seconds",
    "max_perplexity_increase": "choose_perplexity",
}


def target_facts(
    asked: Mapping[str, Any],
    budget: Mapping[str, Any],
    before: Measurement,
    after: Measurement | None,
) -> dict[str, Any]:
    """Return what was asked, ``predicted`` and ``achieved``, as numbers and in ``words``.

    Args:
        asked: `lit_prune.targets.Aim.asked`.
        budget: What the plan records about its budget.
        before: The dense model, measured.
        after: The pruned model; None in a dry run, where ``achieved`` is None.
    """
    dense, name, amount = before.footprint, asked["name"], asked["amount"]
    achieved: float | None = None
    if name == "target_parameters":
        predicted = dense.total_parameters - budget["removed_parameters"]
        achieved = after.footprint.total_parameters if after else None
        said = ("at most {} parameters in all", _count)
    elif name == "target_bytes":
        removed = budget["removed"]
        if budget["resource"] == "parameters":  # all of one dtype
            removed *= dense.decoder_weight_bytes // dense.decoder_parameters
        predicted = dense.weight_bytes - removed
        achieved = after.footprint.weight_bytes if after else None
        said = ("at most {} of weights", _size)
    elif name == "target_speedup":
        predicted = budget["dense"] / (budget["dense"] - budget["removed"])
        if before.latency and after and after.latency:
            achieved = before.latency.whole_seconds / after.latency.whole_seconds
        said = ("decoder layers {} as fast", _times)
    else:
        predicted = math.expm1(asked["predicted_nll"] - asked["dense_nll"])
        if after and after.quality and before.quality:
            achieved = math.expm1(after.quality.mean_nll - before.quality.mean_nll)
        said = ("perplexity on the choose text at most {}", _percent)
    where = {
        "target_speedup": "the whole model measured, embeddings and head included",
        "max_perplexity_increase": "on the score text",
    }.get(name, "recounted")
    sentence, show = said
    words = f"{name} {asked['value']}: {sentence.format(show(amount))}; planned {show(predicted)}"
    if achieved is not None:
        words += f"; {where} {show(achieved)}"
    if bound := asked.get("bound"):
        words += f"; {bound}"
    return {**asked, "predicted": predicted, "achieved": achieved, "words": words}


def with_target(
    rows: Sequence[ReportRow], target: Mapping[str, Any], after: Measurement | None
) -> tuple[ReportRow, ...]:
    """Return the rows with a note where the target is read.

    Args:
        rows: Of the report.
        target: What `target_facts` returned.
        after: The pruned model, measured; None in a dry run.
    """
    note = target["words"].split("; ")
    told = f"target: {note[0].split(': ', 1)[1]}; {note[1]}"
    if target["name"] == "max_perplexity_increase":
        dense, planned = (math.exp(target[key]) for key in ("dense_nll", "predicted_nll"))
        return (
            *rows,
            ReportRow(
                key=_ROWS[target["name"]],
                label="perplexity that was chosen by",
                unit="perplexity",
                before=dense,
                after=None if after is None else planned,
                note=told,
            ),
        )
    key = _ROWS[target["name"]]
    return tuple(
        replace(row, note=f"{row.note}; {told}" if row.note else told) if row.key == key else row
        for row in rows
    )


def _count(value: float) -> str:
    return format_value(value, "count")


def _size(value: float) -> str:
    return format_value(value, "bytes")


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _percent(value: float) -> str:
    return f"{value:+.1%}"
