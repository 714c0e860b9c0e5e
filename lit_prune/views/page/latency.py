"""Is it faster: every phase and batch size with its spread, and why where there is no gain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.views.page.elements import listed, section, table, tag
from lit_prune.views.page.times import PHASES

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from lit_prune.metrics import Speedup
    from lit_prune.views.page.times import Timed

_SECONDS = {
    "prefill": ("prefill_seconds", "prefill_spread"),
    "decode": ("decode_seconds_per_token", "decode_spread"),
}
# What is said of each phase, by the keys of `Timed.reasons`.
_REASONS = {"prefill": ("prefill",), "decode": ("decode", "larger_batch")}


def latency(times: list[Timed]) -> Element:
    """Return the times before and after, and what may be said about them."""
    title = "Latency"
    if not times:
        words = "Not measured: it was switched off in the request (`latency_prompt_tokens` is 0)."
        return section("latency", title, listed([words], class_="plain"))
    rows = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for name in PHASES:
        for one in times:
            batch = one.before.batch_size
            phase = one.phase(name)
            if name == "decode" and not one.before.new_tokens:  # a classifier
                continue
            rows.append(
                [
                    f"{name}, batch {batch}",
                    _time(one.before, name),
                    "–" if one.after is None else _time(one.after, name),
                    _ratio(phase),
                    _verdict(phase),
                ]
            )
            for reason in filter(None, map(one.reasons.get, _REASONS[name])):
                reasons.setdefault((name, reason), []).append(str(batch))
    first = times[0].before
    new = "no new ones"  # of a classifier
    if first.new_tokens:
        new = f"{first.new_tokens} new ones, greedy, with KV cache"
    conditions = (
        f"On {first.device}, {first.dtype}; prompts of {first.prompt_tokens} tokens, {new}; "
        f"median of {first.repetitions} runs after {first.warmup} thrown away; ± is the "
        "interquartile range. A speed-up is claimed only where it lies outside the spread of both "
        "measurements together, what their threads waited for processors that other work held, and "
        "how much a fixed piece of work changed in time between them."
    )
    header = ["Phase", "Before", "After", "Speed-up", "Verdict"]
    shown = table(
        "Time of a prefill (the whole prompt) and of a decoding step (one token each)",
        header,
        rows,
        numbers=(1, 2, 3),
    )
    said = [
        f"{name} at batch {' and '.join(batches)}: {reason}."
        for (name, reason), batches in reasons.items()
    ]
    why = [tag("h3", "Reasons and doubts"), listed(said)] if said else []
    return section("latency", title, shown, tag("p", conditions, class_="note"), *why)


def _time(result: object, phase: str) -> str:
    median, spread = (1e3 * getattr(result, name) for name in _SECONDS[phase])
    digits = 3 if median < 1 else 2 if median < 100 else 0
    return f"{median:,.{digits}f} ± {spread:,.{digits}f} ms"


def _ratio(phase: Speedup | None) -> str:
    return "–" if phase is None else f"{phase.ratio:.2f}× ± {100 * phase.spread:.0f} %"


def _verdict(phase: Speedup | None) -> str:
    if phase is None:
        return "nothing was cut"
    if not phase.measurable:
        return "no measurable difference"
    return "faster" if phase.ratio > 1 else "slower"
