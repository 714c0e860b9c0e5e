import math
import random

import numpy as np
import pytest

from lit_prune.allocation import Ranking, make_budget, meet, settle
from lit_prune.config import PruningConfig
from lit_prune.decoder import all_kept
from lit_prune.errors import BudgetError, ScoreError
from tests.allocation.specs import attention, decoder, mlp, random_decoder, random_request


def ranking_for(spec, rng):
    scores = {
        (index, part.kind): np.array([rng.random() for _ in range(part.num_units)])
        for index, part in spec.sub_blocks
    }
    return Ranking(scores, {(index, part.kind): part.unit_width for index, part in spec.sub_blocks})


SPEC = decoder(*[(attention(4, unit=200), mlp(24))] * 4)


def test_the_lowest_scores_leave_first_and_ties_go_by_index():
    ranking = Ranking({(0, "mlp"): np.array([2.0, 1.0, 2.0, 0.5, 1.0])}, {(0, "mlp"): 1})
    kept = [ranking.kept((0, "mlp"), count) for count in range(6)]
    # 3 (0.5), then 1 before 4 (1.0), then 0 before 2 (2.0)
    assert kept == [(), (2,), (0, 2), (0, 2, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4)]
    assert ranking.step_score((0, "mlp"), 5, 3) == pytest.approx((0.5 + 1.0) / 2)


def test_f21_equal_scores_leave_from_the_front():
    ranking = Ranking({(0, "mlp"): np.zeros(6)}, {(0, "mlp"): 1})
    assert ranking.kept((0, "mlp"), 2) == (4, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_f20_a_score_that_is_not_finite_never_ranks(bad):
    with pytest.raises(ScoreError, match=r"score of unit 2 of layer 1 mlp is"):
        Ranking({(1, "mlp"): np.array([1.0, 2.0, bad])}, {(1, "mlp"): 1})


def test_a_step_of_a_group_counts_for_each_column():
    scores = {(0, "attention"): np.array([8.0, 16.0]), (0, "mlp"): np.array([1.5, 3.0])}
    ranking = Ranking(scores, {(0, "attention"): 8, (0, "mlp"): 1})
    assert ranking.step_score((0, "attention"), 2, 1) == 1.0
    assert ranking.step_score((0, "mlp"), 2, 1) == 1.5


@pytest.mark.parametrize("seed", range(30))
def test_settling_never_moves_away_and_meets_fine_requests(seed):
    rng = random.Random(seed)
    ratio = rng.choice([0.1, 0.3, 0.5])
    config = PruningConfig(pruning_ratio=ratio, channel_multiple=1)
    budget = make_budget(SPEC, config)
    start = {place: rng.choice(allowed) for place, allowed in budget.allowed.items()}
    start[0, "attention"] = 4
    before = dict(start)
    found = settle(budget, start, ranking_for(SPEC, rng))
    assert start == before
    assert abs(budget.deficit(found)) <= abs(budget.deficit(start))
    assert all(found[place] in allowed for place, allowed in budget.allowed.items())
    again = settle(budget, found, ranking_for(SPEC, rng))
    assert abs(budget.deficit(again)) == abs(budget.deficit(found))


def test_removing_takes_the_lowest_channels_of_all_layers():
    budget = make_budget(
        SPEC, PruningConfig(pruning_ratio=0.02, channel_multiple=1, compensation="none")
    )
    scores = {(i, p.kind): np.full(p.num_units, 9.0) for i, p in SPEC.sub_blocks}
    scores[2, "mlp"][5] = 1.0
    scores[3, "mlp"][7:9] = 2.0
    ranking = Ranking(scores, {(i, p.kind): p.unit_width for i, p in SPEC.sub_blocks})
    found = settle(budget, all_kept(SPEC), ranking)
    assert found[2, "mlp"] == 23
    assert found[3, "mlp"] == 22
    assert sum(24 - found[layer, "mlp"] for layer in range(4)) == 3


def test_restoring_gives_back_the_highest_first_and_reopens_last():
    budget = make_budget(
        SPEC, PruningConfig(pruning_ratio=0.3, channel_multiple=1, compensation="none")
    )
    counts = all_kept(SPEC) | {(0, "mlp"): 0, (1, "mlp"): 4, (2, "mlp"): 4}
    scores = {(i, p.kind): np.arange(p.num_units, dtype=float) for i, p in SPEC.sub_blocks}
    scores[2, "mlp"] += 100
    ranking = Ranking(scores, {(i, p.kind): p.unit_width for i, p in SPEC.sub_blocks})
    found = settle(budget, counts, ranking)
    assert budget.met_by(found)
    assert found[0, "mlp"] == 0
    assert found[2, "mlp"] > found[1, "mlp"]


def test_half_of_a_removed_block_does_not_come_back():
    config = PruningConfig(
        pruning_ratio=0.2, channel_multiple=1, granularities=["block", "channel", "kv_group"]
    )
    budget = make_budget(SPEC, config)
    counts = all_kept(SPEC) | {(1, "mlp"): 0, (1, "attention"): 0}
    found = settle(budget, counts, ranking_for(SPEC, random.Random(0)))
    assert {found[1, "mlp"], found[1, "attention"]} == {0}


@pytest.mark.parametrize("seed", range(60))
def test_whatever_passes_the_pre_flight_can_be_met(seed):
    rng = random.Random(seed)
    spec = random_decoder(rng, most_layers=5, channels=(1, 7, 24, 48))
    config = random_request(rng, spec, allocator="depth_first")
    try:
        budget = make_budget(spec, config)
    except BudgetError:
        return
    start = {place: rng.choice(allowed) for place, allowed in budget.allowed.items()}
    found = meet(budget, start)
    assert budget.met_by(found)
    assert all(found[place] in allowed for place, allowed in budget.allowed.items())
    assert any(count for (_, kind), count in found.items() if kind == "attention")
    if "sub_block" not in config.granularities:
        for block in spec.blocks:
            assert len({bool(found[block.index, part.kind]) for part in block.sub_blocks}) == 1
