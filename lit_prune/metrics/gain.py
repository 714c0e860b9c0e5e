"""Why a phase did not get faster: from bytes, operations, layers and measured times alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_prune.metrics.speedup import compare, drift
from lit_prune.metrics.waiting import BUSY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_prune.metrics.footprint import FootprintResult
    from lit_prune.metrics.latency import LatencyResult
    from lit_prune.metrics.speedup import LatencyComparison, Speedup

_TILED = ("float16", "bfloat16")
# A step for many sequences that takes less than this share of their number is not bound by sums.
_FLAT = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What the times at one batch size say, and the reason where that is no plain gain.

    Attributes:
        comparison: Both phases, with their spread.
        prefill_reason: Why no gain in prefill may be claimed, or why one that was measured is
            doubtful; else empty.
        decode_reason: The same of decoding.
        larger_batch: What the largest batch tells about decoding steps for so few; else empty.
    """

    comparison: LatencyComparison
    prefill_reason: str = ""
    decode_reason: str = ""
    larger_batch: str = ""


def gain_words(found: Sequence[Gain]) -> list[str]:
    """Return a line for each batch size and phase, then each reason once.

    Example:
        >>> from lit_prune.metrics import LatencyComparison, Speedup
        >>> prefill = Speedup(phase="prefill", ratio=1.5, spread=0.1)
        >>> decode = Speedup(phase="decode", ratio=1.0, spread=0.1)
        >>> same = [
        ...     Gain(
        ...         comparison=LatencyComparison(prefill=prefill, decode=decode, batch_size=size),
        ...         decode_reason="It is odd",
        ...     )
        ...     for size in (1, 8)
        ... ]
        >>> gain_words(same)[-1]
        'decode at batch 1 and 8: It is odd'
    """
    lines, reasons = [], dict[tuple[str, str], list[str]]()
    for gain in found:
        comparison = gain.comparison
        lines += [f"batch {comparison.batch_size}, {phase.words}" for phase in comparison.phases]
        for phase, reason in (
            ("prefill", gain.prefill_reason),
            ("decode", gain.decode_reason),
            ("decode", gain.larger_batch),
        ):
            if reason:
                reasons.setdefault((phase, reason), []).append(str(comparison.batch_size))
    lines += [
        f"{phase} at batch {' and '.join(batches)}: {reason}"
        for (phase, reason), batches in reasons.items()
    ]
    return lines


def gains(
    before: Sequence[LatencyResult],
    after: Sequence[LatencyResult],
    dense: FootprintResult,
    pruned: FootprintResult,
) -> tuple[Gain, ...]:
    """Compare latencies batch size by batch size; say why where that shows no plain gain.

    The reasons are deductions from what was counted and measured, without any assumption on the
    device: reading fewer bytes of weights saves a decoding step at most their share, fewer
    operations save a prefill at most theirs. Where the times did not follow, they went elsewhere;
    where they fell by more, something else has changed.

    Args:
        before: Of the dense model, one for each batch size.
        after: Of the pruned model, in the same order.
        dense: Recount of the dense model.
        pruned: Recount of the pruned model.

    Raises:
        ConfigError: If two latencies were measured under different conditions.

    Example:
        >>> from lit_prune.metrics import FootprintResult, LatencyResult
        >>> one = LatencyResult(
        ...     device="cpu (1 threads)", dtype="float32", batch_size=1, prompt_tokens=8,
        ...     new_tokens=4, warmup=1, repetitions=5, prefill_seconds=0.2, prefill_spread=0.01,
        ...     decode_seconds_per_token=0.1, decode_spread=0.01)
        >>> size = FootprintResult(
        ...     decoder_parameters=100, total_parameters=200, flops_per_token=200,
        ...     head_flops_per_token=200, context_length=8, kv_cache_bytes_per_token=8,
        ...     decoder_weight_bytes=400, weight_bytes=800, head_weight_bytes=400, num_layers=2)
        >>> (gain,) = gains([one], [one], size, size)
        >>> gain.decode_reason
        'Nothing that a decoding step reads was removed'
    """
    found = []
    for one, other in zip(before, after, strict=True):
        comparison = compare(one, other)
        load = _load(one, other)
        prefill = _prefill(comparison.prefill, one, dense, pruned)
        if load and not comparison.prefill.measurable:
            prefill = load
        decode = flat = ""
        if comparison.decode is not None:  # a classifier decodes nothing
            decode = _decode(comparison.decode, other, dense, pruned)
            if load and not comparison.decode.measurable:
                decode = load
            flat = "" if comparison.decode.claim else _flat(other, after)
        found.append(
            Gain(
                comparison=comparison,
                prefill_reason=prefill,
                decode_reason=decode,
                larger_batch=flat,
            )
        )
    return tuple(found)


