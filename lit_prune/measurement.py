"""Measuring a model before and after: same samples, same prompts, same device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.decoder import quiet
from lit_prune.metrics import (
    FootprintResult,
    LatencyResult,
    PerplexityResult,
    compare,
    footprint_of,
    measure_latency,
    perplexity_of,
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
        perplexity: On the score side.
        latency: Prefill and decode; None where it was switched off.
    """

    footprint: FootprintResult
    perplexity: PerplexityResult
    latency: LatencyResult | None


def measure(model: PreTrainedModel, rows: RowSet, config: PruningConfig) -> Measurement:
    """Measure footprint, perplexity on the score side, and latency, where the model is. It is left as it was.

    Args:
        model: Dense or pruned.
        rows: The calibration text with its sides.
        config: Batch sizes of replay and latency.
    """
    with quiet(model):
        perplexity = perplexity_of(model, rows.batches("score", config.replay_batch_tokens))
        prompts = _prompts(model, rows, config)
        latency = None
        if config.latency_prompt_tokens:
            latency = measure_latency(model, prompts, new_tokens=config.latency_new_tokens)
        footprint = footprint_of(model, context_length=prompts.shape[1], peak_ids=prompts)
    return Measurement(footprint, perplexity, latency)


def _prompts(model: PreTrainedModel, rows: RowSet, config: PruningConfig) -> Tensor:
    """Return ``[latency_batch_size, prompt]`` token ids from the score side, repeated where it is short."""
    longest = getattr(model.config, "max_position_embeddings", None) or config.latency_prompt_tokens
    tokens = max(1, min(config.latency_prompt_tokens or 128, longest - config.latency_new_tokens))
    stream = torch.cat([row.ids for row in rows.side("score")])
    wanted = tokens * config.latency_batch_size
    return stream.repeat(-(-wanted // len(stream)))[:wanted].reshape(config.latency_batch_size, tokens)


def report_rows(before: Measurement, after: Measurement | None) -> tuple[ReportRow, ...]:
    """Lay the two measurements side by side; ``after`` is None in a dry run."""
    rows: list[ReportRow] = []

    def add(key: str, label: str, unit: Unit, one: float | None, other: float | None, note: str = "") -> None:
        rows.append(ReportRow(key=key, label=label, unit=unit, before=one, after=other, note=note))

    a, b = before.footprint, after.footprint if after else None
    add("decoder_parameters", "parameters in decoder layers", "count", a.decoder_parameters, b and b.decoder_parameters)
    add("total_parameters", "parameters in all", "count", a.total_parameters, b and b.total_parameters)
    add("flops_per_token", "FLOPs per token, decoder", "count", a.flops_per_token, b and b.flops_per_token,
        f"context {a.context_length}")
    add("head_flops_per_token", "FLOPs per token, head", "count", a.head_flops_per_token, b and b.head_flops_per_token)
    add("kv_cache_bytes_per_token", "KV cache per token", "bytes", a.kv_cache_bytes_per_token,
        b and b.kv_cache_bytes_per_token)
    add("weight_bytes", "bytes of weights", "bytes", a.weight_bytes, b and b.weight_bytes)
    add("peak_forward_bytes", "peak memory of a forward", "bytes", a.peak_forward_bytes, b and b.peak_forward_bytes)
    p, q = before.perplexity, after.perplexity if after else None
    add("perplexity", "validation perplexity", "perplexity", p.perplexity, q and q.perplexity)
    add("mean_nll", "mean NLL per token (nats)", "nats", p.mean_nll, q and q.mean_nll)
    if before.latency is not None:
        one, other = before.latency, after.latency if after else None
        spread = compare(one, other) if other else None
        add("prefill_seconds", "prefill", "seconds", one.prefill_seconds, other and other.prefill_seconds,
            _verdict(spread.prefill.measurable) if spread else "")
        add("decode_seconds_per_token", "decode, per token", "seconds", one.decode_seconds_per_token,
            other and other.decode_seconds_per_token, _verdict(spread.decode.measurable) if spread else "")
        add("prefill_tokens_per_second", "prefill", "tokens_per_second", one.prefill_tokens_per_second,
            other and other.prefill_tokens_per_second)
        add("decode_tokens_per_second", "decode", "tokens_per_second", one.decode_tokens_per_second,
            other and other.decode_tokens_per_second)
    return tuple(rows)


def _verdict(measurable: bool) -> str:  # noqa: FBT001 - one obvious argument
    return "" if measurable else "inside the spread"


def conditions(before: Measurement, after: Measurement | None) -> dict[str, Any]:
    """Say how the numbers were measured, as data and in words."""
    p = before.perplexity
    words = [
        f"perplexity: exp of the mean NLL of {p.num_tokens} tokens of {p.num_real_tokens} real ones in {p.num_rows} "
        f"samples of at most {p.context_length} tokens, each scored once (no stride)"
    ]
    whole: dict[str, Any] = {"perplexity": asdict(p)}
    if before.latency is not None:
        one = before.latency
        words.append(
            f"latency: {one.device}, {one.dtype}, batch {one.batch_size}, {one.prompt_tokens} prompt + {one.new_tokens} "
            f"new tokens, median of {one.repetitions} after {one.warmup} warm-up runs"
        )
        whole["latency_before"] = asdict(one)
        if after is not None and after.latency is not None:
            whole["latency_after"] = asdict(after.latency)
            words += compare(one, after.latency).words.splitlines()
    whole["peak_memory_method"] = before.footprint.peak_method
    return {**whole, "words": words}
