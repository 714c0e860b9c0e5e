"""What reads the stream, fitted: against regressions and distributions of the test's own."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from lit_prune.decoder import after_head, head_of, is_tied, scaled_norm, spec_for
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.sequential import sequential_compensation
from lit_prune.surgery import Compensation, apply_plan, masked
from tests.models import CONFIGS, tiny_classifier, tiny_model, tiny_rows
from tests.naive import captured, uneven_rows

ROWS = uneven_rows(60)
ALL = tuple(range(48))
LAYERS = (
    LayerPlan(0, (0, 1), tuple(range(24))),
    LayerPlan(1, (), tuple(range(5, 30))),
    LayerPlan(2, (1,), ALL),
)
# what is kept behind the first cut, in layer 0's MLP
BEHIND = {(1, "mlp"), (2, "attention"), (2, "mlp")}


def fitted(family="llama", task=None, **options):
    make = tiny_model if task is None else lambda *a, **o: tiny_classifier(task, *a, **o)
    model = make(family, layers=3, **options)
    plan = PruningPlan(spec_for(model).fingerprint, LAYERS)
    return model, plan, sequential_compensation(model, plan, ROWS)


def reads(model, side, plan=None, compensation=None):
    if plan is None:
        return captured(model, ROWS, side)["reads"]
    with masked(model, plan, compensation):
        return captured(model, ROWS, side)["reads"]


def regression(z, dense, damping):
    """Ridge through zero, towards the identity, from raw activations."""
    size = z.shape[1]
    noise = damping * float(z.square().mean())
    inputs = torch.cat([z / len(z) ** 0.5, noise**0.5 * torch.eye(size).double()])
    missing = torch.cat([(dense - z) / len(z) ** 0.5, torch.zeros(size, size).double()])
    return torch.eye(size).double() + torch.linalg.lstsq(inputs, missing).solution.T


@pytest.mark.parametrize("family", [*CONFIGS, "cohere"])
def test_what_is_read_is_nearer_to_what_was_read(family):
    model, plan, found = fitted(family)
    assert set(found.input_maps) <= BEHIND
    assert found.input_maps
    for side in ("calibrate", "choose"):
        # what a place reads does not depend on how it reads it
        dense, pruned = reads(model, side), reads(model, side, plan, found)
        for place, input_map in found.input_maps.items():
            z, wanted = pruned[place], dense[place]
            mapped = z @ input_map.double().T
            assert (mapped - wanted).square().sum() < (z - wanted).square().sum()


@pytest.mark.parametrize("place", sorted(BEHIND))
def test_a_map_is_the_regression_with_the_damping_that_was_chosen(place):
    model, plan, found = fitted(mlp_bias=True, attention_bias=True)
    z = reads(model, "calibrate", plan, found)[place]
    dense = reads(model, "calibrate")[place]
    damping = found.facts[f"layer {place[0]} {place[1]} inputs"]["damping"]
    wanted = regression(z, dense, damping).float()
    torch.testing.assert_close(found.input_maps[place], wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def final_states(model, side):
    states = [
        model.base_model(input_ids=row.ids[None], use_cache=False).last_hidden_state[0]
        for row in ROWS.side(side)
    ]
    return torch.cat(states).double()


def divergence(model, dense, pruned, side="calibrate"):
    """Mean KL of final states' distributions, nats per token."""
    head = head_of(model).weight.detach().double()
    one, other = ((x @ head.T).log_softmax(-1) for x in (dense, pruned))
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_the_head_reads_what_the_dense_one_would_and_is_as_sure_as_it_may_be():
    model, plan, found = fitted()
    scale, damping = found.facts["head"]["scale"], found.facts["head"]["damping"]
    assert found.head_map.shape == (32, 32)
    states = {}
    for side in ("calibrate", "choose"):
        with masked(model, plan, found):
            states[side] = final_states(model, side), final_states(model, side)
        states[side] = states[side][0], final_states(model, side)
    pruned, dense = states["calibrate"]
    wanted = scale * regression(pruned, dense, damping)
    torch.testing.assert_close(found.head_map, wanted.float(), rtol=1e-3, atol=1e-4)
    around = [
        divergence(model, dense, factor * pruned @ found.head_map.double().T)
        for factor in (0.93, 1.0, 1.07)
    ]
    assert around[1] == min(around)
    pruned, dense = states["choose"]
    plain = divergence(model, dense, pruned)
    assert divergence(model, dense, pruned @ found.head_map.double().T) < plain


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox"])  # norms: w, 1 + w, w and bias
def test_a_tied_head_is_only_less_sure_of_itself_and_the_embeddings_stay(family):
    model, plan, found = of_family(family, tie=True)
    assert is_tied(model)
    scale = found.facts["head"]["scale"]
    assert float(found.head_map) == pytest.approx(scale)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    ids = torch.stack(tiny_rows(3))
    with torch.no_grad(), masked(model, plan, replace(found, head_map=None)):
        plain = model(input_ids=ids).logits
    apply_plan(model, plan, found)
    assert is_tied(model)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    with torch.no_grad():
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, scale * plain, rtol=1e-4, atol=1e-4)


def of_family(family, **options):
    """Cut in every layer; KV groups where heads are not in groups, too."""
    heads = 4 if family in ("gpt_neox", "phi") else 2
    model = tiny_model(family, layers=3, kv_heads=heads, **options)
    kept = (1, 3) if heads == 4 else (1,)
    layers = (LayerPlan(0, kept, ALL[:24]), LayerPlan(1, kept, ALL[:30]), LayerPlan(2, kept, ALL))
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    return model, plan, sequential_compensation(model, plan, ROWS)


