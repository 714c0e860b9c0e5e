"""Measuring a model before and after: same samples, same prompts, same device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
    footprint_of,
    gain_words,
    gains,
    measure_latency,
    quality_of,
)
from lit_prune.report import DOUBTFUL, INSIDE_SPREAD, ReportRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet
    from lit_prune.config import PruningConfig
    from lit_prune.metrics import Gain
    from lit_prune.report import Unit


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model, measured.

    Attributes:
        footprint: Parameters, FLOPs, cache and weight bytes, peak memory.
        quality: On the score side: perplexity, or of a classifier accuracy and cross-entropy; None
            where a classifier's text has no labels.
        latencies: Prefill and decode at each batch size; none where they were switched off.
    """

    footprint: FootprintResult
    quality: Quality | None
    latencies: tuple[LatencyResult, ...]

    @property
    def latency(self) -> LatencyResult | None:
        """At the batch size of the request."""
        return self.latencies[0] if self.latencies else None


def measure(model: PreTrainedModel, rows: RowSet, config: PruningConfig) -> Measurement:
    """Measure footprint, quality on the score side, and latency, where the model is.

    It is left as it was.

    Args:
        model: Dense or pruned.
        rows: The calibration text with its sides.
        config: Batch sizes of replay and latency.
    """
    with quiet(model):
        quality, decodes = None, task_of(model) == "next_token"
        if decodes or rows.num_scored("score"):
            quality = quality_of(model, rows.batches("score", config.replay_batch_tokens))
        tokens = config.prompt_tokens(getattr(model.config, "max_position_embeddings", None))
        new_tokens = config.latency_new_tokens if decodes else 0
        latencies = tuple(
            measure_latency(model, _prompts(rows, size, tokens), new_tokens=new_tokens)
            for size in _batch_sizes(config)
        )
        prompts = _prompts(rows, config.latency_batch_size, tokens)
        footprint = footprint_of(model, context_length=tokens, peak_ids=prompts)
    return Measurement(footprint, quality, latencies)


def _batch_sizes(config: PruningConfig) -> list[int]:
    """Return the batch size of the request, and what is measured besides; each once."""
    if not config.latency_prompt_tokens:
        return []
    return [*dict.fromkeys((config.latency_batch_size, *config.latency_further_batch_sizes))]


def _prompts(rows: RowSet, batch_size: int, tokens: int) -> Tensor:
    """Return ``[batch_size, tokens]`` ids from the score side, repeated if too short."""
    stream = torch.cat([row.ids for row in rows.side("score")])
    wanted = tokens * batch_size
    return stream.repeat(-(-wanted // len(stream)))[:wanted].reshape(batch_size, tokens)


# Key (an attribute of the result, and the row's name), label, unit.
_Table = tuple[tuple[str, str, "Unit"], ...]
_FOOTPRINT: _Table = (
    ("decoder_parameters", "parameters in decoder layers", "count"),
    ("total_parameters", "parameters in all", "count"),
    ("flops_per_token", "FLOPs per token, decoder", "count"),
    ("head_flops_per_token", "FLOPs per token, head", "count"),
    ("kv_cache_bytes_per_token", "KV cache per token", "bytes"),
    ("weight_bytes", "bytes of weights", "bytes"),
    ("peak_forward_bytes", "peak memory of a forward", "bytes"),
)
_PERPLEXITY: _Table = (
    ("perplexity", "validation perplexity", "perplexity"),
    ("mean_nll", "mean NLL per token (nats)", "nats"),
)
_CLASSIFICATION: _Table = (
    ("accuracy", "validation accuracy", "accuracy"),
    ("mean_nll", "cross-entropy per label (nats)", "nats"),
)
_LATENCY: _Table = (
    ("prefill_seconds", "prefill", "seconds"),
    ("decode_seconds_per_token", "decode, per token", "seconds"),
    ("prefill_tokens_per_second", "prefill throughput", "tokens_per_second"),
    ("decode_tokens_per_second", "decode throughput", "tokens_per_second"),
)


def report_rows(before: Measurement, after: Measurement | None) -> tuple[ReportRow, ...]:
    """Lay the two measurements side by side; ``after`` is None in a dry run."""
    context = {"flops_per_token": f"context {before.footprint.context_length}"}
    rows = _rows(_FOOTPRINT, before.footprint, after and after.footprint, context)
    classifies = isinstance(before.quality, ClassificationResult)
    quality = _CLASSIFICATION if classifies else _PERPLEXITY
    if before.quality is not None:
        rows += _rows(quality, before.quality, after and after.quality)
    found: Sequence[Gain] = ()
    if after is not None:
        found = gains(before.latencies, after.latencies, before.footprint, after.footprint)
    for number, one in enumerate(before.latencies):
        other = None if after is None else after.latencies[number]
        notes: dict[str, str] = {}
        for phase, note in _doubts(found[number]) if found else ():
            keys = (key for key, _, _ in _LATENCY if key.startswith(phase))
            notes |= dict.fromkeys(keys, note)
        measured = [row for row in _LATENCY if one.new_tokens or row[0].startswith("prefill")]
        if not number:
            rows += _rows(measured, one, other, notes)
        else:  # of a further batch size the throughput
            rows += [
                replace(
                    row,
                    key=f"{row.key}_batch_{one.batch_size}",
                    label=f"{row.label}, batch {one.batch_size}",
                )
                for row in _rows(measured[len(measured) // 2 :], one, other, notes)
            ]
    return tuple(rows)


def _doubts(gain: Gain) -> Iterator[tuple[str, str]]:
    """Yield the phases whose difference is not to be counted on, and what a row says of it."""
    reasons = {"prefill": gain.prefill_reason, "decode": gain.decode_reason}
    for phase in gain.comparison.phases:
        if not phase.measurable:
            yield phase.phase, INSIDE_SPREAD
        elif phase.claim and reasons[phase.phase]:
            yield phase.phase, DOUBTFUL


def _rows(
    table: Sequence[tuple[str, str, Unit]],
    before: object | None,
    after: object | None,
    notes: Mapping[str, str] | None = None,
) -> list[ReportRow]:
    return [
        ReportRow(
            key=key,
            label=label,
            unit=unit,
            before=getattr(before, key),
            after=None if after is None else getattr(after, key),
            note=(notes or {}).get(key, ""),
        )
        for key, label, unit in table
    ]


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
    if before.latencies:
        one = before.latencies[0]
        sizes = ", ".join(str(latency.batch_size) for latency in before.latencies)
        work = f"{one.prompt_tokens} prompt + {one.new_tokens} new tokens"
        if not one.new_tokens:
            work = f"one forward over {one.prompt_tokens} tokens (a classifier decodes nothing)"
        words.append(
            f"latency: {one.device}, {one.dtype}, batch {sizes}, {work}, median of "
            f"{one.repetitions} after {one.warmup} warm-up runs; spreads are interquartile ranges "
            "and what threads waited for processors that other work held; so counts the "
            "difference in time of a fixed piece of work, timed beside"
        )
        whole["latency"] = [{"before": asdict(latency)} for latency in before.latencies]
    if before.latencies and after is not None:
        found = gains(before.latencies, after.latencies, before.footprint, after.footprint)
        for entry, latency, gain in zip(whole["latency"], after.latencies, found, strict=True):
            entry["after"] = asdict(latency)
            entry["reasons"] = {
                "prefill": gain.prefill_reason,
                "decode": gain.decode_reason,
                "larger_batch": gain.larger_batch,
            }
        words += gain_words(found)
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
