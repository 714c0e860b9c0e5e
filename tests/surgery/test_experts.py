"""Experts leave: against a router whose cut logits are minus infinity, written out here."""

import copy

import pytest
import torch
from torch import nn

from lit_prune.decoder import DecoderParts, spec_for
from lit_prune.errors import PlanMismatchError, UnsupportedModelError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import apply_plan, masked, take_structure
from tests.models import MIXTURES, tiny_mixture, tiny_rows
from tests.state import state_digest, unchanged


def keeping(model, experts, *, gone=()):
    """A plan that keeps these experts in every mixture, all else, and no block of ``gone``."""
    spec = spec_for(model)
    layers = []
    for block, whole in zip(spec.blocks, PruningPlan.keep_all(spec).layers, strict=True):
        kept = tuple(experts) if block.mlp.unit == "expert" else whole.channels
        there = block.index not in gone
        layers.append(
            LayerPlan(block.index, whole.kv_groups if there else (), kept if there else ())
        )
    return PruningPlan(spec.fingerprint, tuple(layers))


def routed(model):
    parts = DecoderParts(model)
    return [found for i in range(len(parts.layers)) if (found := parts.routed(i)) is not None]


def by_minus_infinity(router, hidden, kept):
    """Weights and dense indices of the experts that each token is routed to."""
    bias = getattr(router, "bias", None)
    logits = nn.functional.linear(hidden, router.weight, bias)
    cut = [expert for expert in range(logits.shape[-1]) if expert not in kept]
    logits[:, cut] = -torch.inf
    weights, chosen = logits.softmax(-1).topk(router.top_k)
    # gpt-oss takes the softmax of the chosen logits: the same as normalising afterwards
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_masked_and_sliced_routers_choose_as_if_cut_logits_were_minus_infinity(family):
    model, kept = tiny_mixture(family), (0, 2, 3, 5)
    plan, hidden = keeping(model, kept), torch.randn(50, 32, generator=torch.manual_seed(1))
    wanted = [by_minus_infinity(found.router, hidden, kept) for found in routed(model)]
    with unchanged(model), masked(model, plan):
        for found, (weights, chosen) in zip(routed(model), wanted, strict=True):
            _, got, where = found.router(hidden)
            torch.testing.assert_close(got, weights, rtol=1e-5, atol=1e-6)
            assert torch.equal(where, chosen)
    apply_plan(model, plan)
    assert model.config.num_experts == model.num_experts == 4
    for found, (weights, chosen) in zip(routed(model), wanted, strict=True):
        _, got, where = found.router(hidden)
        torch.testing.assert_close(got, weights, rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.tensor(kept)[where], chosen)
        assert {len(p) for _, _, p in found.owned} == {4} == {found.bank.num_experts}


def test_fewer_experts_than_a_token_needs_are_refused_and_none_are_not():
    model = tiny_mixture("mixtral")
    with unchanged(model), pytest.raises(PlanMismatchError, match=r"keeps 1 of 6 experts.*to 2 of"):
        apply_plan(model, keeping(model, (3,)))
    apply_plan(model, keeping(model, (1, 3)))
    again = tiny_mixture("mixtral")
    plan = keeping(again, range(6))
    first = LayerPlan(0, plan.layers[0].kv_groups, ())
    apply_plan(again, PruningPlan(plan.model_fingerprint, (first, *plan.layers[1:])))
    assert spec_for(again).blocks[0].mlp is None


def test_a_mixture_that_contradicts_itself_is_refused():
    model = tiny_mixture("gpt_oss")
    model.model.layers[1].mlp.router.top_k = 7
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp contradicts.*top_k 7"):
        spec_for(model)
    del model.model.layers[1].mlp.router.top_k
    with pytest.raises(UnsupportedModelError, match="reads a number 'top_k'"):
        spec_for(model)


def test_which_layers_are_plain_is_counted_anew_when_blocks_leave():
    model = tiny_mixture("qwen2_moe")  # every second layer has experts: 1 and 3
    apply_plan(model, keeping(model, (0, 1, 4), gone=(1,)))
    assert [part.unit for _, part in spec_for(model).sub_blocks if part.kind == "mlp"] == [
        "channel",
        "channel",
        "expert",
    ]
    assert (model.config.mlp_only_layers, model.config.decoder_sparse_step) == ([0, 1], 1)
    rebuilt = type(model)(copy.deepcopy(model.config))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in rebuilt.named_parameters()} == shapes


@pytest.mark.parametrize("family", MIXTURES)
def test_the_load_balancing_loss_trains_what_is_left(family):
    model = tiny_mixture(family)
    apply_plan(model, keeping(model, (0, 1, 3, 5), gone=(0,)))
    ids = torch.stack(tiny_rows(4, 16))
    plain = model(input_ids=ids, labels=ids).loss
    with_balance = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert float(with_balance.aux_loss.detach()) > 0
    assert float(with_balance.loss.detach()) > float(plain.detach())
    with_balance.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert all(float(found.router.weight.grad.abs().sum()) > 0 for found in routed(model))


def test_a_dense_model_takes_the_structure_of_a_pruned_one():
    dense, pruned = tiny_mixture("qwen3_moe"), tiny_mixture("qwen3_moe")
    apply_plan(pruned, keeping(pruned, (1, 2, 4)))
    shapes = {name: tuple(p.shape) for name, p in pruned.named_parameters()}
    assert take_structure(dense, shapes)
    dense.load_state_dict(pruned.state_dict())
    assert state_digest(dense) == state_digest(pruned)
    of_one = (".mlp.experts.", ".mlp.gate.weight")
    few = {n: (1, *s[1:]) if any(part in n for part in of_one) else s for n, s in shapes.items()}
    with unchanged(pruned), pytest.raises(PlanMismatchError, match="1 experts there"):
        take_structure(pruned, few)