@torch.no_grad()
def log_probabilities(model):
    logits = [
        model(input_ids=row.ids[None], use_cache=False).logits[0] for row in ROWS.side("calibrate")
    ]
    return torch.cat(logits).double().log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("phi", {}),  # its head has a bias
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 0.7, "tie": True}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_the_factor_is_the_best_whatever_becomes_of_logits(family, options):
    model, plan, found = of_family(family, **options)
    dense, divergences = log_probabilities(model), []
    for factor in (0.93, 1.0, 1.07):
        with masked(model, plan, replace(found, head_map=factor * found.head_map)):
            said = log_probabilities(model)
        divergences.append(float((dense.exp() * (dense - said)).sum(-1).mean()))
    assert divergences[1] == min(divergences)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_surgery_folds_the_maps_into_weights(family, dtype, tie):
    model, plan, found = fitted(family, tie=tie)
    if dtype == torch.bfloat16:
        model = tiny_model(family, layers=3, tie=tie).to(dtype)
        found = sequential_compensation(model, plan, ROWS)
    assert found.input_maps
    shapes = {}
    for maps in (found, None):  # verified against the masked model, too
        other = tiny_model(family, layers=3, tie=tie).to(dtype)
        apply_plan(other, plan, maps)
        shapes[maps is None] = {
            name: p.shape for name, p in other.named_parameters() if "bias" not in name
        }
    assert shapes[True] == shapes[False]


class ScaledForCausalLM(LlamaForCausalLM):
    """Does more to its logits than any class of transformers says in its config."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 8
        return output


@pytest.mark.parametrize("tie", [True, False])
def test_a_head_is_left_alone_where_we_cannot_tell_what_becomes_of_its_logits(tie):
    model = tiny_model(layers=3, tie=tie)
    plan = PruningPlan(spec_for(model).fingerprint, LAYERS)
    model.__class__ = ScaledForCausalLM
    found = sequential_compensation(model, plan, ROWS)
    assert found.head_map is None
    assert found.input_maps


class Louder(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


def test_what_is_more_than_its_weight_keeps_it():
    """A projection of one's own class, one with another forward, a head: pruned all the same."""
    model = tiny_model(layers=3)
    model.lm_head.__class__ = Louder
    reader = model.model.layers[2].mlp.gate_proj
    plain = reader.forward
    reader.forward = lambda x: plain(x) + 0.5
    plan = PruningPlan(spec_for(model).fingerprint, LAYERS)
    found = sequential_compensation(model, plan, ROWS)
    assert found.head_map is None
    assert (2, "mlp") not in found.input_maps
    assert (2, "attention") in found.input_maps
    apply_plan(model, plan, found)


def test_hooks_of_the_user_on_a_tied_final_norm_stay_and_see_what_is_scaled():
    model = tiny_model(layers=3, tie=True)
    seen = []

    def more(_module, _args, output):
        assert output.ndim == 3
        seen.append(output)
        return output + 0.1

    model.model.norm.register_forward_hook(more)
    plan = PruningPlan(spec_for(model).fingerprint, LAYERS)
    found = sequential_compensation(model, plan, ROWS)
    assert found.head_map is not None
    apply_plan(model, plan, found)  # compared with the masked model
    assert seen


def test_gemma_norms_are_scaled_to_the_last_bit_of_half_precision():
    norm = tiny_model("gemma", layers=1).model.norm.to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.normal_(0, 0.05)
    wanted = 0.9 * (1 + norm.weight.detach().double()) - 1
    found = scaled_norm(norm, 0.9)["weight"]
    assert torch.equal(found.to(torch.bfloat16), wanted.to(torch.bfloat16))


def test_protected_layers_read_as_they_did():
    model = tiny_model(layers=3)
    plan = PruningPlan(spec_for(model).fingerprint, LAYERS)
    found = sequential_compensation(model, plan, ROWS, protected_layers=(2,))
    assert {layer for layer, _ in found.input_maps} == {1}


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_classifiers_keep_their_heads(task):
    _, _, found = fitted(task=task)
    assert found.head_map is None
    assert found.input_maps


@pytest.mark.parametrize("tie", [True, False])
def test_maps_are_saved_with_the_rest(tie, tmp_path):
    _, _, found = fitted(tie=tie)
    found.save(tmp_path / "compensation.safetensors")
    again = Compensation.load(tmp_path / "compensation.safetensors")
    assert again.tensors().keys() == found.tensors().keys()
    assert again.input_maps.keys() == found.input_maps.keys()
    for name, tensor in found.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_where_nothing_is_cut_nothing_is_read_otherwise():
    model = tiny_model(layers=2)
    found = sequential_compensation(model, PruningPlan.keep_all(spec_for(model)), ROWS)
    assert found.input_maps == {}
    assert found.head_map is None


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 3.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_logits_are_what_the_model_makes_of_its_head(family, options):
    model, ids = tiny_model(family, layers=2, **options), torch.stack(tiny_rows(2))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(
            after_head(head_of(model)(hidden), model), model(input_ids=ids).logits
        )


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gpt_neox", "olmo", "cohere"])
def test_a_scaled_norm_returns_so_many_times_as_much(family):
    model = tiny_model(family, layers=1, kv_heads=4 if family == "gpt_neox" else 2)
    norm = model.base_model.final_layer_norm if family == "gpt_neox" else model.model.norm
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    scaled = scaled_norm(norm, 0.7)
    if family == "olmo":  # has nothing to scale
        assert scaled == {}
        return
    torch.testing.assert_close(torch.func.functional_call(norm, scaled, (x,)), 0.7 * norm(x))
