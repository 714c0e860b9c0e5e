"""One threshold for all layers, and given ratios for each: by the words of their docstrings."""

import random

import numpy as np
import pytest

from lit_prune.allocation import Ranking, global_choice, make_budget, ratio_choice
from lit_prune.config import PruningConfig
from lit_prune.decoder import all_kept
from lit_prune.errors import BudgetError
from tests.allocation.specs import attention, decoder, mlp, random_decoder, random_request

UNITS = ("kv_group", "channel")
# Parameters of every unit where a test wants all units alike.
SIZE = 100


def equal_decoder(*shapes):
    """Layers of so many KV groups and channels, every unit of the same size."""
    return decoder(*((attention(g, unit=SIZE), mlp(c, unit=SIZE)) for g, c in shapes))


def budget_of(spec, units, **options):
    """A budget of exactly so many units of `SIZE`."""
    ratio = units * SIZE / spec.decoder_parameters
    options = {"granularities": UNITS, "compensation": "none", "channel_multiple": 1, **options}
    return make_budget(spec, PruningConfig(pruning_ratio=ratio, **options))


def random_scores(spec, seed):
    draw = np.random.default_rng(seed)
    return {(i, part.kind): draw.normal(size=part.num_units) for i, part in spec.sub_blocks}


def naive_global(spec, scores, units, *, least=1, protected=()):
    """Take the lowest of all units, one by one, from sub-blocks that may still lose one."""
    counts = all_kept(spec)
    everything = sorted((s, place, u) for place in scores for u, s in enumerate(scores[place]))
    for _, place, _ in everything:
        floor = least if place[1] == "attention" else 1
        if units and place[0] not in protected and counts[place] > floor:
            counts[place] -= 1
            units -= 1
    return counts


@pytest.mark.parametrize("seed", range(40))
def test_global_choice_takes_the_lowest_of_all_layers(seed):
    rng = random.Random(seed)
    spec = equal_decoder(*((rng.choice([1, 2, 4]), rng.choice([3, 8, 12])) for _ in range(4)))
    protected = (rng.randrange(4),) if rng.random() < 0.5 else ()
    least = rng.choice([1, 2])
    room = sum(
        max(0, n - (least if kind == "attention" else 1))
        for (layer, kind), n in all_kept(spec).items()
        if layer not in protected
    )
    units = rng.randint(1, room)
    scores = random_scores(spec, seed)
    budget = budget_of(spec, units, min_kv_groups=least, protected_layers=protected)
    counts = global_choice(budget, scores)
    assert counts == naive_global(spec, scores, units, least=least, protected=protected)


def test_global_choice_compares_kinds_and_layers_as_they_are():
    spec = equal_decoder((2, 4), (2, 4))
    scores = {
        (0, "attention"): np.array([5.0, 6.0]),
        (0, "mlp"): np.array([1.0, 9.0, 2.0, 9.0]),
        (1, "attention"): np.array([0.0, 7.0]),
        (1, "mlp"): np.array([8.0, 3.0, 8.0, 8.0]),
    }
    assert global_choice(budget_of(spec, 3), scores) == {
        (0, "attention"): 2, (0, "mlp"): 2, (1, "attention"): 1, (1, "mlp"): 4,
    }  # fmt: skip


def test_a_unit_counts_for_what_leaves_with_it():
    """A KV group of four times the size stands for four channels."""
    spec = decoder((attention(4, unit=4 * SIZE), mlp(12, unit=SIZE)))
    scores = {(0, "attention"): np.arange(4.0), (0, "mlp"): np.arange(12.0) + 0.5}
    # in turn: group 0 (4), channel 0 (1), group 1 (4), channel 1 (1)
    for units, groups, channels in ((4, 3, 12), (5, 3, 11), (9, 2, 11), (10, 2, 10)):
        counts = global_choice(budget_of(spec, units), scores)
        assert counts == {(0, "attention"): groups, (0, "mlp"): channels}


def test_the_last_units_of_a_sub_block_stay_whatever_their_scores():
    spec = equal_decoder((2, 4), (2, 4))
    scores = {place: np.full(n, float(place[0])) for place, n in all_kept(spec).items()}
    counts = global_choice(budget_of(spec, 6), scores)
    assert counts[0, "attention"] == counts[0, "mlp"] == 1  # 4 of layer 0, 2 of layer 1
    assert counts[1, "attention"] + counts[1, "mlp"] == 4


@pytest.mark.parametrize("seed", range(30))
def test_both_meet_any_request_or_refuse_it(seed):
    """Coarse multiples and units of other sizes: rounded to allowed counts, and settled."""
    rng = random.Random(seed)
    spec = random_decoder(rng, most_layers=5, channels=(8, 24, 48))
    config = random_request(rng, spec, granularities=UNITS)
    scores = random_scores(spec, seed)
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    ratios = [rng.random() for _ in spec.blocks]
    try:
        budget = make_budget(spec, config)
    except BudgetError:
        return
    for counts in (global_choice(budget, scores), ratio_choice(budget, ratios, ranking)):
        assert budget.met_by(counts)
        assert all(counts[place] in allowed for place, allowed in budget.allowed.items())
        assert all(counts.values())


@pytest.mark.parametrize("seed", range(20))
def test_ratio_choice_gives_each_layer_its_ratio(seed):
    """Where the ratios meet the budget as they are, nothing is settled."""
    rng = random.Random(seed)
    spec = equal_decoder(*((rng.choice([2, 4, 8]), rng.choice([8, 16, 24])) for _ in range(4)))
    ratios = [rng.choice([0.0, 0.125, 0.25, 0.4, 0.5, 0.66]) for _ in range(4)]
    wanted = {}
    for (layer, kind), units in all_kept(spec).items():
        wish = units * (1 - ratios[layer])
        near = min(range(1, units + 1), key=lambda n: abs(n - wish))
        wanted[layer, kind] = near
        if abs(abs(near - wish) - 0.5) < 1e-9:
            return  # halfway: either is as near
    lost = sum(all_kept(spec).values()) - sum(wanted.values())
    if not lost:
        return
    scores = random_scores(spec, seed)
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    assert ratio_choice(budget_of(spec, lost), ratios, ranking) == wanted


def test_ratio_choice_settles_what_the_ratios_leave():
    """Ratios that remove too little: the lowest-scored channels follow, wherever they are."""
    spec = equal_decoder((2, 10), (2, 10))
    scores = {(0, "attention"): np.ones(2), (1, "attention"): np.ones(2)}
    scores |= {(0, "mlp"): np.arange(10.0) + 100, (1, "mlp"): np.arange(10.0)}
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    counts = ratio_choice(budget_of(spec, 6), [0.2, 0.2], ranking)
    # 2 channels of each by ratio (no group: 1.6 of 2 is nearest to 2), then 2 more of layer 1
    assert counts == {
        (0, "attention"): 2, (0, "mlp"): 8, (1, "attention"): 2, (1, "mlp"): 6,
    }  # fmt: skip


def test_a_whole_layer_never_goes_by_its_ratio():
    spec = equal_decoder((2, 10), (2, 10))
    scores = random_scores(spec, 0)
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    counts = ratio_choice(budget_of(spec, 10), [1.0, 0.0], ranking)
    assert counts[0, "attention"] == counts[0, "mlp"] == 1
    assert counts[1, "attention"] == 2
