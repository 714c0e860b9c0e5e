import itertools
import math
import random

import numpy as np
import pytest

from lit_prune.allocation import joint
from lit_prune.allocation.joint import JointSelection, Level, joint_search
from lit_prune.allocation.joint_problem import best_multipliers
from lit_prune.allocation.joint_tables import SuffixTables
from lit_prune.errors import BudgetError, ConfigError, ScoreError

SIZES = {
    "equal": lambda rng, i: i * 5,
    "small": lambda rng, i: rng.randint(0, 6),
    "random": lambda rng, i: rng.randint(0, 99),
    "large": lambda rng, i: rng.randint(0, 10**9),
    "nearly": lambda rng, i: i * 4_194_304 + rng.choice([0, 0, 4096]),
}
COSTS = {
    "convex": lambda rng, i: i**2 * 0.1,
    "random": lambda rng, i: rng.random(),
    "falling": lambda rng, i: 2.0 - 0.2 * i + 0.1 * rng.random(),
    "duplicates": lambda rng, i: rng.choice([0.0, 0.25, 0.5, 1.0]),
    "scales": lambda rng, i: 10 ** rng.uniform(-9, 3),
}


def random_places(rng, sizes, costs, *, number=5, levels=6):
    places = []
    for _ in range(rng.randint(1, number)):
        made = [
            Level(
                size=SIZES[sizes](rng, i),
                cost=COSTS[costs](rng, i),
                attention=rng.choice([0, 0, 1, 1, 3]) if rng.random() < 0.5 else 0,
            )
            for i in range(rng.randint(1, levels))
        ]
        places.append(made + rng.choices(made, k=rng.choice([0, 0, 1])))
    return places


def random_window(rng, places):
    top = sum(max(level.size for level in levels) for levels in places)
    minimum = int(top * rng.uniform(-0.1, 1.05))
    return minimum, minimum + int(top * rng.choice([0, 0.005, 0.05, 0.3, 1.0]))


def exhaustive(places, minimum, maximum, limit):
    best = None
    for choice in itertools.product(*places):
        fits = minimum <= sum(level.size for level in choice) <= maximum
        if fits and (limit is None or sum(level.attention for level in choice) <= limit):
            cost = math.fsum(level.cost for level in choice)
            best = cost if best is None else min(best, cost)
    return best


def knapsack(places, minimum, maximum, limit):
    """Naive dynamic programming: least cost for each (total attention, total size)."""
    best = np.full((limit + 1, maximum + 1), np.inf)
    best[0, 0] = 0.0
    for levels in places:
        longer = np.full_like(best, np.inf)
        for level in levels:
            for lost in range(limit + 1 - level.attention):
                row = best[lost, : max(maximum + 1 - level.size, 0)] + level.cost
                target = longer[lost + level.attention, level.size :]
                np.minimum(target, row, out=target)
        best = longer
    return best[:, max(minimum, 0) :].min()


def check(found, places, minimum, maximum, limit):
    levels = [levels[i] for levels, i in zip(places, found.chosen, strict=True)]
    assert found.size == sum(level.size for level in levels)
    assert found.cost == math.fsum(level.cost for level in levels)
    assert minimum <= found.size <= maximum
    assert limit is None or sum(level.attention for level in levels) <= limit
    assert found.bound <= found.cost


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_exhaustive_search(sizes, costs):
    rng = random.Random(f"{sizes} {costs}")
    infeasible = 0
    for _ in range(16):
        places = random_places(rng, sizes, costs)
        minimum, maximum = random_window(rng, places)
        limit = rng.choice([None, 0, 1, 2, 4])
        best = exhaustive(places, minimum, maximum, limit)
        found = joint_search(places, minimum=minimum, maximum=maximum, attention_limit=limit)
        if best is None:
            infeasible += 1
            assert found is None
            continue
        check(found, places, minimum, maximum, limit)
        assert found.optimal
        assert found.bound == found.cost
        assert found.cost == pytest.approx(best, rel=2e-9, abs=0)
    assert infeasible < 16


@pytest.mark.parametrize("coarse", [1, 7])
@pytest.mark.parametrize("sizes", SIZES)
def test_coarse_tables_cost_nodes_but_no_exactness(sizes, coarse, monkeypatch):
    from lit_prune.allocation import joint_tables

    monkeypatch.setattr(joint_tables, "_FEWEST_BUCKETS", coarse)
    for name in ("_FIRST_CELLS", "_CELLS", "_MOST_CELLS", "_FIRST_NODES"):
        monkeypatch.setattr(joint, name, 1)
    rng = random.Random(sizes)
    for _ in range(40):
        places = random_places(rng, sizes, rng.choice([*COSTS]))
        minimum, maximum = random_window(rng, places)
        limit = rng.choice([None, 0, 1, 2, 4])
        best = exhaustive(places, minimum, maximum, limit)
        found = joint_search(places, minimum=minimum, maximum=maximum, attention_limit=limit)
        assert (found is None) == (best is None)
        if found is not None:
            assert found.optimal
            assert found.cost == pytest.approx(best, rel=2e-9, abs=0)


