"""Surgery against the masked dense model, over families, shapes, and what else can be odd."""

import copy
import gc
import random
import weakref

import pytest
import torch
from torch import nn

from lit_prune.calibration import Row, RowSet, replay
from lit_prune.decoder import ConstantOutput, find_causal_lm, remainder, spec_for
from lit_prune.errors import PlanMismatchError, SurgeryError, UnsupportedModelError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import (
    Compensation,
    StagedEdits,
    apply,
    apply_plan,
    compare,
    masked,
    mean_compensation,
    stage,
    unit_columns,
    weights_digest,
)
from tests.models import CONFIGS, padded_batch, tiny_model, tiny_rows
from tests.state import num_hooks, recount, state_digest, unchanged


def plan_for(model, layers):
    """A plan from ``[(kept KV groups, kept channels)]``; None keeps all."""
    spec, made = spec_for(model), []
    for block, (groups, channels) in zip(spec.blocks, layers, strict=True):
        attention = range(block.attention.num_units if block.attention else 0)
        mlp = range(block.mlp.num_units if block.mlp else 0)
        made.append(
            LayerPlan(
                block.index,
                tuple(attention) if groups is None else tuple(groups),
                tuple(mlp) if channels is None else tuple(channels),
            )
        )
    return PruningPlan(spec.fingerprint, tuple(made))


def random_plan(rng, model):
    """Each sub-block is removed, kept whole, or keeps a random subset; one attention stays."""

    def some(part):
        if part is None:
            return ()
        drawn = rng.random()
        if drawn < 0.3:
            return ()
        count = part.num_units if drawn < 0.5 else rng.randint(1, part.num_units)
        return sorted(rng.sample(range(part.num_units), count))

    blocks = spec_for(model).blocks
    while True:
        layers = [(some(block.attention), some(block.mlp)) for block in blocks]
        if any(groups for groups, _ in layers):
            return plan_for(model, layers)


def odd_model(rng, family, kv_heads):
    """A tiny model with whatever its config class allows to differ."""
    odd = {"layers": rng.choice([1, 2, 4]), "tie": rng.random() < 0.5}
    if family in ("llama", "qwen3"):
        odd["attention_bias"] = rng.random() < 0.5
    if family == "llama":
        odd["mlp_bias"] = rng.random() < 0.5
    if family in ("qwen2", "qwen3") and rng.random() < 0.5:
        odd.update(use_sliding_window=True, sliding_window=8, max_window_layers=rng.choice([0, 1]))
    if family == "mistral":
        odd["sliding_window"] = rng.choice([None, 8])
    if rng.random() < 0.5:
        odd.update(hidden_size=40, intermediate_size=37)  # no power of two; head_dim stays 8
    if family != "qwen2" and rng.random() < 0.5:
        odd["head_dim"] = 6  # not hidden_size / heads
    return tiny_model(family, kv_heads=kv_heads, seed=rng.randint(0, 99), **odd)


def check_surgery(rng, model):
    """Prune at random; logits, generation, gradients and sizes must be the masked model's."""
    spec = spec_for(model)
    rows = RowSet.of(Row.of(ids) for ids in tiny_rows(8))
    plan = random_plan(rng, model)
    removed_mean = rng.choice(["add", "drop", None])
    compensation = None
    if removed_mean:
        units = replay(model, rows).units
        compensation = mean_compensation(model, plan, units, removed_mean=removed_mean)
    ids = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(1))
    batch = padded_batch(tiny_rows(3, 12, uneven=True), side="left")
    counts = {
        (i, part.kind): len(
            plan.layers[i].kv_groups if part.kind == "attention" else plan.layers[i].channels
        )
        for i, part in spec.sub_blocks
    }
    left = remainder(spec, counts, compensation.constants if compensation else ())
    with torch.no_grad():
        with masked(model, plan, compensation):
            wanted = model(input_ids=ids).logits
            wanted_padded = model(**batch).logits[batch["attention_mask"].bool()]
        apply_plan(model, plan, compensation, verify=False)
        scale = wanted.abs().max()
        assert (model(input_ids=ids).logits - wanted).abs().max() <= 1e-4 * scale
        padded = model(**batch).logits[batch["attention_mask"].bool()]
        assert (padded - wanted_padded).abs().max() <= 1e-4 * scale
    assert spec_for(model).decoder_parameters == left.num_parameters == recount(model)["decoder"]
    check_generation(model, batch)
    check_gradients(copy.deepcopy(model), ids)
    return left