def _load(one: LatencyResult, other: LatencyResult) -> str:
    """Say that the machine did other work during a measurement, or changed between, where so."""
    before, after = (result.waited or 0.0 for result in (one, other))
    if max(before, after) >= BUSY:
        return (
            f"Threads waited for processors that other work held, {before:.0%} of the time before "
            f"and {after:.0%} after (all threads together): measure again on a machine that does "
            "nothing else"
        )
    changed = drift(one, other)
    if changed >= BUSY:
        return (
            f"The time of a fixed piece of work beside both changed by {changed:.0%}: the machine "
            "itself got slower or faster. Measure again on one that does nothing else"
        )
    return ""


def _decode(
    speedup: Speedup, one: LatencyResult, dense: FootprintResult, pruned: FootprintResult
) -> str:
    before, after = (size.step_weight_bytes(one.batch_size) for size in (dense, pruned))
    most = before / max(after, 1)
    head = pruned.head_weight_bytes / max(after, 1)
    if speedup.claim:
        # what many sequences compute can shrink more than what they read
        most = max(most, dense.flops_per_token / max(pruned.flops_per_token, 1))
        return _doubt(speedup, most, "fewer weights to read and to multiply by")
    if most <= 1:
        return "Nothing that a decoding step reads was removed"
    said = (
        f"A step reads {_bytes(after)} of weights in place of "
        f"{_bytes(before)}, {head:.0%} of them the head (often the embeddings, "
        f"too), which pruning leaves alone: {most:.2f}x faster at most"
    )
    return _why_not(said, most, speedup, one, dense, pruned)


def _prefill(
    speedup: Speedup, one: LatencyResult, dense: FootprintResult, pruned: FootprintResult
) -> str:
    before, after = (
        size.flops_per_token * one.prompt_tokens + size.head_flops_per_token
        for size in (dense, pruned)
    )
    most = before / max(after, 1)
    if speedup.claim:
        return _doubt(speedup, most, "fewer operations")
    if most <= 1:
        return "Nothing that a prefill computes was removed"
    fewer = f"A prompt takes {1 - after / before:.0%} fewer operations: {most:.2f}x faster"
    return _why_not(f"{fewer} at most", most, speedup, one, dense, pruned)


def _doubt(speedup: Speedup, most: float, what: str) -> str:
    """Say where a gain is larger than what was removed can explain; else nothing."""
    if speedup.ratio <= most * (1 + speedup.spread):
        return ""
    return (
        f"That is more than the {most:.2f}x that {what} can save: something else differed between "
        "the two measurements, such as other load on the device, or weights that fit into a cache "
        "now. Measure again before you count on it"
    )


def _why_not(
    said: str,
    most: float,
    speedup: Speedup,
    one: LatencyResult,
    dense: FootprintResult,
    pruned: FootprintResult,
) -> str:
    """Say whether the measurement was too coarse, or where the time must have gone."""
    if most - 1 <= speedup.spread:
        return (
            f"{said}, which is less than the spread: more repetitions, or a device that does "
            "nothing else, would be needed to see it"
        )
    if pruned.num_layers < dense.num_layers:
        layers = f"{pruned.num_layers} layers in place of {dense.num_layers}"
    else:
        layers = f"{pruned.num_layers} layers as before"
    said += (
        "; the time did not follow, so it goes to what narrower layers do not change, such as "
        f"starting the operations of {layers}"
    )
    fresh = sorted(set(pruned.odd_sizes) - set(dense.odd_sizes))
    if fresh and one.device.startswith("cuda") and one.dtype in _TILED:
        more = " and others" if len(fresh) > 3 else ""
        sizes = ", ".join(f"{size:,}" for size in fresh[:3])
        said += (
            f". Sizes that are no multiple of 64 ({sizes}{more}) fill the tiles of its matrix "
            "units badly: ask for channel_multiple=64"
        )
    return said


def _flat(one: LatencyResult, others: Sequence[LatencyResult]) -> str:
    """Say what the largest batch tells about a step for few sequences."""
    largest = max(others, key=lambda result: result.batch_size)
    times = (largest.decode_seconds_per_token or 0.0) / (one.decode_seconds_per_token or 1.0)
    if times >= _FLAT * largest.batch_size / one.batch_size:
        return ""
    return (
        f"A step for {largest.batch_size} sequences takes {times:.1f} times as long as one for "
        f"{one.batch_size}: it waits for weights and for the start of operations, not for "
        "arithmetic. Larger batches and longer prompts show more of what was saved"
    )


def _bytes(count: int) -> str:
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.2f} {letter}B"
    return f"{count} B"
