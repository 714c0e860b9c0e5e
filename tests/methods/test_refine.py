"""Predictions corrected by measured divergences, on some that are known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_prune import PruningConfig, prune
from lit_prune.allocation import Ranking, make_budget
from lit_prune.decoder import all_kept, spec_for
from lit_prune.methods.conditional import _allocate
from lit_prune.methods.decision import Case
from lit_prune.methods.refine import refine
from tests.models import tiny_model

ROUNDS = 4


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def case_of(model, slopes, damage, rounds=ROUNDS):
    """A case that diverges by the true damage: the predicted one, times a slope by sub-block."""
    config = PruningConfig(pruning_ratio=0.4, allocator="joint", verify_rounds=rounds)
    budget = make_budget(spec_for(model), config)
    whole, asked = all_kept(budget.spec), []

    def diverges(kept, *, fitted=False):
        asked.append(fitted)
        gone = {place: whole[place] - len(units) for place, units in kept.items()}
        return 1 + sum(slopes[place] * float(damage[place][cut]) for place, cut in gone.items())

    ranks = {place: np.arange(units, dtype=float) for place, units in whole.items()}
    ranking = Ranking(ranks, dict.fromkeys(ranks, 1))
    return (
        Case(model=model, calibration=None, budget=budget, judge=None, diverges=diverges),
        ranking,
        asked,
    )


def problem(model, seed):
    generator = torch.Generator().manual_seed(seed)
    damage, slopes = {}, {}
    for place, units in all_kept(spec_for(model)).items():
        steps = torch.rand(units, generator=generator, dtype=torch.float64).sort().values
        damage[place] = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        slopes[place] = float(torch.rand(1, generator=generator)) * 4 + 0.2
    return damage, slopes


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_what_the_true_slopes_would_have_given(model, seed):
    damage, slopes = problem(model, seed)
    case, ranking, _ = case_of(model, slopes, damage)

    def allocate(draft):
        return _allocate(case, draft, ranking)[0]

    def loss(counts):
        return case.diverges({p: ranking.kept(p, n) for p, n in counts.items()})

    first = allocate(damage)
    true = allocate({place: curve * slopes[place] for place, curve in damage.items()})
    found, rounds = refine(case, damage, first, ranking, allocate)
    losses = [entry["kl_on_choose_text"] for entry in rounds]
    assert loss(found) == pytest.approx(min(losses), rel=1e-12)
    assert loss(found) <= loss(first)
    # every slope is within the trusted range, so one round measures it exactly
    assert loss(found) == pytest.approx(loss(true), rel=1e-9)
    assert loss(true) < loss(first)  # or the test could not fail


def test_a_round_that_does_not_help_is_the_last_and_is_not_taken(model):
    damage, _ = problem(model, 0)
    slopes = dict.fromkeys(damage, 1.0)  # the prediction is right already
    case, ranking, asked = case_of(model, slopes, damage)
    first = _allocate(case, damage, ranking)[0]
    found, rounds = refine(
        case, damage, first, ranking, lambda draft: _allocate(case, draft, ranking)[0]
    )
    assert found == first
    assert len(rounds) == 2
    assert asked.count(False) <= 1 + len(damage)
    assert asked.count(True) <= 1 + 2


def test_what_is_better_as_a_draft_alone_is_not_taken(model):
    """The fit makes up for more in one plan than in another: what counts is what comes out."""
    damage, slopes = problem(model, 0)
    case, ranking, _ = case_of(model, slopes, damage)
    first = _allocate(case, damage, ranking)[0]
    fitted_first = {place: ranking.kept(place, count) for place, count in first.items()}

    def diverges(kept, *, fitted=False):
        return float(kept != fitted_first) if fitted else case.diverges(kept)

    found, rounds = refine(
        replace(case, diverges=diverges),
        damage, first, ranking, lambda draft: _allocate(case, draft, ranking)[0],
    )  # fmt: skip
    assert found == first
    assert [entry["kl_on_choose_text"] for entry in rounds] == [0, 1]


def test_a_pruning_is_never_worse_on_the_choose_text_for_it(model):
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 64, (4, 24))} for _ in range(16)]
    options = {"pruning_ratio": 0.4, "dry_run": True, "latency_prompt_tokens": 0}
    result = prune(model, batches, verify_rounds=2, **options)
    rounds = [x["kl_on_choose_text"] for x in result.plan.provenance["method"]["verified"]]
    assert abs(result.report.achieved_ratio - 0.4) <= 0.005
    assert len(rounds) >= 2
    again = prune(model, batches, verify_rounds=2, **options)
    assert again.plan == result.plan
    assert rounds[0] > 0
    assert not any(search["optimal"] for search in again.report.search["searches"]) or (
        rounds == sorted(rounds)  # nothing better was found, so the search's own plan stayed
    )