CURVES = {
    "convex": lambda rng, x: x ** rng.uniform(1.3, 3),
    "concave": lambda rng, x: x**0.5,
    "linear": lambda rng, x: x,
    "noisy": lambda rng, x: x ** rng.uniform(0.7, 3) * np.exp(0.5 * rng.normal(size=len(x))),
    "random": lambda rng, x: rng.random(len(x)),
}


def large_places(seed, curve, *, number=64, levels, size):
    """Every second place is an attention, whose last level removes it."""
    rng = np.random.default_rng(seed)
    places = []
    for place in range(number):
        x = np.arange(levels) / (levels - 1)
        costs = rng.lognormal() * CURVES[curve](rng, x) * (x > 0)
        sizes = [size(rng, n) for n in range(levels)]
        lost = [int(place % 2 == 0 and n == levels - 1) for n in range(levels)]
        triples = zip(sizes, costs.tolist(), lost, strict=True)
        places.append([Level(size=s, cost=c, attention=a) for s, c, a in triples])
    return places


def window(places, ratio, tolerance):
    top = sum(max(level.size for level in levels) for levels in places)
    return {"minimum": int(top * (ratio - tolerance)), "maximum": int(top * (ratio + tolerance))}


@pytest.mark.parametrize("limit", [None, 0, 3])
@pytest.mark.parametrize("curve", CURVES)
def test_equals_dynamic_programming(curve, limit):
    for ratio, tolerance in ((0.2, 0.0001), (0.5, 0.005)):
        places = large_places(
            1, curve, levels=24, size=lambda rng, n: n * 5 + int(rng.integers(0, 5)) * (n > 0)
        )
        span = window(places, ratio, tolerance)
        found = joint_search(places, **span, attention_limit=limit)
        check(found, places, *span.values(), limit)
        assert found.optimal
        if limit is None:  # the reference needs none of its rows
            places = [[Level(size=x.size, cost=x.cost) for x in levels] for levels in places]
        assert found.cost == pytest.approx(knapsack(places, *span.values(), limit or 0), rel=2e-9)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("curve", CURVES)
