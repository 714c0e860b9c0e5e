"""What a plan says of the model before, and of the prices that its method went by."""

import json

import pytest

from lit_prune import PruningPlan, prune, spec_for
from lit_prune.methods import sizes_of
from tests.models import batches_of, tiny_model, tiny_rows

BATCHES = batches_of(tiny_rows(30), 6)


def planned(**options):
    model = tiny_model()
    options = {"pruning_ratio": 0.3, "dry_run": True, "latency_prompt_tokens": 0, **options}
    return prune(model, BATCHES, progress=False, **options)


@pytest.fixture(scope="module")
def predicted():
    return planned(preset="conditional")


def test_the_plan_says_what_there_was(predicted):
    assert predicted.plan.provenance["sizes"] == sizes_of(spec_for(tiny_model()))
    assert predicted.plan.provenance["sizes"]["mlp"] == [48] * 4


def test_predicted_damage_is_there_for_every_part(predicted):
    prices = predicted.plan.provenance["prices"]
    assert (prices["measure"], prices["unit"]) == ("predicted damage", "nats per token")
    for kind, units in (("attention", 2), ("mlp", 16)):  # at most 16 steps of 48 channels
        for layer, curve in enumerate(prices["curves"][kind]):
            assert len(curve) == units + 1
            assert curve[0] == 0
            assert curve[-1] == prices["whole"][kind][layer]
            assert curve == sorted(curve)
            assert 0 <= prices["cut"][kind][layer] <= curve[-1]
    total = sum(sum(prices["cut"][kind]) for kind in ("attention", "mlp"))
    assert total == pytest.approx(predicted.report.search["predicted_damage"], rel=1e-3)
    assert PruningPlan.from_json(predicted.plan.to_json()).provenance["prices"] == prices


def test_transfer_entropy_stands_in_where_a_preset_measures_it():
    result = planned(preset="paper")
    prices = result.plan.provenance["prices"]
    assert prices["measure"] == "transfer entropy"
    for unit, value in result.scores.transfer.items():
        assert prices["whole"][unit.kind][unit.layer] == pytest.approx(value, rel=1e-3)
    assert "curves" not in prices


def test_a_preset_that_prices_units_only_has_none():
    plan = planned(preset="magnitude").plan
    assert plan.provenance["prices"] == {}
    assert "weight norm" in plan.provenance["rule"]
    json.dumps(plan.provenance, allow_nan=False)
