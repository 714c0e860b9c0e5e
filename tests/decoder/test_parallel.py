"""Layers that add attention and MLP together: where constants live, whose the norm is."""

import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_prune.calibration import Row, RowSet, replay
from lit_prune.config import RATIO_TOLERANCE
from lit_prune.decoder import (
    LEADING,
    DecoderParts,
    Family,
    all_kept,
    register_family,
    remainder,
    spec_for,
)
from lit_prune.errors import SurgeryError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.pruner import prune
from lit_prune.saving import save_pruned
from lit_prune.surgery import apply_plan, masked, mean_compensation
from lit_prune.testing import check_family
from tests.models import batches_of, tiny_model, tiny_rows
from tests.state import unchanged

ATTENTION, MLP = "attention", "mlp"
IN_PLACE = {"parallel_attn": True, "multi_query": False, "kv_heads": 4}
FAMILIES_TRIED = [
    ("phi", {}),
    ("cohere", {}),
    ("stablelm", {"use_parallel_residual": True}),
    ("falcon", IN_PLACE),
]
# What goes, and which output bias receives the constants of what: the other half of the layer, in
# either order; where both go, the last half that stays before; where there is none, layer 0.
HOLDERS = [
    ({(1, ATTENTION)}, {(1, MLP): [(1, ATTENTION)]}),
    ({(1, MLP)}, {(1, ATTENTION): [(1, MLP)]}),
    ({(0, ATTENTION)}, {(0, MLP): [(0, ATTENTION)]}),
    ({(1, ATTENTION), (1, MLP)}, {(0, MLP): [(1, ATTENTION), (1, MLP)]}),
    ({(0, MLP), (1, ATTENTION), (1, MLP)}, {(0, ATTENTION): [(0, MLP), (1, ATTENTION), (1, MLP)]}),
    ({(0, ATTENTION), (0, MLP)}, {LEADING: [(0, ATTENTION), (0, MLP)]}),
    (
        {(0, ATTENTION), (0, MLP), (1, ATTENTION)},
        {LEADING: [(0, ATTENTION), (0, MLP)], (1, MLP): [(1, ATTENTION)]},
    ),
]


def plan_without(spec, gone):
    layers = tuple(
        LayerPlan(
            layer.index,
            () if (layer.index, ATTENTION) in gone else layer.kv_groups,
            () if (layer.index, MLP) in gone else layer.channels,
        )
        for layer in PruningPlan.keep_all(spec).layers
    )
    return PruningPlan(spec.fingerprint, layers)


def means_of(model, plan):
    units = replay(model, RowSet.of(Row.of(row) for row in tiny_rows(8))).units
    return mean_compensation(model, plan, units)