def check_generation(model, batch):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    static = model.generate(**batch, **options, cache_implementation="static")
    assert torch.equal(cached, static)


def check_gradients(model, ids):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", CONFIGS)
def test_sliced_equals_masked_and_cached_equals_uncached(family, kv_heads):
    rng = random.Random(f"{family} {kv_heads}")
    model = odd_model(rng, family, kv_heads)
    check_surgery(rng, model)
    check_surgery(rng, model)  # F10: a pruned model can be pruned again


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", CONFIGS)
def test_sliced_equals_masked_on_the_whole_grid(family, kv_heads, seed):
    rng = random.Random(f"{family} {kv_heads} {seed}")
    model = odd_model(rng, family, kv_heads)
    for _ in range(3):
        check_surgery(rng, model)


@pytest.mark.parametrize("family", CONFIGS)
def test_f28_layer_0_without_attention_decodes_like_uncached(family):
    options = {"sliding_window": 4} if family == "mistral" else {}
    if family in ("qwen2", "qwen3"):
        options = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    model = tiny_model(family, layers=4, **options)
    apply_plan(model, plan_for(model, [((), None), (None, None), ((), None), (None, ())]))
    slots = [getattr(layer.self_attn, "layer_idx", None) for layer in model.model.layers]
    assert slots[0] is slots[2] is None
    assert None not in (slots[1], slots[3])
    check_generation(model, padded_batch(tiny_rows(3, 12, uneven=True), side="left"))


def test_f28_beam_search_and_sampling_with_a_cache():
    model = tiny_model(layers=4)
    apply_plan(model, plan_for(model, [((), None), (None, ()), ((), ()), ((1,), range(8))]))
    batch = padded_batch(tiny_rows(2, 8, uneven=True), side="left")
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert torch.equal(
        model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False)
    )


def test_f28_config_follows_the_modules():
    model = tiny_model("qwen3", layers=4, use_sliding_window=True, max_window_layers=2)
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    half = ((0,), range(16))
    apply_plan(model, plan_for(model, [half, ((), ()), half, half]))
    config = model.config
    assert config.num_hidden_layers == len(model.model.layers) == 3
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert (config.num_key_value_heads, config.num_attention_heads) == (1, 2)
    assert config.intermediate_size == 16
    assert config.head_dim == 8
    assert model.model.config is config


def test_f27_groups_stay_whole_and_norms_and_rotary_stay():
    model = tiny_model("qwen3", kv_heads=2, layers=2)
    attention = model.model.layers[0].self_attn
    before = {name: p.detach().clone() for name, p in attention.named_parameters()}
    rotary = model.model.rotary_emb.inv_freq.clone()
    apply_plan(model, plan_for(model, [((1,), None), (None, None)]))
    assert attention.num_key_value_groups == 2
    assert torch.equal(attention.q_proj.weight, before["q_proj.weight"][16:])
    assert torch.equal(attention.k_proj.weight, before["k_proj.weight"][8:])
    assert torch.equal(attention.v_proj.weight, before["v_proj.weight"][8:])
    assert torch.equal(attention.o_proj.weight, before["o_proj.weight"][:, 16:])
    assert torch.equal(attention.q_norm.weight, before["q_norm.weight"])
    assert torch.equal(model.model.rotary_emb.inv_freq, rotary)


def test_a_plan_that_keeps_all_changes_nothing():
    for family in CONFIGS:
        model = tiny_model(family)
        before = list(model.parameters())
        with unchanged(model):
            apply_plan(model, PruningPlan.keep_all(spec_for(model)))
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


# ---- F29: what must be preserved, and what must be freed ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_f29_dtype_requires_grad_mode_and_hooks_are_kept(dtype):
    model = tiny_model(layers=3, attention_bias=True).to(dtype)
    model.train()
    model.model.layers[2].eval()
    model.model.layers[2].self_attn.train()
    frozen = [model.model.layers[0].mlp.down_proj, model.model.layers[1].self_attn.k_proj]
    for linear in frozen:
        linear.requires_grad_(False)
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    plan = plan_for(model, [((0,), range(0, 48, 2)), ((1,), None), ((1,), ())])
    units = replay(model, RowSet.of(map(Row.of, tiny_rows(8))), ()).units
    apply_plan(model, plan, mean_compensation(model, plan, units))
    seen.clear()
    layers = model.model.layers
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [layers[2].training, layers[2].self_attn.training] == [False, True]
    assert layers[0].training
    assert model.training
    frozen_names = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen_names == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.down_proj.bias",  # new, like the weight beside it
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
    }
    model(input_ids=tiny_rows(1)[0][None])
    assert seen == [1]


