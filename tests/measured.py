"""Measurements as values, for tests of what is made of them."""

from dataclasses import replace

from lit_prune.metrics import LatencyResult


def latency(**changes):
    """A prefill of one second and steps of a tenth, with spreads of a hundredth of that."""
    base = LatencyResult(
        device="cpu (2 threads)",
        dtype="float32",
        batch_size=1,
        prompt_tokens=64,
        new_tokens=8,
        warmup=2,
        repetitions=7,
        prefill_seconds=1.0,
        prefill_spread=0.01,
        decode_seconds_per_token=0.1,
        decode_spread=0.001,
    )
    return replace(base, **changes)
