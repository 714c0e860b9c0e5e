"""Pruning mixtures of experts end to end: which experts leave, what is refused, what is counted."""

import pytest
import torch

from lit_prune.allocation import cost_of, make_budget, refuse_impossible
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import BudgetError, ConfigError, UnsupportedModelError
from lit_prune.methods import PRESETS
from lit_prune.metrics import footprint_of
from lit_prune.pruner import prune
from tests.models import MIXTURES, batches_of, tiny_mixture, tiny_rows
from tests.state import counted_forwards, unchanged

DEAD = (1, 4)
QUICK = {"latency_prompt_tokens": 0, "progress": False, "min_calibration_tokens": 16}


def run(model, ratio, **options):
    batches = batches_of(tiny_rows(32, 16))
    return prune(model, batches, pruning_ratio=ratio, **{**QUICK, **options})


def with_dead_experts(family):
    """Two of six experts that no token ever chooses.

    The others' rows come in pairs of opposite sign, so that two logits are always positive; those
    of the dead are zero.
    """
    model = tiny_mixture(family, **({"mlp_only_layers": []} if "qwen" in family else {}))
    alive = [expert for expert in range(6) if expert not in DEAD]
    for layer in model.model.layers:
        router = layer.mlp.gate.weight.data
        router[alive[1::2]] = -router[alive[::2]]
        router[list(DEAD)] = 0
    return model


def share_of(model, experts):
    """What so many experts of each mixture are of the decoder's parameters."""
    spec = spec_for(model)
    units = [part.unit_parameters for _, part in spec.sub_blocks if part.unit == "expert"]
    return experts * sum(units) / spec.decoder_parameters


@torch.no_grad()
@pytest.mark.parametrize("preset", ["conditional", "paper", "flap", "random"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_no_token_is_routed_to_are_the_ones_that_leave(family, preset):
    model, ids = with_dead_experts(family), torch.stack(tiny_rows(6, 20, seed=9))
    before = model(input_ids=ids).logits
    extra = {"num_clusters": 2} if preset == "paper" else {}
    result = run(
        model, share_of(model, 2), preset=preset, granularities=["expert"],
        compensation="none", **extra,
    )  # fmt: skip
    if preset == "random":  # the control
        assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-2)
        return
    for layer in result.plan.layers:
        assert layer.channels == tuple(expert for expert in range(6) if expert not in DEAD)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    if preset == "conditional":
        assert result.report.search["predicted_damage"] == 0


@pytest.mark.parametrize("preset", ["conditional", "paper"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_all_granularities_meet_the_ratio_and_leave_enough_experts(family, preset):
    model = tiny_mixture(family)
    result = run(model, 0.3, preset=preset, channel_multiple=1)
    assert abs(result.report.achieved_ratio - 0.3) <= 0.005
    assert result.report.achieved_ratio == pytest.approx(
        1 - spec_for(model).decoder_parameters / spec_for(tiny_mixture(family)).decoder_parameters
    )
    for block in spec_for(model).blocks:
        assert block.mlp is None or block.mlp.unit == "channel" or block.mlp.num_experts >= 2
    assert any("does not reach experts" in warning for warning in result.report.warnings)


@pytest.mark.parametrize("allocator", ["joint", "uniform_widths"])
def test_least_experts_bound_what_can_be_reached_before_any_forward(allocator):
    model = tiny_mixture("mixtral")
    with counted_forwards(model) as calls, unchanged(model):
        with pytest.raises(BudgetError, match="cannot be reached"):
            run(model, share_of(model, 5), granularities=["expert"], allocator=allocator)
        refuse = PruningConfig(pruning_ratio=0.3, granularities=["channel"], allocator="joint")
        with pytest.raises(BudgetError, match=r"lie in \[0, 0.0000\]"):
            refuse_impossible(model, refuse)
    assert not calls
    budget = make_budget(
        spec_for(model), PruningConfig(pruning_ratio=0.3, allocator="joint", compensation="none")
    )
    assert budget.allowed[0, "mlp"] == (0, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_has_a_rule_for_experts_or_is_refused_by_name(preset):
    model = tiny_mixture("mixtral")
    knows = {
        "conditional", "paper", "flap", "flap_ls", "random", "magnitude",
        "sleb", "blockpruner", "shortgpt", "layerdrop",
    }  # fmt: skip
    if preset in knows:
        ratio = 0.25 if "expert" not in PRESETS[preset].granularities else share_of(model, 2)
        assert run(model, ratio, preset=preset).report.achieved_ratio > 0.2
        return
    refused = pytest.raises(UnsupportedModelError, match=f"preset '{preset}' has no rule for exp")
    with counted_forwards(model) as calls, unchanged(model), refused:
        run(model, 0.3, preset=preset)
    assert not calls


def test_what_has_no_meaning_for_experts_is_refused_before_any_forward():
    model = tiny_mixture("mixtral")
    with counted_forwards(model) as calls:
        with unchanged(model), pytest.raises(UnsupportedModelError, match="no table for experts"):
            run(model, 0.3, budget="latency", latency_prompt_tokens=8)
        with unchanged(model), pytest.raises(UnsupportedModelError, match="'gradient' has no rule"):
            run(model, 0.3, preset="paper", unit_score="gradient")
        model.config.output_router_logits = True
        with unchanged(model), pytest.raises(ConfigError, match="wants one number of experts"):
            run(model, 0.3)
    assert not calls
    run(model, share_of(model, 2), granularities=["expert"], allocator="uniform_widths")
    ids = torch.stack(tiny_rows(2, 12))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("unit_score", ["entropy", "fluctuation", "random"])
def test_controls_of_conditional_order_experts_too(unit_score):
    model = with_dead_experts("mixtral")
    result = run(
        model, share_of(model, 2), unit_score=unit_score, granularities=["expert"],
        sensitivity="none",
    )  # fmt: skip
    alive = tuple(expert for expert in range(6) if expert not in DEAD)
    found = {layer.channels == alive for layer in result.plan.layers}
    assert found == {True} or unit_score == "random"


@pytest.mark.parametrize("family", MIXTURES)
def test_costs_are_what_a_recount_finds_and_removed_experts_save_no_flops_but_their_rows(family):
    model = tiny_mixture(family)
    dense, spec = footprint_of(model, context_length=128), spec_for(model)
    for budget, field in (("flops", "flops_per_token"), ("weight_bytes", "decoder_weight_bytes")):
        config = PruningConfig(pruning_ratio=0.1, budget=budget)
        cost = cost_of(model, config)
        context = config.prompt_tokens(128)
        wanted = footprint_of(model, context_length=context)
        assert cost.total == getattr(wanted, field)
    mixtures = sum(part.unit == "expert" for _, part in spec.sub_blocks)
    run(model, share_of(model, 2), granularities=["expert"], allocator="uniform_widths")
    after = footprint_of(model, context_length=128)
    assert dense.flops_per_token - after.flops_per_token == mixtures * 2 * 2 * spec.hidden_size
    assert after.decoder_parameters == spec_for(model).decoder_parameters
