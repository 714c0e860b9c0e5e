import itertools
import random
import time

import pytest

from lit_prune.allocation import reachable, reachable_totals
from lit_prune.errors import ConfigError


def all_sums(options):
    return {sum(choice) for choice in itertools.product(*options)}


@pytest.mark.parametrize("seed", range(100))
def test_equals_brute_force(seed):
    rng = random.Random(seed)
    step = rng.choice([1, 3, 64])
    options = [
        [rng.randint(0, 40) * step for _ in range(rng.randint(1, 4))]
        for _ in range(rng.randint(1, 6))
    ]
    target, tolerance = rng.randint(0, 200) * step, rng.randint(0, 3)
    sums = all_sums(options)
    below = max((s for s in sums if s <= target), default=None)
    above = min((s for s in sums if s >= target), default=None)
    near = any(abs(s - target) <= tolerance for s in sums)
    assert reachable_totals(options, target, tolerance, 1000) == (below, above, near)


def test_attention_limit_equals_brute_force():
    rng = random.Random(0)
    for _ in range(100):
        options = [
            [(0, 0), *((rng.randint(0, 30), rng.randint(0, 1)) for _ in range(3))]
            for _ in range(rng.randint(1, 5))
        ]
        most, below, above = rng.randint(0, 4), rng.randint(0, 80), rng.randint(0, 80)
        sums = {
            sum(size for size, _ in choice)
            for choice in itertools.product(*options)
            if sum(count for _, count in choice) <= most
        }
        found = reachable.nearest_totals(options, below=below, above=above, total=200, most=most)
        assert found == (
            max((s for s in sums if s <= below), default=None),
            min((s for s in sums if s >= above), default=None),
        )


@pytest.mark.parametrize("seed", range(20))
def test_in_buckets_the_totals_are_still_real_and_near(seed, monkeypatch):
    monkeypatch.setattr(reachable, "_EXACT_BIT_OPERATIONS", 0)
    rng = random.Random(seed)
    options = [[0, *(rng.randint(1, 10**6) for _ in range(3))] for _ in range(6)]
    total = sum(max(choice) for choice in options)
    sums, target = all_sums(options), total // 3
    below, above, _ = reachable_totals(options, target, 0, total)
    assert below in sums
    assert above in sums
    assert below <= target <= above
    error = 2 * len(options) * total // 20_000
    assert max(s for s in sums if s <= target) - below <= error
    assert above - min(s for s in sums if s >= target) <= error


def test_outside_the_range_one_side_is_none():
    assert reachable_totals([[5, 8]], 3, 1, 10) == (None, 5, False)
    assert reachable_totals([[5, 8]], 12, 4, 20) == (8, None, True)
    assert reachable_totals([], 0, 0, 0) == (0, 0, True)


def test_a_70b_model_with_all_granularities_is_decided_within_seconds():
    attention = [g * 18_874_368 for g in range(9)]
    mlp = [c * 3 * 8192 for c in range(0, 28673, 64)]
    total = 80 * (attention[-1] + mlp[-1] + 2 * 8192)
    began = time.perf_counter()
    options, target = [attention, mlp] * 80, int(0.3 * total)
    below, above, near = reachable_totals(options, target, total // 1000, total)
    assert near
    assert below <= target <= above
    assert time.perf_counter() - began < 20  # about 1 s; generous for a busy machine


@pytest.mark.parametrize("options", [[[]], [[1, -1]]])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match="at least one option"):
        reachable_totals(options, 1, 1, 1)
