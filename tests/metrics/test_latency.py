"""Latency with a clock of our own, on a real tiny model, and what a comparison may claim."""

import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch

from lit_prune.errors import ConfigError
from lit_prune.metrics import Latency, compare, measure_latency
from lit_prune.metrics.yardstick import Yardstick
from tests.measured import latency
from tests.models import tiny_model

PROMPT = torch.arange(3, 3 + 2 * 12).reshape(2, 12)


def script(*runs):
    """A clock for runs of (prefill, decode) seconds."""
    times = [0.0]
    for prefill, decode in runs:
        start = times[-1] + 100  # what happens between runs is not timed
        times += [start, start + prefill, start + prefill + decode]
    return iter(times[1:]).__next__


def result(**changes):
    return latency(**{"prefill_spread": 0.03, "decode_spread": 0.002, **changes})


def test_medians_spread_and_warmup():
    clock = script((50, 50), (50, 50), (1, 8), (2, 16), (3, 24), (4, 32), (99, 800))
    measured = measure_latency(
        tiny_model(), PROMPT, new_tokens=8, warmup=2, repetitions=5, clock=clock
    )
    assert measured.prefill_seconds == 3.0
    assert measured.prefill_spread == 2.0  # 4 - 2: one outlier does not widen it
    assert measured.decode_seconds_per_token == 3.0
    assert measured.prefill_tokens_per_second == 2 * 12 / 3
    assert measured.decode_tokens_per_second == 2 / 3
    assert (measured.batch_size, measured.prompt_tokens, measured.new_tokens) == (2, 12, 8)
    assert (measured.warmup, measured.repetitions, measured.dtype) == (2, 5, "float32")
    assert measured.device.startswith("cpu (")


def test_prefill_once_then_one_token_each_with_the_cache():
    model, calls = tiny_model(), []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kw: calls.append((kw["input_ids"].shape[1], kw.get("past_key_values"))),
        with_kwargs=True,
    )
    measure_latency(model, PROMPT, new_tokens=3, warmup=1, repetitions=3)
    handle.remove()
    assert [tokens for tokens, _ in calls] == [12, 1, 1, 1] * 4
    assert [cache is None for _, cache in calls] == [True, False, False, False] * 4


def test_decodes_the_tokens_that_generate_would():
    model, tokens = tiny_model(), []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kw: tokens.append(kw["input_ids"]), with_kwargs=True
    )
    measure_latency(model, PROMPT, new_tokens=5, warmup=0, repetitions=3)
    handle.remove()
    expected = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=-1,
    )
    assert torch.equal(torch.cat(tokens[1:6], dim=1), expected[:, 12:])


