"""The joint search with sizes that depend on neighbours, against every combination."""

import random

import pytest

from lit_prune.allocation import coupled_search
from lit_prune.decoder import all_kept
from lit_prune.errors import BudgetError
from tests.allocation.specs import (
    attention,
    decoder,
    mlp,
    naive_counts,
    plain_budget,
    random_request,
    small_case,
)


def random_damage(rng, spec):
    """Rising from nothing; now and then several removals cost the same."""
    damage = {}
    for place, units in all_kept(spec).items():
        steps = [rng.choice([0.0, rng.random(), rng.random() * 5]) for _ in range(units)]
        damage[place] = [sum(steps[:n]) for n in range(units + 1)]
    return damage


def cost_of(damage, spec, counts):
    whole = all_kept(spec)
    return sum(damage[place][whole[place] - kept] for place, kept in counts.items())


def cheapest(budget, damage, slack):
    """The least cost of all combinations that remove something and fit; None where none does."""
    costs = [
        cost_of(damage, budget.spec, counts)
        for counts in naive_counts(budget.spec, budget.config, budget.channel_multiple)
        if abs(budget.deficit(counts)) <= slack and budget.removed(counts) > 0
    ]
    return min(costs, default=None)


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("seed", range(150))
def test_it_is_the_cheapest_of_all_that_fit(seed, parallel):
    budget, rng = small_case(seed, parallel=parallel), random.Random(seed)
    spec = budget.spec
    damage = random_damage(rng, spec)
    slack = rng.choice([0, 0.002, 0.01, 0.05]) * budget.cost.total
    wanted = cheapest(budget, damage, slack)
    found = coupled_search(budget, damage, slack=slack, node_limit=200_000)
    if wanted is None:
        assert found is None
        return
    assert found.optimal
    assert found.cost == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert found.cost == pytest.approx(cost_of(damage, spec, found.counts), rel=1e-9)
    assert found.bound == found.cost
    assert abs(budget.deficit(found.counts)) <= slack


def test_a_plan_that_needs_fewer_biases_may_be_the_best():
    """Of two whole MLPs that may go, the one behind a cut attention needs no new bias."""
    spec = decoder((attention(4), mlp(2)), (attention(4), mlp(2)), hidden=40)
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        config = random_request(
            rng, spec, compensation="mean", removed_mean="add", protected_layers=(),
            granularities=("sub_block", "kv_group"),
        )  # fmt: skip
        budget = plain_budget(spec, config)
        damage = random_damage(rng, spec)
        selection = coupled_search(budget, damage, slack=40, node_limit=200_000)
        if selection is None:
            continue
        counts, whole = selection.counts, all_kept(spec)
        alone = sum(budget.removed({**whole, p: n}) for p, n in counts.items())
        found += alone != budget.removed(counts)
    assert found  # or sizes simply added up


def test_a_limit_on_nodes_leaves_a_bound_that_is_one():
    limited = 0
    for seed in range(40):
        budget = small_case(seed)
        damage = random_damage(random.Random(seed), budget.spec)
        slack = 0.02 * budget.cost.total
        wanted = cheapest(budget, damage, slack)
        try:
            found = coupled_search(budget, damage, slack=slack, node_limit=2)
        except BudgetError:
            limited += 1
            continue
        if found is None:
            assert wanted is None
            continue
        limited += not found.optimal
        assert found.bound <= wanted * (1 + 1e-9)
        assert found.cost >= wanted * (1 - 1e-9)
        assert found.optimal == (found.cost <= found.bound * (1 + 1e-9))
    assert limited