@pytest.mark.parametrize(("gone", "holders"), HOLDERS)
@pytest.mark.parametrize(("family", "options"), FAMILIES_TRIED)
def test_a_constant_lives_where_it_is_added_at_the_same_time(family, options, gone, holders):
    model = tiny_model(family, layers=3, **options)
    spec = spec_for(model)
    counts = all_kept(spec) | dict.fromkeys(gone, 0)
    left = remainder(spec, counts, gone)
    assert {place: sorted(held) for place, held in left.holders.items()} == holders
    plan = plan_without(spec, gone)
    made, ids = means_of(model, plan), tiny_rows(1)[0][None]
    with torch.no_grad():
        with masked(model, plan, made):
            wanted = model(ids).logits
        apply_plan(model, plan, made, verify=False)
        assert (model(ids).logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert spec_for(model).decoder_parameters == left.num_parameters


def test_the_rule_of_layers_that_add_one_after_the_other_would_be_wrong(monkeypatch):
    """The mean of an attention, in the bias of the layer before: this layer's MLP reads it."""
    model = tiny_model("phi", layers=3)
    plan = plan_without(spec_for(model), {(1, ATTENTION)})
    made = means_of(model, plan)
    monkeypatch.setattr(
        "lit_prune.surgery.slicing.remainder",
        lambda spec, *rest: remainder(with_field(spec, parallel=False), *rest),
    )
    with unchanged(model), pytest.raises(SurgeryError, match="does not compute what the plan"):
        apply_plan(model, plan, made)


def with_field(spec, **changes):
    return type(spec)(**{n: getattr(spec, n) for n in type(spec).__dataclass_fields__} | changes)


@pytest.mark.parametrize(("family", "options"), FAMILIES_TRIED)
def test_the_norm_leaves_with_the_last_of_its_two_readers_and_is_counted_once(family, options):
    model = tiny_model(family, layers=3, **options)
    spec = spec_for(model)
    size = sum(p.numel() for p in DecoderParts(model).layers[0].input_layernorm.parameters())
    assert [block.shared_parameters for block in spec.blocks] == [size] * 3
    apply_plan(model, plan_without(spec, {(0, ATTENTION), (1, MLP)}))
    norms = [layer.input_layernorm for layer in DecoderParts(model).layers]
    assert not any(isinstance(norm, nn.Identity) for norm in norms)
    again = spec_for(model)
    assert [block.shared_parameters for block in again.blocks] == [0, 0, size]
    # now it is one reader's own
    assert again.blocks[0].mlp.fixed_parameters == spec.blocks[0].mlp.fixed_parameters + size
    plan = plan_without(again, {(0, MLP)})
    apply_plan(model, plan, means_of(model, plan))  # layer 0 holds a constant, and nothing else
    assert isinstance(DecoderParts(model).layers[0].input_layernorm, nn.Identity)
    assert spec_for(model).blocks[0].num_parameters == spec.hidden_size


@pytest.mark.parametrize(
    ("family", "preset", "ratio"),
    [
        ("phi", "paper", 0.3),
        ("phi", "flap", 0.3),
        ("phi", "sleb", 1 / 3),
        ("cohere", "llm_pruner", 0.3),
        ("cohere", "shortgpt", 1 / 3),
        ("falcon", "dsa", 0.3),
        ("falcon", "slimgpt", 0.3),
    ],
)
def test_other_presets_prune_and_plain_transformers_load_it(family, preset, ratio, tmp_path):
    model = tiny_model(family, layers=6, **(IN_PLACE if family == "falcon" else {}))
    options = {"preset": preset, "latency_prompt_tokens": 0, "progress": False}
    result = prune(model, batches_of(tiny_rows(30, 20), 6), pruning_ratio=ratio, **options)
    assert abs(result.report.achieved_ratio - ratio) <= RATIO_TOLERANCE
    path = save_pruned(model, tmp_path / "saved", verify=False)
    loaded, ids = AutoModelForCausalLM.from_pretrained(path), tiny_rows(1)[0][None]
    with torch.no_grad():
        wanted, got = model(ids).logits, loaded(ids).logits
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


# ---- two norms that read one stream ----


class TwoNorms(nn.Module):
    """A layer of Llama's parts in the order of GPT-NeoX."""

    def __init__(self, layer):
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(self, hidden_states, **others):
        attention = self.self_attn(self.input_layernorm(hidden_states), **others)[0]
        return self.mlp(self.post_attention_layernorm(hidden_states)) + attention + hidden_states


@pytest.fixture
def two_norms(registry):
    def make(**entry):
        model = tiny_model("llama", layers=3)
        model.config.model_type = "two_norms"
        model.model.layers = nn.ModuleList(TwoNorms(layer) for layer in model.model.layers)
        register_family(Family(model_type="two_norms", **entry))
        return model

    return make


def test_two_norms_that_read_one_stream_pass_the_contract(two_norms):
    model = two_norms(parallel=True)
    spec = spec_for(model)
    assert spec.parallel
    assert not any(block.shared_parameters for block in spec.blocks)
    assert check_family(model).constants


def test_where_the_entry_does_not_say_so_surgery_finds_it(two_norms):
    model = two_norms()
    plan = plan_without(spec_for(model), {(1, ATTENTION)})
    with unchanged(model), pytest.raises(SurgeryError, match="does not compute what the plan"):
        apply_plan(model, plan, means_of(model, plan))


@pytest.mark.parametrize("kept", list(itertools.product((0, 1), repeat=4)))
def test_every_half_of_two_layers_can_go(kept):
    model = tiny_model("cohere2", layers=3, sliding_window=8)
    places = itertools.product((0, 1), (ATTENTION, MLP))
    gone = {place for place, stays in zip(places, kept, strict=True) if not stays}
    plan = plan_without(spec_for(model), gone)
    apply_plan(model, plan, means_of(model, plan))  # compares with the masked model
    assert len(DecoderParts(model).places()) == 2 + sum(kept)
