"""The model card: what this is, what was done, what it cost, how to load it, what not to expect."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import Task, task_of, whole_of
from lit_prune.decoder.families import family_name
from lit_prune.saving.manifest import SAVED_WITH
from lit_prune.versions import versions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport
    from lit_prune.saving.prepared import Prepared

# What a model is for, as model hubs call it and in words.
_PIPELINES: dict[Task, str] = {
    "next_token": "text-generation",
    "sequence": "text-classification",
    "token": "token-classification",
}
_KINDS: dict[Task, str] = {
    "next_token": "causal language model",
    "sequence": "classifier of texts",
    "token": "classifier of tokens",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def model_card(
    model: PreTrainedModel,
    prepared: Prepared,
    *,
    name: str,
    why: str,
    verify: bool,
    rounded: bool,
    plan: PruningPlan | None,
    report: PruningReport | None,
) -> str:
    """Return ``README.md``.

    Args:
        model: The model that is saved.
        prepared: What its format makes of it.
        name: Of the directory.
        why: Why this format.
        verify: Whether it is compared in a fresh process before it takes its place.
        rounded: Whether its rotary frequencies are other bits than its config gives.
        plan: What stayed.
        report: Before and after.
    """
    base = _plain_text(str(getattr(whole_of(model).config, "name_or_path", "") or ""))
    parts = [
        _front_matter(base, prepared.library, _pipeline(model)),
        f"# {_plain_text(name)}",
        _origin(model, base, plan, report),
    ]
    if report is not None:
        parts += ["## Before and after", report.to_markdown().strip(), _calibration(report)]
    parts += [
        "## Load it",
        f"Format `{prepared.format}` ({why}).",
        how_to_load(prepared, name),
        "\n".join(f"- {note}" for note in prepared.notes),
        "## Limits",
        _limits(prepared, task_of(model), verify=verify, rounded=rounded),
        "## Versions",
        _versions(plan, report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pipeline(model: PreTrainedModel) -> str:
    return "image-text-to-text" if whole_of(model) is not model else _PIPELINES[task_of(model)]


def _front_matter(base: str, library: str, pipeline: str) -> str:
    lines = ["---", "tags:", "- lit_prune", "- structured-pruning", f"pipeline_tag: {pipeline}"]
    lines.append(f"library_name: {library}")
    if _HUB_NAME.fullmatch(base):
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---"])


def _origin(
    model: PreTrainedModel, base: str, plan: PruningPlan | None, report: PruningReport | None
) -> str:
    shown = (
        base if _HUB_NAME.fullmatch(base) else PurePath(base).name
    )  # no path of somebody's machine
    origin = f"from `{shown}`" if shown else "from a model without a name"
    count = sum(p.numel() for p in model.parameters())
    family = family_name(model.config.model_type)
    kind = f"A {family} {_KINDS[task_of(model)]} {origin}: {count:,} parameters"
    if (whole := whole_of(model)) is not model:
        every = sum(p.numel() for p in whole.parameters())
        kind += f", inside a {type(whole).__name__} of {every:,}"
    if plan is None:
        return f"{kind}. It carries no pruning plan."
    lines = [f"{kind}, structurally pruned by lit_prune (plan `{plan.digest[:12]}`, `plan.json`)."]
    if report is not None:
        lines.append(f"Method `{_plain_text(report.preset)}`: removed {report.ratios()}.")
    return " ".join(lines)


def _calibration(report: PruningReport) -> str:
    facts = {
        key: report.calibration[key]
        for key in ("samples", "tokens", "longest_sample", "data_digest", "statistics_from")
        if key in report.calibration
    }
    if not facts:
        return ""
    return (
        "Calibrated on: "
        + "; ".join(f"{k} {_plain_text(_words(v))}" for k, v in facts.items())
        + "."
    )


def how_to_load(prepared: Prepared, name: str) -> str:
    """Return the exact lines, in every way that works."""
    blocks = [
        [words, "", "```sh" if lines[0].startswith("llama-") else "```python", *lines, "```"]
        for words, lines in prepared.ways(name)
    ]
    return "\n\n".join("\n".join(block).strip() for block in blocks)


def _limits(prepared: Prepared, task: Task, *, verify: bool, rounded: bool) -> str:
    quality = "Perplexity on some text" if task == "next_token" else "Accuracy on some samples"
    lines = [f"{quality} is not fitness for a task: measure yours."]
    lines += prepared.limits()
    if rounded:
        lines.append(
            f"The rotary frequencies were rounded with the weights. {prepared.reader} makes them "
            "afresh in float32: its logits differ a little from the measured ones."
        )
    lines.append(
        "Looked at in a fresh process before it was put here, and compared with the model in "
        "memory: how far, says `verification` in `MANIFEST.json`. No inference server was run."
        if verify
        else "Saved with `verify=False`: it was not loaded and compared."
    )
    return "\n".join(f"- {line}" for line in lines)


def _versions(plan: PruningPlan | None, report: PruningReport | None) -> str:
    versions = {**versions_of(*SAVED_WITH), **(report.versions if report else {})}
    lines = [
        f"- {package} {_plain_text(str(number))}" for package, number in sorted(versions.items())
    ]
    seed = (report.config if report else {}).get(
        "seed", (plan.provenance if plan else {}).get("seed")
    )
    return "\n".join([*lines, *([f"- seed {_plain_text(str(seed))}"] if seed is not None else [])])


def _words(value: Any) -> str:  # noqa: ANN401 - walks JSON
    return (
        ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    )


def _plain_text(text: str) -> str:
    """Keep a name from becoming Markdown: one line, nothing that closes or opens a construct."""
    return re.sub(r"[\s`<>\[\]|]+", " ", text).strip()