def test_f29_memory_is_really_freed():
    model = tiny_model(layers=3)
    old = {name: weakref.ref(p) for name, p in model.named_parameters() if "layers" in name}
    plan = plan_for(model, [((0,), range(8)), ((), ()), ((1,), range(8))])
    apply_plan(model, plan)
    gc.collect()
    norms = {n for n in old if "norm" in n and ".1." not in n}
    assert {name for name, ref in old.items() if ref() is not None} == norms
    for name, parameter in model.named_parameters():
        held = parameter.untyped_storage().nbytes()
        assert held == parameter.numel() * parameter.element_size(), name
        assert parameter.is_contiguous(), name


def test_f29_after_inference_mode_the_model_can_be_trained():
    model = tiny_model(layers=3)
    with torch.inference_mode():
        units = replay(model, RowSet.of(map(Row.of, tiny_rows(8)))).units
        plan = plan_for(model, [((), range(8)), ((0,), None), ((1,), ())])
        apply_plan(model, plan, mean_compensation(model, plan, units))
    assert not any(p.is_inference() for p in model.parameters())
    batch = padded_batch(tiny_rows(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_f09_tied_embeddings_stay_tied():
    model = tiny_model("qwen2", layers=2, tie=True)
    apply_plan(model, plan_for(model, [((0,), range(8)), (None, ())]))
    head, embeddings = model.lm_head.weight, model.model.embed_tokens.weight
    assert head is embeddings
    assert head.data_ptr() == embeddings.data_ptr()
    total = sum(p.numel() for p in model.parameters())
    assert spec_for(model).total_parameters == total == recount(model)["total"]


# ---- F25, F26, F30: plans that do not fit, failures in the middle, results that are wrong ----


def test_f25_another_models_plan_is_refused_before_any_change():
    model, other = tiny_model(layers=2), tiny_model(layers=2, intermediate_size=40)
    with unchanged(model), pytest.raises(PlanMismatchError, match="made for a model with finger"):
        apply_plan(model, plan_for(other, [((0,), None), (None, None)]))
    plan = plan_for(model, [((0,), None), (None, None)])
    apply_plan(model, plan)
    with unchanged(model), pytest.raises(PlanMismatchError, match="or already pruned"):
        apply_plan(model, plan)


def test_f25_compensation_for_other_weights_or_another_plan_is_refused():
    model, rows = tiny_model(layers=2), RowSet.of(map(Row.of, tiny_rows(8)))
    plan = plan_for(model, [((0,), None), (None, None)])
    units = replay(model, rows).units
    compensation = mean_compensation(model, plan, units)
    other = plan_for(model, [((1,), None), (None, None)])
    with unchanged(model), pytest.raises(PlanMismatchError, match="compensation was made for plan"):
        apply_plan(model, other, compensation)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with unchanged(model), pytest.raises(PlanMismatchError, match="other weights of this arch"):
        apply_plan(model, plan, compensation)


def everything_plan(model):
    """Touches every kind of edit: slices, biases, removed halves, a removed block, a shell."""
    return plan_for(model, [((), ()), ((1,), range(3, 20)), ((), ()), ((0,), ()), ((), range(9))])


def compensated(model):
    plan = everything_plan(model)
    units = replay(model, RowSet.of(map(Row.of, tiny_rows(8)))).units
    return plan, mean_compensation(model, plan, units)


@pytest.mark.parametrize(
    ("error", "after"),
    [(RuntimeError("out of memory"), False), (KeyboardInterrupt(), True)],
    ids=["before", "after"],
)
def test_f26_failure_at_every_edit_leaves_the_model_bit_identical(error, after, monkeypatch):
    model = tiny_model("qwen3", layers=5, attention_bias=True, use_sliding_window=True)
    model.train()
    model.model.layers[3].mlp.eval()
    plan, compensation = compensated(model)
    before = state_digest(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    plain = StagedEdits._assign
    done, k = [], 0

    def failing(edit):
        done.append(edit)
        if after:
            plain(edit)
        if len(done) == k + 1:
            raise error
        if not after:
            plain(edit)

    monkeypatch.setattr(StagedEdits, "_assign", staticmethod(failing))
    while True:
        done.clear()
        if k == len(stage(model, spec_for(model), plan, compensation)):
            break
        with pytest.raises(type(error)):
            apply_plan(model, plan, compensation, verify=False)
        assert state_digest(model) == before, k
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
        k += 1
    assert k > 40
    apply_plan(model, plan, compensation)
    assert len(done) == k


def test_f26_out_of_memory_while_staging(monkeypatch):
    model = tiny_model(layers=5)
    plan, compensation = compensated(model)
    plain, calls = nn.Parameter.__new__, []

    def exhausted(cls, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory left")
        return plain(cls, *args, **kwargs)

    with unchanged(model):
        monkeypatch.setattr(nn.Parameter, "__new__", exhausted)
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            apply_plan(model, plan, compensation, verify=False)
        monkeypatch.undo()


@pytest.mark.parametrize("moment", ["masked", "pruned"])
def test_f26_ctrl_c_while_checking(moment, monkeypatch):
    model = tiny_model(layers=5)
    plan, compensation = compensated(model)
    plain, calls = apply.logits_at, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == (1 if moment == "masked" else 2):
            raise KeyboardInterrupt
        return plain(*args)

    for module in (apply, compare):
        monkeypatch.setattr(module, "logits_at", interrupted)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        apply_plan(model, plan, compensation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_f30_a_wrong_result_is_rolled_back(dtype, monkeypatch):
    model = tiny_model(layers=5).to(dtype)
    plan, compensation = compensated(model)
    plain = unit_columns
    monkeypatch.setattr("lit_prune.surgery.slicing.unit_columns", lambda *args: plain(*args) + 1)
    with unchanged(model), pytest.raises(SurgeryError, match="does not compute what the plan says"):
        apply_plan(model, plan_for(model, [(None, range(30)), *[(None, None)] * 4]))
    monkeypatch.undo()
    apply_plan(model, plan, compensation)


def test_f30_a_result_that_is_not_finite_is_refused_where_the_dense_model_is():
    model = tiny_model(layers=2).half()
    plan = plan_for(model, [(None, range(40)), (None, None)])
    too_large = torch.full((32,), 1e6, dtype=torch.float64)  # float16 ends at 65504
    compensation = Compensation({(0, "mlp"): too_large}, plan.digest, weights_digest(model))
    with unchanged(model), pytest.raises(SurgeryError, match=r"would not be finite: .* dense mod"):
        apply_plan(model, plan, compensation)
    apply_plan(model, plan)


def test_f30_a_dense_model_that_is_not_finite_is_not_the_surgerys_fault():
    model = tiny_model(layers=2)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    apply_plan(model, plan_for(model, [(None, range(40)), (None, None)]))
    assert model.model.layers[0].mlp.down_proj.in_features == 40


def test_f30_half_precision_rounding_is_not_mistaken_for_a_fault():
    for dtype in (torch.bfloat16, torch.float16):
        for seed in range(6):
            model = tiny_model(layers=6, seed=seed).to(dtype)
            apply_plan(model, random_plan(random.Random(seed), model))


# ---- F06 to F10: models that cannot be cut, or can ----


def test_f06_an_unsupported_family_names_the_supported_ones():
    from transformers import MptConfig, MptForCausalLM, PhimoeConfig, PhimoeForCausalLM

    mpt = MptForCausalLM(MptConfig(d_model=8, n_layers=1, n_heads=1, vocab_size=8))
    with pytest.raises(
        UnsupportedModelError,
        match=r"model_type 'mpt'.*: .*gemma, gemma2, .*, llama, .*register_family",
    ):
        spec_for(mpt)
    config = PhimoeConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=2, vocab_size=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"'phimoe'.*register_family"):
        spec_for(PhimoeForCausalLM(config))
    with pytest.raises(UnsupportedModelError, match="is not a causal language model with a head"):
        spec_for(tiny_model(layers=1).model)
    with pytest.raises(UnsupportedModelError, match="holds no Hugging Face causal language model"):
        find_causal_lm(nn.Linear(2, 2))


def lora(model):
    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.Linear(32, 2, bias=False)

        def forward(self, x):
            return self.base_layer(x)

    model.model.layers[1].mlp.up_proj = Wrapped(model.model.layers[1].mlp.up_proj)


def quantised(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        weight.to(torch.int8), requires_grad=False
    )


def other_linear(model):
    class QuantLinear(nn.Module):
        weight = None

    model.model.layers[1].self_attn.q_proj = QuantLinear()


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def pruned_by_torch(model):
    import torch.nn.utils.prune as prune

    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", amount=0.5)


def on_meta(model):
    model.model.layers[1].mlp.to("meta")


def dispatched(model):
    model.model.layers[1]._hf_hook = object()


def shared_module(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def shared_weight(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def extra_parameter(model):
    model.model.layers[1].mlp.scale = nn.Parameter(torch.ones(()))


def uneven_heads(model):
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight[:24].detach().clone())


def torn_mlp(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[:40].detach().clone())


REFUSED = [
    (lora, r"layers\.1\.mlp\.up_proj is wrapped by an adapter.*merge_and_unload"),  # F07
    (quantised, r"layers\.0\.mlp\.up_proj\.weight has dtype torch.int8.*bfloat16"),
    (other_linear, "layer 1: self_attn.q_proj is a QuantLinear, expected torch.nn.Linear"),
    (parametrised, "up_proj is parametrised or masked.*remove_parametrizations"),
    (pruned_by_torch, "up_proj is parametrised or masked.*prune.remove"),
    (on_meta, r"layers\.1\.mlp\.gate_proj\.weight is on the meta device"),  # F08
    (dispatched, r"layers\.1 is dispatched by accelerate.*device_map=None"),
    (shared_module, "layer 1.mlp is the same object as layer 0.mlp"),  # F09
    (shared_weight, "layer 1.mlp.up_proj.weight is the same object as layer 0.mlp.up_proj"),
    (extra_parameter, r"layer 1 holds the parameter mlp\.scale, which the llama entry"),
    (
        uneven_heads,
        r"layers\.1\.self_attn contradicts itself: .*q_proj \[24, 32\]",
    ),  # F10, F27
    (
        torn_mlp,
        r"layers\.1\.mlp contradicts itself: .*gate_proj \[48, 32\], .*up_proj \[40, 32\]",
    ),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_f07_f08_f09_f10_weights_that_cannot_be_sliced_are_refused_by_name(damage, message):
    model = tiny_model(layers=3)
    plan = plan_for(model, [(None, None), (None, range(8)), (None, None)])
    damage(model)
    names = [(name, id(p)) for name, p in model.named_parameters()]
    hooks = num_hooks(model)  # torch.nn.utils.prune has one of its own
    with pytest.raises(UnsupportedModelError, match=message):
        apply_plan(model, plan)
    assert [(name, id(p)) for name, p in model.named_parameters()] == names
    assert num_hooks(model) == hooks


def test_f33_a_compiled_model_is_refused():
    model = tiny_model(layers=1)
    with pytest.raises(UnsupportedModelError, match="compiled"):
        spec_for(torch.compile(model))


def test_f10_a_model_that_others_sliced_unevenly_is_read_from_its_weights():
    model = tiny_model(layers=3, kv_heads=4)
    mlp, attention = model.model.layers[1].mlp, model.model.layers[2].self_attn
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight[:20].detach().clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :20].detach().clone())
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.weight = nn.Parameter(linear.weight[:16].detach().clone())
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :16].detach().clone())
    spec = spec_for(model)
    assert [b.mlp.num_channels for b in spec.blocks] == [48, 20, 48]
    assert [b.attention.num_kv_groups for b in spec.blocks] == [4, 4, 2]
    assert spec.decoder_parameters == recount(model)["decoder"]
    check_surgery(random.Random(3), model)


def test_several_language_models_need_a_name():
    both = nn.ModuleDict({"student": tiny_model(layers=1), "teacher": tiny_model(layers=1)})
    from lit_prune.errors import ConfigError

    with pytest.raises(ConfigError, match=r"holds 2 causal .*\['student', 'teacher'\].*Name one"):
        find_causal_lm(both)
    assert find_causal_lm(both, "teacher") is both["teacher"]
    with pytest.raises(ConfigError, match="has no such sub-module"):
        find_causal_lm(both, "pupil")
    with pytest.raises(ConfigError, match="is a Linear, expected a Hugging Face"):
        find_causal_lm(both, "teacher.lm_head")


def test_a_removed_sub_block_costs_one_addition():
    model = tiny_model(layers=2)
    apply_plan(model, plan_for(model, [((), None), (None, ())]))
    first, last = model.model.layers
    assert isinstance(first.self_attn, ConstantOutput)
    assert isinstance(last.mlp, ConstantOutput)
    assert isinstance(first.input_layernorm, nn.Identity)
    assert sum(p.numel() for p in last.mlp.parameters()) == 0
