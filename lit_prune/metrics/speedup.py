"""Two latencies compared: what may be claimed, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_prune.errors import ConfigError

if TYPE_CHECKING:
    from lit_prune.metrics.latency import LatencyResult

_SAME = ("device", "dtype", "batch_size", "prompt_tokens", "new_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """Time before over time after, of prefill or decode.

    Attributes:
        phase: ``"prefill"`` or ``"decode"``.
        ratio: Above 1 is faster.
        spread: How far ``ratio`` may lie from 1 by noise and other load alone: the interquartile
            ranges of both measurements, as a fraction of the time after, and the larger of what
            their threads waited for processors and of how much a fixed piece of work changed in
            time.
    """

    phase: str
    ratio: float
    spread: float

    @property
    def measurable(self) -> bool:
        """Whether the ratio lies outside the spread."""
        return abs(self.ratio - 1) > self.spread

    @property
    def claim(self) -> bool:
        """Whether a speed-up may be claimed."""
        return self.measurable and self.ratio > 1

    @property
    def words(self) -> str:
        """One sentence.

        Example:
            >>> Speedup(phase="prefill", ratio=1.03, spread=0.06).words
            'prefill: no measurable difference: 1.03x lies inside the spread of ±6 %'
        """
        spread = f"the spread of ±{f'{100 * self.spread:.1f}'.removesuffix('.0')} %"
        if not self.measurable:
            where = f"{self.ratio:.2f}x lies inside {spread}"
            return f"{self.phase}: no measurable difference: {where}"
        verdict = "faster" if self.ratio > 1 else "slower"
        return f"{self.phase}: {verdict}: {self.ratio:.2f}x, outside {spread}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyComparison:
    """Prefill and decode before and after, on the same device, dtype and prompts.

    A classifier decodes nothing: ``decode`` is None.
    """

    prefill: Speedup
    decode: Speedup | None
    batch_size: int

    @property
    def phases(self) -> tuple[Speedup, ...]:
        """What was compared."""
        return (self.prefill,) if self.decode is None else (self.prefill, self.decode)

    @property
    def claim(self) -> bool:
        """Whether one phase is measurably faster and none measurably slower."""
        return any(p.claim for p in self.phases) and not any(
            p.measurable and p.ratio < 1 for p in self.phases
        )

    @property
    def words(self) -> str:
        """What may be said about the phases, one line each."""
        return "\n".join(phase.words for phase in self.phases)


def compare(before: LatencyResult, after: LatencyResult) -> LatencyComparison:
    """Compare two latencies; inside the spread no speed-up is claimed.

    Load that was there in one measurement and not in the other lies outside the range of either:
    what threads waited for processors counts as spread, too, or how much the time of a fixed piece
    of work differs between the two.

    Args:
        before: Latency of the dense model.
        after: Latency of the pruned model.

    Returns:
        Ratios (before / after) with their spread, claim and words.

    Raises:
        ConfigError: If device, dtype, batch size, prompt or new tokens differ; names the first.

    Example:
        >>> from dataclasses import replace
        >>> from lit_prune.metrics.latency import LatencyResult
        >>> before = LatencyResult(
        ...     device="cpu (2 threads)", dtype="float32", batch_size=4, prompt_tokens=64,
        ...     new_tokens=16, warmup=2, repetitions=7, prefill_seconds=0.3, prefill_spread=0.01,
        ...     decode_seconds_per_token=0.02, decode_spread=0.001)
        >>> comparison = compare(before, replace(before, prefill_seconds=0.2))
        >>> comparison.claim, comparison.decode.claim
        (True, False)
        >>> print(comparison.words)
        prefill: faster: 1.50x, outside the spread of ±10 %
        decode: no measurable difference: 1.00x lies inside the spread of ±10 %
    """
    for name in _SAME:
        one, other = getattr(before, name), getattr(after, name)
        if one != other:
            raise ConfigError(
                f"latencies with different {name} cannot be compared: {one!r} before, {other!r} "
                "after. Measure both on the same device, dtype and prompts."
            )
    decodes = before.decode_seconds_per_token is not None
    return LatencyComparison(
        prefill=_speedup("prefill", before, after),
        decode=_speedup("decode", before, after) if decodes else None,
        batch_size=before.batch_size,
    )


def _speedup(phase: str, before: LatencyResult, after: LatencyResult) -> Speedup:
    (one, one_spread), (other, other_spread) = (
        (result.prefill_seconds, result.prefill_spread)
        if phase == "prefill"
        else (result.decode_seconds_per_token or 0.0, result.decode_spread or 0.0)
        for result in (before, after)
    )
    # Other load that lasts shifts every repetition: no range over them shows it. Threads that wait
    # see a part of it, a fixed piece of work all of it, with noise of its own: the larger counts.
    waited = ((before.waited or 0.0) * one + (after.waited or 0.0) * other) / other
    return Speedup(
        phase=phase,
        ratio=one / other,
        spread=(one_spread + other_spread) / other + max(waited, drift(before, after)),
    )


def drift(before: LatencyResult, after: LatencyResult) -> float:
    """Return how far from 1 the ratio of an unchanged model would lie, by the fixed piece of work.

    0 where it was not timed both times.
    """
    one, other = before.yardstick_seconds, after.yardstick_seconds
    return abs(one / other - 1) if one and other else 0.0
