"""Measuring a model before and after: same samples, same prompts, same device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.decoder import quiet, task_of
from lit_prune.metrics import (
    ClassificationResult,
    FootprintResult,
    LatencyResult,
    PerplexityResult,
    Quality,
    compare,
    footprint_of,
    measure_latency,
    quality_of,
)
from lit_prune.report import ReportRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet
    from lit_prune.config import PruningConfig
    from lit_prune.report import Unit


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model, measured.

    Attributes:
        footprint: Parameters, FLOPs, cache and weight bytes, peak memory.
        quality: On the score side: perplexity, or of a classifier accuracy and cross-entropy; None
            where a classifier's text has no labels.
        latency: Prefill and decode; None where it was switched off.
    """

    footprint: FootprintResult
    quality: Quality | None
    latency: LatencyResult | None


def measure(model: PreTrainedModel, rows: RowSet, config: PruningConfig) -> Measurement:
    """Measure footprint, quality on the score side, and latency, where the model is.

    It is left as it was.

    Args:
        model: Dense or pruned.
        rows: The calibration text with its sides.
        config: Batch sizes of replay and latency.
    """
    with quiet(model):
        quality = None
        if task_of(model) == "next_token" or rows.num_scored("score"):
            quality = quality_of(model, rows.batches("score", config.replay_batch_tokens))
        prompts = _prompts(model, rows, config)
        latency = None
        if config.latency_prompt_tokens:
            new_tokens = config.latency_new_tokens if task_of(model) == "next_token" else 0
            latency = measure_latency(model, prompts, new_tokens=new_tokens)
        footprint = footprint_of(model, context_length=prompts.shape[1], peak_ids=prompts)
    return Measurement(footprint, quality, latency)


def _prompts(model: PreTrainedModel, rows: RowSet, config: PruningConfig) -> Tensor:
    """Return ``[latency_batch_size, prompt]`` ids from the score side, repeated if too short."""
    tokens = config.prompt_tokens(getattr(model.config, "max_position_embeddings", None))
    stream = torch.cat([row.ids for row in rows.side("score")])
    wanted = tokens * config.latency_batch_size
    return stream.repeat(-(-wanted // len(stream)))[:wanted].reshape(
        config.latency_batch_size, tokens
    )


# Key (an attribute of the result, and the row's name), label, unit.
_FOOTPRINT: tuple[tuple[str, str, Unit], ...] = (
    ("decoder_parameters", "parameters in decoder layers", "count"),
    ("total_parameters", "parameters in all", "count"),
    ("flops_per_token", "FLOPs per token, decoder", "count"),
    ("head_flops_per_token", "FLOPs per token, head", "count"),
    ("kv_cache_bytes_per_token", "KV cache per token", "bytes"),
    ("weight_bytes", "bytes of weights", "bytes"),
    ("peak_forward_bytes", "peak memory of a forward", "bytes"),
)
_PERPLEXITY: tuple[tuple[str, str, Unit], ...] = (
    ("perplexity", "validation perplexity", "perplexity"),
    ("mean_nll", "mean NLL per token (nats)", "nats"),
)
_CLASSIFICATION: tuple[tuple[str, str, Unit], ...] = (
    ("accuracy", "validation accuracy", "accuracy"),
    ("mean_nll", "cross-entropy per label (nats)", "nats"),
)
_LATENCY: tuple[tuple[str, str, Unit], ...] = (
    ("prefill_seconds", "prefill", "seconds"),
    ("decode_seconds_per_token", "decode, per token", "seconds"),
    ("prefill_tokens_per_second", "prefill", "tokens_per_second"),
    ("decode_tokens_per_second", "decode", "tokens_per_second"),
)


def report_rows(before: Measurement, after: Measurement | None) -> tuple[ReportRow, ...]:
    """Lay the two measurements side by side; ``after`` is None in a dry run."""
    notes = {"flops_per_token": f"context {before.footprint.context_length}"}
    if before.latency and after and after.latency:
        spread = compare(before.latency, after.latency)
        for speedup in spread.phases:
            if not speedup.measurable:
                keys = (key for key, _, _ in _LATENCY if key.startswith(speedup.phase))
                notes.update(dict.fromkeys(keys, "inside the spread"))
    classifies = isinstance(before.quality, ClassificationResult)
    latency = _LATENCY
    if before.latency and not before.latency.new_tokens:
        latency = tuple(row for row in _LATENCY if row[0].startswith("prefill"))
    tables = (
        (_FOOTPRINT, before.footprint, after and after.footprint),
        (
            _CLASSIFICATION if classifies else _PERPLEXITY,
            before.quality,
            after and after.quality,
        ),
        (latency, before.latency, after and after.latency),
    )
    return tuple(
        ReportRow(
            key=key,
            label=label,
            unit=unit,
            before=getattr(one, key),
            after=getattr(other, key) if other else None,
            note=notes.get(key, ""),
        )
        for table, one, other in tables
        if one is not None
        for key, label, unit in table
    )


def predicted_rows(
    dense_seconds: float,
    removed_seconds: float,
    before: Measurement,
    after: Measurement | None,
) -> tuple[ReportRow, ...]:
    """Lay what a latency table predicts beside what was measured; never the one for the other.

    Args:
        dense_seconds: What the table says of all sub-blocks.
        removed_seconds: What it says of those units that go.
        before: The dense model, measured.
        after: The pruned model, measured; None in a dry run.
    """
    predicted = ReportRow(
        key="predicted_decoder_seconds",
        label="prompt and new tokens, predicted",
        unit="seconds",
        before=dense_seconds,
        after=dense_seconds - removed_seconds,
        note="sub-blocks, from the latency table",
    )
    measured = ReportRow(
        key="whole_seconds",
        label="prompt and new tokens, measured",
        unit="seconds",
        before=before.latency.whole_seconds if before.latency else None,
        after=after.latency.whole_seconds if after and after.latency else None,
        note="whole model",
    )
    return predicted, measured


def conditions(before: Measurement, after: Measurement | None) -> dict[str, Any]:
    """Say how the numbers were measured, as data and in words."""
    words, whole = _quality_conditions(before.quality)
    if before.latency is not None:
        one = before.latency
        work = f"{one.prompt_tokens} prompt + {one.new_tokens} new tokens"
        if not one.new_tokens:
            work = f"one forward over {one.prompt_tokens} tokens (a classifier decodes nothing)"
        words.append(
            f"latency: {one.device}, {one.dtype}, batch {one.batch_size}, {work}, median of "
            f"{one.repetitions} after {one.warmup} warm-up runs"
        )
        whole["latency_before"] = asdict(one)
        if after is not None and after.latency is not None:
            whole["latency_after"] = asdict(after.latency)
            words += compare(one, after.latency).words.splitlines()
    whole["peak_memory_method"] = before.footprint.peak_method
    return {**whole, "words": words}


def _quality_conditions(quality: Quality | None) -> tuple[list[str], dict[str, Any]]:
    """Say what a quality was measured on: in words, and as data."""
    match quality:
        case PerplexityResult() as p:
            words = (
                f"perplexity: exp of the mean NLL of {p.num_tokens} tokens of {p.num_real_tokens} "
                f"real ones in {p.num_rows} samples of at most {p.context_length} tokens, each "
                "scored once (no stride)"
            )
            return [words], {"perplexity": asdict(p)}
        case ClassificationResult() as c:
            words = (
                f"accuracy and cross-entropy: of {c.num_labels} labels in {c.num_rows} samples of "
                f"at most {c.context_length} tokens"
            )
            return [words], {"classification": asdict(c)}
    return ["quality: not measured, the score side has no labels"], {}