def test_measuring_changes_nothing():
    model = tiny_model().train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.random.get_rng_state()
    measured = measure_latency(model, PROMPT, new_tokens=2, repetitions=3)
    assert measured.prefill_seconds > 0
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_impossible_requests_are_refused():
    model = tiny_model()
    for options, message in (
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"new_tokens": 1, "warmup": -1}, "warmup must be at least 0"),
        ({"new_tokens": 1, "repetitions": 2}, "repetitions must be at least 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            measure_latency(model, PROMPT, **options)
    with pytest.raises(ConfigError, match="expected \\[batch, tokens\\]"):
        measure_latency(model, PROMPT[0], new_tokens=1)
    clock = itertools.repeat(1.0).__next__
    with pytest.raises(ConfigError, match="advanced no time"):
        measure_latency(model, PROMPT, new_tokens=1, clock=clock)


def test_a_model_without_a_cache_is_named(monkeypatch):
    model = tiny_model()
    forward = type(model).forward
    monkeypatch.setattr(model, "forward", lambda **kw: forward(model, **{**kw, "use_cache": False}))
    with pytest.raises(ConfigError, match="no KV cache"):
        measure_latency(model, PROMPT, new_tokens=1)


def test_metric_pools_merges_pickles_and_stays_float64():
    first, second = Latency(), Latency()
    first.update(1.0, 0.1)
    second.update(3.0, 0.3)
    second.update(5.0, 0.5)
    first.to(torch.bfloat16).merge_state(second)
    values = first.compute()
    assert values["prefill_seconds"] == 3.0
    assert values["decode_spread"].dtype == torch.float64
    assert pickle.loads(pickle.dumps(first)).compute() == values
    assert first.state_dict() == {}
    first.reset()
    with pytest.warns(UserWarning, match="before"), pytest.raises(ConfigError, match="update"):
        first.compute()


@pytest.mark.parametrize("after", [0.95, 0.97, 1.0, 1.05])
def test_inside_the_spread_nothing_is_claimed(after):
    comparison = compare(result(), result(prefill_seconds=after))
    assert not comparison.claim
    assert not comparison.prefill.measurable
    assert "no measurable difference" in comparison.prefill.words
    assert "lies inside the spread of ±" in comparison.prefill.words


def test_what_threads_waited_counts_as_spread():
    alone = result(waited=0.0)
    # 4 s in place of 1 s, 3.6 s of them waiting: without that 0.4 s, which would be faster
    crowded = compare(alone, result(prefill_seconds=4.0, waited=0.9)).prefill
    assert (crowded.ratio, crowded.measurable) == (0.25, False)
    # 2 s of them: 2 s are left, and slower
    slower = compare(alone, result(prefill_seconds=4.0, waited=0.5)).prefill
    assert slower.measurable
    assert slower.spread == pytest.approx((0.03 + 0.03 + 2) / 4)
    # the other way about nothing is claimed by waiting less
    assert not compare(result(prefill_seconds=4.0, waited=0.9), alone).claim
    unknown = compare(result(waited=None), result(waited=None))
    assert unknown.prefill.spread == pytest.approx(0.06)


def test_a_machine_that_changed_counts_as_spread():
    # the very products that a yardstick times took twice as long: so may an unchanged model
    before = result(yardstick_seconds=0.004)
    slower = compare(before, result(prefill_seconds=2.0, yardstick_seconds=0.008))
    assert (slower.prefill.ratio, slower.prefill.measurable) == (0.5, False)
    assert slower.prefill.spread == pytest.approx((0.03 + 0.03) / 2 + 0.5)
    assert slower.decode.spread == pytest.approx((0.002 + 0.002) / 0.1 + 0.5)
    # a machine that got twice as fast makes no model faster
    assert not compare(before, result(prefill_seconds=0.5, yardstick_seconds=0.002)).claim
    assert compare(before, result(prefill_seconds=0.5, yardstick_seconds=0.004)).claim
    # threads that waited are one more sight of the same load: not counted twice
    both = compare(before, result(prefill_seconds=2.0, yardstick_seconds=0.008, waited=0.4))
    assert both.prefill.spread == slower.prefill.spread
    # a measurement of an earlier version knows of none
    assert compare(result(), before).prefill.spread == pytest.approx(0.06)


def test_the_yardstick_is_timed_before_and_after_by_the_clock_on_the_wall(monkeypatch):
    times = iter([0.0, 9.0])  # the first run, which touches memory
    monkeypatch.setattr("lit_prune.metrics.yardstick.time.perf_counter", lambda: next(times))
    yardstick = Yardstick(torch.device("cpu"))
    for seconds in (1.0, 4.0):  # ten runs each
        times = itertools.chain.from_iterable((0.0, seconds) for _ in range(10))
        yardstick.run()
    assert yardstick.seconds() == 2.5
    monkeypatch.undo()
    clock = script(*[(1, 8)] * 3)
    found = measure_latency(
        tiny_model(), PROMPT, new_tokens=8, warmup=0, repetitions=3, clock=clock
    )
    assert 0 < found.yardstick_seconds < 100


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how long threads waited")
def test_other_work_on_the_same_processor_is_seen():
    model, here = tiny_model(), os.sched_getaffinity(0)
    processor = min(here)
    spinning = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{processor}])\nwhile 1: pass"]
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, [processor])
        measure_latency(model, PROMPT, new_tokens=64)  # until the other runs
        waited = measure_latency(model, PROMPT, new_tokens=64).waited
    finally:
        spinning.kill()
        spinning.wait()
        os.sched_setaffinity(0, here)
        torch.set_num_threads(threads)
    assert 0.2 < waited < 0.95  # two that want all of one processor: about a half each


def test_example_of_the_words():
    comparison = compare(result(prefill_seconds=1.03), result())
    assert comparison.prefill.words == (
        "prefill: no measurable difference: 1.03x lies inside the spread of ±6 %"
    )


def test_outside_the_spread_a_speedup_is_claimed():
    comparison = compare(result(), result(prefill_seconds=0.5, decode_seconds_per_token=0.05))
    assert comparison.claim
    assert comparison.prefill.ratio == comparison.decode.ratio == 2.0
    assert "prefill: faster: 2.00x" in comparison.words


def test_one_slower_phase_forbids_the_claim():
    comparison = compare(result(), result(prefill_seconds=0.5, decode_seconds_per_token=0.2))
    assert comparison.prefill.claim
    assert not comparison.claim
    assert "decode: slower: 0.50x" in comparison.words


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu (1 threads)"},
        {"dtype": "bfloat16"},
        {"batch_size": 2},
        {"prompt_tokens": 65},
        {"new_tokens": 9},
    ],
)
def test_different_settings_are_not_compared(change):
    with pytest.raises(ConfigError, match=f"different {next(iter(change))}"):
        compare(result(), result(**change))


@pytest.mark.gpu
def test_on_a_gpu_the_device_is_synchronised_and_named():
    model = tiny_model().cuda()
    measured = measure_latency(model, PROMPT, new_tokens=4)
    assert measured.device.startswith("cuda:0 (")
    assert measured.decode_seconds_per_token > 0