def test_equals_dynamic_programming_at_real_sizes(curve, limit):
    channels = 64 * 12_288
    places = large_places(0, curve, levels=256, size=lambda rng, n: n * channels)
    span = window(places, 0.3, 0.001)
    found = joint_search(places, **span, attention_limit=limit)
    in_units = [
        [
            Level(size=x.size // channels, cost=x.cost, attention=x.attention * bool(limit))
            for x in levels
        ]
        for levels in places
    ]
    low, high = -(-span["minimum"] // channels), span["maximum"] // channels
    assert found.optimal
    assert found.cost == pytest.approx(knapsack(in_units, low, high, limit or 0), rel=2e-9)


def real_model(seed, curve):
    """32 layers: attentions of 8 KV groups, MLPs in steps of 64 channels; the last frees a norm."""
    attention = large_places(
        seed, curve, levels=9, size=lambda rng, n: n * 8_388_608 + 4096 * (n == 8)
    )
    mlp = large_places(
        seed + 1, curve, levels=172, size=lambda rng, n: n * 64 * 12_288 + 4096 * (n == 171)
    )
    return [*itertools.chain(*zip(attention[::2], mlp[1::2], strict=True))]


@pytest.mark.parametrize("curve", CURVES)
def test_real_sizes_are_proven_within_few_nodes(curve):
    places = real_model(0, curve)
    for ratio, tolerance, limit in ((0.3, 0.001, None), (0.5, 0.005, 4), (0.5, 0.001, 31)):
        span = window(places, ratio, tolerance)
        found = joint_search(places, **span, attention_limit=limit)
        check(found, places, *span.values(), limit)
        assert found.optimal
        assert found.nodes < 50_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("curve", CURVES)
def test_sizes_without_a_common_divisor_are_proven_or_nearly(curve, seed):
    places = large_places(
        seed, curve, levels=256, size=lambda rng, n: int(rng.integers(0, 2 * 10**8)) * (n > 0)
    )
    for ratio, tolerance, limit in ((0.3, 0.001, None), (0.5, 0.005, 4), (0.5, 0.001, 31)):
        span = window(places, ratio, tolerance)
        found = joint_search(places, **span, attention_limit=limit)
        check(found, places, *span.values(), limit)
        assert found.bound >= found.cost * 0.98


def test_few_places_with_thousands_of_levels():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 10**9, size=(2, 3000))
    costs = rng.random((2, 3000)) * sizes / 10**9
    places = [
        [Level(size=s, cost=c) for s, c in zip(*pair, strict=True)]
        for pair in zip(sizes.tolist(), costs.tolist(), strict=True)
    ]
    span = window(places, 0.6, 0.001)
    total = sizes[0][:, None] + sizes[1]
    fits = (total >= span["minimum"]) & (total <= span["maximum"])
    best = (costs[0][:, None] + costs[1])[fits].min()
    found = joint_search(places, **span)
    assert found.optimal
    assert found.cost == pytest.approx(best, rel=2e-9)
    found = joint_search([*places, places[0]], **window([*places, places[0]], 0.4, 0.001))
    assert found.optimal
    assert found.nodes < 5000


def test_one_place_is_a_look_up():
    levels = [
        Level(size=10 * n, cost=abs(n - 50) + 1.0, attention=32 * (n > 90)) for n in range(99)
    ]
    assert joint_search([levels], minimum=600, maximum=650).chosen == (60,)
    assert joint_search([levels], minimum=300, maximum=350).chosen == (35,)
    assert joint_search([levels], minimum=301, maximum=309) is None
    assert joint_search([levels], minimum=910, maximum=950, attention_limit=31) is None
    assert joint_search([levels], minimum=910, maximum=950, attention_limit=32).chosen == (91,)


def test_a_larger_level_may_be_cheaper_and_still_too_large():
    levels = [Level(size=0, cost=5.0), Level(size=4, cost=3.0), Level(size=9, cost=0.0)]
    assert joint_search([levels] * 2, minimum=0, maximum=100).chosen == (2, 2)
    assert joint_search([levels] * 2, minimum=0, maximum=17).cost == 3.0
    assert joint_search([levels] * 2, minimum=0, maximum=12).cost == 5.0
    assert joint_search([levels] * 2, minimum=1, maximum=8).cost == 6.0


def test_a_node_limit_returns_the_best_so_far_with_its_bound(monkeypatch):
    for name in ("_FIRST_CELLS", "_CELLS", "_MOST_CELLS"):
        monkeypatch.setattr(joint, name, 1)
    monkeypatch.setattr(joint, "_FIRST_NODES", 40)
    places = large_places(
        3, "noisy", number=12, levels=20, size=lambda rng, n: n * 50 + int(rng.integers(0, 40))
    )
    span = window(places, 0.4, 0.002)
    places = [[Level(size=x.size, cost=x.cost) for x in levels] for levels in places]
    best, gaps = knapsack(places, *span.values(), 0), []
    for node_limit in (40, 100, 300, 1000, 100_000):
        found = joint_search(places, **span, node_limit=node_limit)
        check(found, places, *span.values(), None)
        assert found.nodes <= node_limit
        assert found.bound <= best * (1 + 1e-12)
        assert best <= found.cost * (1 + 2e-9)
        gaps.append(found.cost - found.bound)
        assert found.optimal == (gaps[-1] == 0)
    assert gaps[0] > 0
    assert gaps[-1] == 0


def test_a_node_limit_without_a_selection_is_said():
    places = [[Level(size=0, cost=0.0), Level(size=n, cost=1.0)] for n in (3, 5, 7)]
    with pytest.raises(BudgetError, match="found within 0 search nodes that frees 7 to 8"):
        joint_search(places, minimum=7, maximum=8, node_limit=0)


def test_ties_permutations_are_not_searched():
    places = [[Level(size=10 * n, cost=0.1 * n) for n in range(8)] for _ in range(60)]
    found = joint_search(places, minimum=2095, maximum=2105)
    assert found.optimal
    assert found.cost == pytest.approx(21.0)
    assert found.nodes <= 61


def test_the_result_depends_on_the_arguments_alone():
    rng = random.Random(5)
    places = random_places(rng, "small", "random", number=9, levels=9)
    minimum = sum(max(level.size for level in levels) for levels in places) // 2
    first = joint_search(places, minimum=minimum, maximum=minimum + 2)
    assert joint_search(places, minimum=minimum, maximum=minimum + 2) == first
    for _ in range(5):
        mixed = [rng.sample(levels, len(levels)) for levels in places]
        found = joint_search(mixed, minimum=minimum, maximum=minimum + 2)
        levels = [own[i] for own, i in zip(mixed, found.chosen, strict=True)]
        assert levels == [own[i] for own, i in zip(places, first.chosen, strict=True)]


def test_of_equal_levels_the_first_is_chosen():
    levels = [Level(size=5, cost=2.0), Level(size=5, cost=1.0), Level(size=5, cost=1.0)]
    assert joint_search([levels, levels], minimum=10, maximum=10).chosen == (1, 1)


def test_a_hopeless_level_does_not_blur_the_proof():
    # Its cost is 1e15 times the optimum: bounds that were lowered by what it may round to would
    # prove nothing.
    places = [[Level(size=n, cost=1e-6 * n) for n in range(9)] for _ in range(30)]
    places[0].append(Level(size=9, cost=1e9))
    found = joint_search(places, minimum=120, maximum=121)
    assert found.optimal
    assert found.nodes <= 100


def test_no_places():
    nothing = JointSelection(chosen=(), cost=0.0, size=0, optimal=True, bound=0.0, nodes=0)
    assert joint_search([], minimum=-1, maximum=0) == nothing
    assert joint_search([], minimum=1, maximum=2) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_f20_a_cost_that_cannot_be_ranked_is_refused_by_name(bad):
    good = [Level(size=1, cost=1.0)]
    places = [good, [*good, Level(size=2, cost=bad)]]
    with pytest.raises(ScoreError, match=r"cost of level 1 of place 1 is .*expected finite and >="):
        joint_search(places, minimum=1, maximum=5)


def test_what_cannot_be_meant_is_refused():
    good = [Level(size=1, cost=1.0)]
    with pytest.raises(ConfigError, match="maximum must not be below minimum, got 2 and 3"):
        joint_search([good], minimum=3, maximum=2)
    with pytest.raises(ConfigError, match="place 1 has no level"):
        joint_search([good, []], minimum=1, maximum=2)
    with pytest.raises(ConfigError, match=r"level 0 of place 1: expected a size .* got -5 and 0"):
        joint_search([good, [Level(size=-5, cost=1.0)]], minimum=1, maximum=2)
    with pytest.raises(ConfigError, match=r"level 0 of place 0: .* got 5 and -1"):
        joint_search([[Level(size=5, cost=1.0, attention=-1)]], minimum=1, maximum=2)


@pytest.mark.parametrize("sizes", ["random", "large", "nearly"])
@pytest.mark.parametrize("cells", [1, 200, 1 << 20])
def test_bounds_never_exceed_the_best_completion(sizes, cells, monkeypatch):
    from lit_prune.allocation import joint_tables

    monkeypatch.setattr(joint_tables, "_FEWEST_BUCKETS", 3)
    rng, proven = random.Random(f"{sizes} {cells}"), 0
    for _ in range(60):
        places = random_places(rng, sizes, rng.choice([*COSTS]), levels=5)
        minimum, maximum = random_window(rng, places)
        problem = joint._problem(places, minimum, maximum, rng.choice([None, 0, 1, 2]))
        if problem is None:
            continue
        prices = best_multipliers(problem)
        if prices.size_price < 0:
            problem, prices = problem.mirrored(), prices.mirrored()
        number = len(problem.start)
        triples = zip(
            problem.size.tolist(), problem.cost.tolist(), problem.attention.tolist(), strict=True
        )
        own = [Level(size=size, cost=cost, attention=lost) for size, cost, lost in triples]
        own = [[own[i] for i in np.flatnonzero(problem.place == place)] for place in range(number)]
        order = rng.sample(range(number), number)
        tables = SuffixTables(problem, order, price=prices.size_price, cells=cells, work=1e9)
        for depth in range(number + 1):
            above = [rng.choice(own[place]) for place in order[:depth]]
            size, lost = sum(x.size for x in above), sum(x.attention for x in above)
            bound = tables.completion(depth, np.array([size]), np.array([lost])).item()
            rest = [own[place] for place in order[depth:]]
            best = exhaustive(rest, problem.low - size, problem.high - size, problem.limit - lost)
            if best is not None:
                assert bound <= best * (1 + 1e-12)
                proven += bound > 0.99 * best
        lagrangian = prices.bounds(problem)
        for level in range(len(problem.place)):
            place, rest = problem.place[level], list(own)
            rest[place] = [x for i, x in enumerate(own[place]) if problem.start[place] + i == level]
            best = exhaustive(rest, problem.low, problem.high, problem.limit)
            assert best is None or lagrangian[level] <= best * (1 + 1e-12)
    assert proven > 20
