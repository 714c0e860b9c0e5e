"""The model card: what this is, what was done, what it cost, how to load it, what not to expect."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lit_prune.saving.versions import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def model_card(
    model: PreTrainedModel,
    *,
    name: str,
    stock: bool,
    tokenizer: bool,
    verify: bool,
    rounded: bool,
    plan: PruningPlan | None,
    report: PruningReport | None,
) -> str:
    """Return ``README.md``.

    Args:
        model: The model that is saved.
        name: Of the directory.
        stock: Whether plain transformers loads it.
        tokenizer: Whether a tokenizer lies beside it.
        verify: Whether it is compared in a fresh process before it takes its place.
        rounded: Whether its rotary frequencies are other bits than its config gives.
        plan: What stayed.
        report: Before and after.
    """
    base = _plain_text(str(getattr(model.config, "name_or_path", "") or ""))
    parts = [
        _front_matter(base, stock=stock),
        f"# {_plain_text(name)}",
        _origin(model, base, plan, report),
    ]
    if report is not None:
        parts += ["## Before and after", report.to_markdown().strip(), _calibration(report)]
    parts += ["## Load it", _how_to_load(name, stock=stock, tokenizer=tokenizer)]
    parts += [
        "## Limits",
        _limits(stock=stock, verify=verify, rounded=rounded),
        "## Versions",
        _versions(plan, report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str, *, stock: bool) -> str:
    lines = ["---", "tags:", "- lit_prune", "- structured-pruning", "pipeline_tag: text-generation"]
    if stock:
        lines.append("library_name: transformers")
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
    kind = f"A {model.config.model_type} causal language model {origin}: {count:,} parameters"
    if plan is None:
        return f"{kind}. It carries no pruning plan."
    lines = [f"{kind}, structurally pruned by lit_prune (plan `{plan.digest[:12]}`, `plan.json`)."]
    if report is not None:
        lines.append(
            f"Method `{_plain_text(report.preset)}`: asked for {report.requested_ratio:.2%} of "
            f"the decoder-layer parameters, removed {report.achieved_ratio:.2%} "
            f"({report.total_ratio:.2%} of all parameters)."
        )
    return " ".join(lines)


def _calibration(report: PruningReport) -> str:
    facts = {
        key: report.calibration[key]
        for key in ("samples", "tokens", "data_digest", "statistics_from")
        if key in report.calibration
    }
    if not facts:
        return ""
    return (
        "Calibrated on: "
        + "; ".join(f"{k} {_plain_text(_words(v))}" for k, v in facts.items())
        + "."
    )


def _how_to_load(name: str, *, stock: bool, tokenizer: bool) -> str:
    lines = [
        "```python",
        "from lit_prune import load_pruned",
        "",
        f"model = load_pruned({name!r})",
    ]
    if tokenizer:
        lines += [
            "",
            "from transformers import AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        ]
    lines.append("```")
    if stock:
        lines += [
            "",
            "Plain transformers reads it too:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name!r})",
            "```",
        ]
    return "\n".join(lines)


def _limits(*, stock: bool, verify: bool, rounded: bool) -> str:
    lines = ["Perplexity on some text is not fitness for a task: measure yours."]
    if not stock:
        lines.append(
            "Layers differ in width (or hold biases, or lack parts) that the stock class cannot "
            "express: plain `from_pretrained`, and servers that expect a stock model, refuse "
            "this directory."
        )
    if stock and rounded:
        lines.append(
            "The rotary frequencies were rounded with the weights (`buffers.safetensors`). Plain "
            "transformers makes them afresh in float32: its logits differ a little from the "
            "measured ones."
        )
    lines.append(
        "Loaded in a fresh process and compared with the model in memory before it was put here: "
        "see `verification` in `MANIFEST.json`."
        if verify
        else "Saved with `verify=False`: it was not loaded and compared."
    )
    return "\n".join(f"- {line}" for line in lines)


def _versions(plan: PruningPlan | None, report: PruningReport | None) -> str:
    versions = {**package_versions(), **(report.versions if report else {})}
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
