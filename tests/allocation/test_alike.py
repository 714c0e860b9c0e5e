"""Equal widths in all layers, depth free."""

from itertools import product

import numpy as np
import pytest

from lit_prune.allocation import alike_choice, make_budget
from lit_prune.config import PruningConfig
from lit_prune.decoder import all_kept
from lit_prune.errors import BudgetError
from tests.allocation.specs import attention, decoder, mlp, plain_budget

SPEC = decoder(*[(attention(4), mlp(12)) for _ in range(4)])


def request(ratio, **options):
    return PruningConfig(
        pruning_ratio=ratio,
        allocator="uniform_widths",
        channel_multiple=1,
        compensation="none",  # with it, which blocks go changes the size by a bias
        add_biases=True,  # as it is resolved
        **options,
    )


def random_damage(seed):
    rng = np.random.default_rng(seed)
    return {
        place: [0.0, *np.cumsum(rng.random(units)).tolist()]
        for place, units in all_kept(SPEC).items()
    }


def exhaustive(budget, damage):
    """Every pair of widths with every subset of blocks."""
    whole, best = all_kept(SPEC), None
    for groups, channels, gone in product(
        range(1, 5), range(1, 13), product([False, True], repeat=4)
    ):
        counts = {
            (layer, kind): 0 if gone[layer] else groups if kind == "attention" else channels
            for layer, kind in whole
        }
        if all(gone) or not budget.met_by(counts):
            continue
        cost = sum(damage[place][whole[place] - count] for place, count in counts.items())
        best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_cheapest_of_all_equal_widths(ratio, seed):
    budget, damage = plain_budget(SPEC, request(ratio)), random_damage(seed)
    wanted = exhaustive(budget, damage)
    if wanted is None:  # known before any damage is
        with pytest.raises(BudgetError, match="by equal widths in all layers: the nearest are"):
            make_budget(SPEC, request(ratio))
        return
    assert make_budget(SPEC, request(ratio)) == budget
    counts, cost = alike_choice(budget, damage)
    assert cost == pytest.approx(wanted, rel=1e-12)
    assert budget.met_by(counts)
    for kind in ("attention", "mlp"):
        assert len({n for (_, k), n in counts.items() if k == kind and n}) == 1


def test_without_the_granularity_no_block_goes():
    layer = SPEC.blocks[0]
    ratio = (120 + 3 * 48) / layer.num_parameters  # one KV group and three channels
    budget = make_budget(SPEC, request(ratio, granularities=("kv_group", "channel")))
    counts, _ = alike_choice(budget, random_damage(0))
    assert all(counts.values())
