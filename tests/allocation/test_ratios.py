import math
import random

import pytest

from lit_prune.allocation import block_ratios
from lit_prune.errors import BudgetError, ConfigError, ScoreError

MAPS = ("inverse", "softmax", "rank", "zscore")


def mean(ratios, weights):
    return math.fsum(p * w for p, w in zip(ratios, weights, strict=True)) / math.fsum(weights)


@pytest.mark.parametrize("ratio_map", MAPS)
@pytest.mark.parametrize("target", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_weighted_mean_is_the_target_and_the_limits_hold(ratio_map, target):
    rng = random.Random(f"{ratio_map} {target}")
    for _ in range(50):
        n = rng.randint(1, 40)
        entropy = [rng.lognormvariate(0, 2) for _ in range(n)]
        weights = [rng.randint(1, 10**9) for _ in range(n)]
        most = [rng.uniform(0.9, 1) for _ in range(n)]
        ratios = block_ratios(
            entropy, weights, min(target, 0.9), ratio_map=ratio_map, max_ratio=most
        )
        assert mean(ratios, weights) == pytest.approx(target, rel=1e-12, abs=1e-12)
        assert all(0 <= p <= m for p, m in zip(ratios, most, strict=True))


@pytest.mark.parametrize("ratio_map", MAPS)
def test_lower_transfer_entropy_gives_a_larger_ratio(ratio_map):
    rng = random.Random(1)
    entropy = sorted(rng.lognormvariate(0, 1) for _ in range(12))
    ratios = block_ratios(entropy, [1] * 12, 0.2, ratio_map=ratio_map)
    assert list(ratios) == sorted(ratios, reverse=True)
    assert ratios[0] > ratios[-1]


def test_softmax_is_the_formula_where_nothing_is_clipped():
    entropy = [1.0, 2.0, 4.0]
    mu, sd = 7 / 3, math.sqrt(sum((x - 7 / 3) ** 2 for x in entropy) / 3)
    raw = [math.exp(-(x - mu) / sd / 2.0) for x in entropy]
    expected = [0.2 * 3 * x / sum(raw) for x in raw]
    assert block_ratios(entropy, [5, 5, 5], 0.2, temperature=2.0) == pytest.approx(
        expected, rel=1e-12
    )


def test_the_excess_goes_to_the_open_blocks_in_proportion_to_their_shares():
    # Shares 1 : 1/2 : 1/4; block 0 is full at 0.5, the other 0.4 are shared 2 : 1.
    ratios = block_ratios(
        [1.0, 2.0, 4.0], [1, 1, 1], 0.3, ratio_map="inverse", max_ratio=[0.5, 1, 1]
    )
    assert ratios == pytest.approx([0.5, 0.8 / 3, 0.4 / 3], rel=1e-12)


def test_a_sharp_softmax_fills_blocks_one_after_the_other():
    ratios = block_ratios([3.0, 1.0, 2.0, 4.0], [1] * 4, 0.5, temperature=1e-3)
    assert ratios == pytest.approx([0, 1, 1, 0], abs=1e-6)
    assert mean(ratios, [1] * 4) == pytest.approx(0.5, rel=1e-12)


def test_a_block_without_parameters_takes_nothing_and_stops_nothing():
    ratios = block_ratios([1.0, 2.0, 3.0], [0, 1, 1], 0.5, temperature=1e-3)
    assert ratios == pytest.approx([0, 1, 0], abs=1e-12)
    assert block_ratios([1.0, 2.0], [0, 0], 0.0) == (0, 0)
    assert block_ratios([], [], 0.0) == ()


def test_a_protected_block_keeps_everything_and_does_not_level_the_others():
    with_outlier = block_ratios([1e6, 1.0, 2.0], [1, 1, 1], 0.2, max_ratio=[0, 1, 1])
    alone = block_ratios([1.0, 2.0], [1, 1], 0.3)
    assert with_outlier[0] == 0
    assert with_outlier[1:] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("ratio_map", ["rank", "zscore"])
def test_strength_zero_is_uniform(ratio_map):
    ratios = block_ratios([1.0, 5.0, 9.0], [1, 2, 3], 0.4, ratio_map=ratio_map, strength=0)
    assert ratios == pytest.approx([0.4] * 3, rel=1e-12)


@pytest.mark.parametrize("ratio_map", MAPS)
@pytest.mark.parametrize("value", [0.0, 3.0, 0.1, 1e-300])
def test_f19_constant_transfer_entropy_is_uniform(ratio_map, value):
    ratios = block_ratios([value] * 7, [1, 2, 3, 4, 5, 6, 7], 0.3, ratio_map=ratio_map)
    assert ratios == pytest.approx([0.3] * 7, rel=1e-12)


def test_f19_rounding_differences_are_constant():
    entropy = [0.3, 0.1 + 0.2, 0.3]
    assert block_ratios(entropy, [1] * 3, 0.3) == pytest.approx([0.3] * 3, rel=1e-12)


def test_f19_zero_transfer_entropy_does_not_divide():
    ratios = block_ratios([0.0, 1.0, 2.0], [1, 1, 1], 0.5, ratio_map="inverse")
    assert ratios[0] == 1
    assert mean(ratios, [1] * 3) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ratio_map", MAPS)
def test_f20_a_value_that_is_not_finite_is_refused_by_block(ratio_map, bad):
    with pytest.raises(ScoreError, match="transfer entropy of block 2 is"):
        block_ratios([1.0, 2.0, bad], [1, 1, 1], 0.3, ratio_map=ratio_map)


def test_f20_a_wrong_shape_is_refused():
    with pytest.raises(ScoreError, match=r"\(3,\), \(2,\)"):
        block_ratios([1.0, 2.0, 3.0], [1, 1], 0.3)


def test_a_negative_value_is_refused_only_where_it_is_inverted():
    with pytest.raises(ScoreError, match=r"block 0 is -1\.0; expected finite and >= 0"):
        block_ratios([-1.0, 2.0], [1, 1], 0.3, ratio_map="inverse")
    assert block_ratios([-1.0, 2.0], [1, 1], 0.3)[0] > 0.3


def test_f21_ties_share_and_the_order_of_blocks_does_not_matter():
    entropy = [2.0, 1.0, 2.0, 5.0, 1.0]
    for ratio_map in MAPS:
        ratios = block_ratios(entropy, [1] * 5, 0.3, ratio_map=ratio_map)
        assert ratios[0] == ratios[2]
        assert ratios[1] == ratios[4]
        backwards = block_ratios(entropy[::-1], [1] * 5, 0.3, ratio_map=ratio_map)
        assert backwards[::-1] == pytest.approx(ratios, rel=1e-12)


def test_more_than_the_blocks_can_give_is_refused_with_what_they_can():
    with pytest.raises(BudgetError, match=r"60\.00% .* at most 50\.00%"):
        block_ratios([1.0, 2.0], [1, 1], 0.6, max_ratio=[0, 1])


def test_exactly_what_the_blocks_can_give_is_given():
    assert block_ratios([1.0, 2.0], [1, 1], 0.5, max_ratio=[0, 1]) == pytest.approx((0, 1))
    assert block_ratios([1.0, 2.0, 9.0], [3, 1, 2], 1.0) == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_map": "linear"}, "ratio_map must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"strength": -1.0}, "strength must be non-negative"),
        ({"max_ratio": [1.0, 1.5]}, "max_ratio of block 1 is 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        block_ratios([1.0, 2.0], [1, 1], 0.3, **options)


@pytest.mark.parametrize("target", [-0.1, 1.5, math.nan])
def test_a_target_that_is_no_fraction_is_refused(target):
    with pytest.raises(ConfigError, match="target must be a fraction"):
        block_ratios([1.0, 2.0], [1, 1], target)
