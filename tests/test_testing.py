"""Every family passes the contract on a tiny model; what the contract must find, it finds."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_prune.calibration import Row, RowSet, replay, two_streams
from lit_prune.decoder import FAMILIES, DecoderParts, Family, quiet, register_family, spec_for
from lit_prune.errors import (
    ConfigError,
    ContractError,
    FormatError,
    PlanMismatchError,
    UnsupportedModelError,
)
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.pruner import prune
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.saving.carrier import TARGETS
from lit_prune.saving.models import HELD
from lit_prune.surgery import Compensation, apply_plan, mean_compensation, weights_digest
from lit_prune.surgery.structure import take_structure
from lit_prune.testing import check_family
from lit_prune.testing.plans import random_plan
from tests.models import MIXTURES, batches_of, tiny_mixture, tiny_model, tiny_rows
from tests.state import counted_forwards, state_digest, unchanged

SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
BEHIND = {"attention_bias": True, **SLIDING}
FIVE = {"hidden_size": 30, "num_attention_heads": 5}
# Legal and unusual: one KV head, multi-head, three query heads each, biases, tied embeddings,
# heads that are not hidden_size / heads wide, windows, layers without positions.
ODD = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "kv_heads": 1},
    "mistral": {"sliding_window": 8, "head_dim": 6},
    "ministral": {**SLIDING, "head_dim": 6},
    "qwen2": {"kv_heads": 4, "tie": True},
    "qwen3": {"attention_bias": True, "head_dim": 10, "kv_heads": 1},
    "granite": {
        "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
        "attention_multiplier": 0.2, "attention_bias": True, "mlp_bias": True,
        "num_attention_heads": 6,
    },
    "smollm3": {
        "no_rope_layers": [1, 0, 1, 0], "attention_bias": True, "mlp_bias": True, "tie": True,
        "num_attention_heads": 9, "kv_heads": 3,
    },
    "gemma": {"head_dim": 10, "kv_heads": 1, "tie": True},
    "gemma2": {**SLIDING, "head_dim": 10, "tie": True, "query_pre_attn_scalar": 10},
    "gemma3_text": {**BEHIND, "head_dim": 10, "query_pre_attn_scalar": 10, "kv_heads": 4},
    "olmo": {"clip_qkv": 2.0, "attention_bias": True, "num_attention_heads": 6},
    "olmo2": {"attention_bias": True, "head_dim": 6, "tie": True},
    "olmo3": {**BEHIND, "kv_heads": 4},
    "starcoder2": {"sliding_window": 8, "kv_heads": 1, "tie": True},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "kv_heads": 2},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 8, "head_dim": 12},
    "gpt2": {**FIVE, "tie": True, "scale_attn_weights": False, "attn_pdrop": 0.5},
    "gpt_neox": {
        "hidden_size": 24, "num_attention_heads": 3, "tie": True, "attention_bias": False,
        "rotary_pct": 0.25,
    },
    "opt": {**FIVE, "layer_norm_elementwise_affine": False},
    "falcon": {"multi_query": False, "bias": True, "kv_heads": 4},
    "bloom": {**FIVE, "tie": True},
    "cohere": {"kv_heads": 1, "tie": True, "logit_scale": 0.5, "head_dim": 6},
    "cohere2": {**SLIDING, "kv_heads": 1, "tie": True, "attention_bias": True},
    "phi": {"qk_layernorm": True, "tie": True, "partial_rotary_factor": 0.25},
}  # fmt: skip
# Another model by a field of the config (`Family.when`).
ANOTHER = [
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True, "kv_heads": 1}),
    ("gpt_neox", {"use_parallel_residual": True}),
    ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    ("phi", {"head_dim": 12, "num_attention_heads": 6, "kv_heads": 3}),
]
EVERY = ("block", "sub_block", "kv_group", "channel")
MODEL_FILE = {"llama", "mistral", "qwen2", "qwen3", "granite", "phi3"}
WIDTHS = ("qwen2", "stablelm", "cohere2")  # heads are hidden_size / heads wide
BEHIND_NORMS = {"gemma2", "gemma3_text", "olmo2", "olmo3"}


def uneven_norms(model):
    """Norm weights that differ, so that a norm of the wrong place shows."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def passes(model):
    before = state_digest(model)
    found = check_family(model)
    assert state_digest(model) == before
    family = model.config.model_type
    each = getattr(model.config, "use_qk_norm", False)
    refused = {"kv_group"} if family in ("olmo2", "olmo3", "bloom") or each else set()
    assert set(found.granularities) == set(EVERY) - refused
    assert set(found.refused) == refused
    assert found.constants == (family not in BEHIND_NORMS)
    assert (found.formats["heterogeneous"] == "held") == (family in MODEL_FILE)
    return found


def test_every_family_has_an_odd_config():
    assert set(ODD) | set(MIXTURES) == set(FAMILIES)


# One of each shape; `make contract` runs them all.
SHAPES = {"llama", "gemma2", "phi", "gpt2"}
CONTRACT = [pytest.param(f, marks=() if f in SHAPES else pytest.mark.slow) for f in ODD]


@pytest.mark.parametrize("family", CONTRACT)
def test_an_odd_model_passes_the_contract(family):
    found = passes(uneven_norms(tiny_model(family, **ODD[family])))
    if family not in WIDTHS:  # its own class holds any number of heads
        assert found.formats["padded"].startswith("held"), found.formats


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), ANOTHER)
def test_a_model_that_its_config_makes_another_passes_the_contract(family, options):
    passes(uneven_norms(tiny_model(family, **options)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", ODD)
def test_the_contract_on_more_models(family, kv_heads, seed):
    passes(uneven_norms(tiny_model(family, kv_heads=kv_heads, seed=seed, tie=bool(seed % 2))))


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
NEW_FALCON = {"parallel_attn": True, "new_decoder_architecture": True, "kv_heads": 2}
VARIANTS = [
    ("falcon", {"multi_query": True, "alibi": True, "tie": True}),
    ("falcon", {"multi_query": True}),
    ("falcon", {"multi_query": False, "alibi": True, "kv_heads": 4}),
    ("falcon", {"multi_query": True, "parallel_attn": True}),  # as the 7 B one
    ("falcon", {**NEW_FALCON, "num_ln_in_parallel_attn": 1, "tie": True}),
    ("falcon", {**NEW_FALCON, "bias": True}),  # with two norms, as the 40 B one
    ("phi3", {"kv_heads": 1, "original_max_position_embeddings": 16, "rope_parameters": LONG}),
    ("phi3", {"kv_heads": 4, "tie": True}),
    ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
    ("opt", {"enable_bias": False, "tie": True}),
    ("bloom", {"num_attention_heads": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_the_contract_on_legal_variants(family, options):
    model = uneven_norms(tiny_model(family, **options))
    found = check_family(model)
    assert set(found.refused) == (
        {"kv_group"} if options.get("alibi") or family == "bloom" else set()
    )
    assert found.formats["padded"].startswith("held"), found.formats


@pytest.mark.parametrize(
    "family",
    [
        family if family == "qwen3_moe" else pytest.param(family, marks=pytest.mark.slow)
        for family in MIXTURES
    ],
)
def test_a_mixture_of_experts_passes_the_contract(family):
    model = uneven_norms(tiny_mixture(family))
    before = state_digest(model)
    found = check_family(model)
    assert state_digest(model) == before
    assert {*found.granularities, *found.refused} == {
        "block", "sub_block", "kv_group", "expert", *(["channel"] if "qwen" in family else []),
    }  # fmt: skip
    assert set(found.refused) == ({"kv_group"} if family == "olmoe" else set())
    assert not found.constants
    assert found.formats["stock (alike)"].startswith("held"), found.formats
    assert found.formats["heterogeneous"] == "held"


# ---- a family of one's own ----


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


def own_model():
    tiny = tiny_model("llama", layers=3).config.to_dict()
    config = OwnConfig(**{**tiny, "model_type": "own_llama", "initializer_range": 0.3})
    return OwnForCausalLM(config).eval()


@pytest.fixture
def registered(registry):
    return register_family


def test_a_family_of_ones_own_passes_the_contract_once_it_is_declared(registered, tmp_path):
    model = own_model()
    with pytest.raises(UnsupportedModelError, match=r"'own_llama'.*register_family\(Family"):
        spec_for(model)
    registered(Family(model_type="own_llama"))
    found = check_family(model)
    assert found.granularities == EVERY
    assert {reason.startswith("held") for reason in found.formats.values()} == {False}
    with pytest.raises(FormatError, match="what the class of 'own_llama' can hold is not known"):
        save_pruned(model, tmp_path / "own", format="stock", verify=False)


def test_a_known_family_is_not_overwritten(registered):
    known = FAMILIES["llama"]
    with pytest.raises(ConfigError, match="'llama' is known already"):
        registered(Family(model_type="llama", gate=None))
    with pytest.raises(ConfigError, match="does not begin with 'pruned_'"):
        registered(Family(model_type="pruned_own"))
    with pytest.raises(ConfigError, match="refuses 'kv_groups'; did you mean 'kv_group'"):
        registered(Family(model_type="own", refuses={"kv_groups": "so"}))
    with pytest.raises(ConfigError, match="names no norm"):
        registered(Family(model_type="own", mlp_norm=None))
    with pytest.raises(ConfigError, match=r"'input_layernorm' for attention.*parallel=True"):
        registered(Family(model_type="own", mlp_norm="input_layernorm"))
    with pytest.raises(ConfigError, match="when 'fast': there is no field 'gates'; did you mean"):
        registered(Family(model_type="own", when={"fast": {"gates": None}}))
    assert FAMILIES["llama"] is known
    assert "own" not in FAMILIES


WRONG = [
    ({"mlp_output": "mlp.proj"}, "has no module 'mlp.proj'"),
    ({"layers": "model.blocks"}, "has no module 'model.blocks'"),
    ({"gate": None}, "holds the parameter mlp.gate_proj.weight, which"),
    ({"attention_extras": ("self_attn.q_norm.weight",)}, "no parameter 'self_attn.q_norm.weight'"),
    ({"head_counts": {"num_heads": "queries"}}, "has no number 'num_heads'"),
    ({"residual_scale": "residual_multiplier"}, "config.residual_multiplier is None"),
    ({"attention_norm": None, "attention_post_norm": "norm"}, "has no module 'norm'"),
    ({"up": "mlp.down_proj", "mlp_output": "mlp.up_proj"}, "contradicts itself"),
]


@pytest.mark.parametrize(("entry", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_an_entry_that_is_not_the_model_is_an_error(registered, entry, reason):
    registered(Family(model_type="own_llama", **entry))
    with pytest.raises(UnsupportedModelError, match=reason):
        check_family(own_model())


def test_an_entry_that_leaves_the_norm_behind_to_the_stream_is_found(registered):
    """Gemma 2 declared with its norm behind a sub-block as the one in front of the MLP."""
    model = uneven_norms(tiny_model("gemma2"))
    FAMILIES["gemma2"] = Family(
        model_type="gemma2",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        mlp_post_norm="pre_feedforward_layernorm",
        attention_norm="input_layernorm",
    )
    found = check_family(model)  # the same parts leave together: the paths are interchangeable
    assert not found.constants
    FAMILIES["gemma2"] = Family(
        model_type="gemma2", mlp_norm="post_attention_layernorm", attention_extras=(
            "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight",
        ),
    )  # fmt: skip
    with pytest.raises(ContractError, match="sliced and masked logits differ"):
        check_family(model)


def test_a_model_too_small_or_too_coarse_for_the_contract_is_refused():
    with pytest.raises(ContractError, match="two layers or more"):
        check_family(tiny_model(layers=1))
    with pytest.raises(ContractError, match="float32 or float64 model"):
        check_family(tiny_model().bfloat16())


# ---- what is refused, before anything is calibrated ----


INEXACT = [
    ("stablelm", "qk_layernorm", True),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True),
    ("opt", "do_layer_norm_before", False),
    ("bloom", "apply_residual_connection_post_layernorm", True),
    ("bloom", "slow_but_exact", True),
]


@pytest.mark.parametrize(("family", "option", "value"), INEXACT)
def test_a_variant_that_is_not_exact_is_refused_by_name(family, option, value):
    words = rf"config\.{option} {'' if value else 'not '}set"
    with pytest.raises(UnsupportedModelError, match=words):
        spec_for(tiny_model(family, **{option: value}))


def test_a_new_falcon_that_is_sequential_is_refused():
    """Its own forward fails."""
    with pytest.raises(UnsupportedModelError, match=r"config\.parallel_attn not set"):
        spec_for(tiny_model("falcon", new_decoder_architecture=True))


def test_an_opt_whose_embeddings_are_narrower_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"contradicts itself.*hidden size 16"):
        spec_for(tiny_model("opt", word_embed_proj_dim=16))


def test_slopes_that_depend_on_the_head_count_refuse_kv_groups():
    plain, sloped = (tiny_model("falcon", layers=1, alibi=alibi) for alibi in (False, True))
    assert dict(spec_for(plain).refused) == {}
    assert set(dict(spec_for(sloped).refused)) == {"kv_group"}


def run(model, ratio=0.2, **options):
    options = {"latency_prompt_tokens": 0, "progress": False, **options}
    return prune(model, batches_of(tiny_rows(30, 20), 6), pruning_ratio=ratio, **options)


def test_a_refused_granularity_alone_is_refused_before_any_forward():
    model = tiny_model("olmo2")
    with (
        unchanged(model),
        counted_forwards(model) as calls,
        pytest.raises(UnsupportedModelError, match=r"\['kv_group'\].*span all heads"),
    ):
        run(model, granularities=("kv_group",))
    assert calls == []


def test_a_refused_granularity_among_others_is_left_out_and_told():
    result = run(tiny_model("olmo3"), granularities=("kv_group", "channel"))
    told = [w for w in result.report.warnings if "granularity 'kv_group' was left out" in w]
    assert len(told) == 1
    assert {len(layer.kv_groups) for layer in result.plan.layers} == {2}


def test_a_plan_of_a_refused_granularity_is_refused():
    model = tiny_model("olmo2", layers=2)
    all_channels = tuple(range(48))
    layers = (LayerPlan(0, (1,), all_channels), LayerPlan(1, (0, 1), all_channels))
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    with (
        unchanged(model),
        pytest.raises(PlanMismatchError, match=r"keeps 1 of 2 KV groups.*span all heads"),
    ):
        apply_plan(model, plan)


@pytest.mark.parametrize("compensation", ["mean", "least_squares", "sequential", "none"])
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite", "starcoder2"])
def test_whole_sub_blocks_leave_a_constant_only_where_no_norm_follows(family, compensation):
    model = tiny_model(family, layers=5)
    biases = compensation != "none" or None
    options = {"granularities": ("block",), "compensation": compensation, "add_biases": biases}
    result = run(model, 0.2, **options)
    told = [w for w in result.report.warnings if "a norm follows every sub-block" in w]
    behind = family in BEHIND_NORMS
    assert len(told) == (behind and compensation != "none")
    gone = [
        (layer.index, kind)
        for layer in result.plan.layers
        for kind in ("attention", "mlp")
        if not layer.kept(kind)
    ]
    assert gone
    made = result.compensation.constants if result.compensation else {}
    assert set(gone) & set(made) == (set() if behind or compensation == "none" else set(gone))


@pytest.mark.parametrize("family", ODD)
def test_the_fit_behind_the_prefix_aims_at_what_a_projection_makes(family):
    """Where nothing was cut, the target is the dense projection's own output."""
    model = uneven_norms(tiny_model(family, **ODD[family]))
    parts = DecoderParts(model)
    rows = RowSet.of(Row.of(row) for row in tiny_rows(8))
    with quiet(model), two_streams(parts, rows, ["calibrate"], 4096) as text:
        batches = text["calibrate"]
        assert batches
        for layer in range(len(parts.layers)):
            for batch in batches:
                batch.lead(parts, layer)
                for kind in ("attention", "mlp"):
                    batch.arrive(parts, (layer, kind))
                    inputs, target = batch.enters(parts, (layer, kind))
                    wanted = parts.output(layer, kind).module(inputs)
                    assert (target - wanted).abs().max() <= 1e-4 * wanted.abs().max(), (layer, kind)
                batch.follow(parts, layer)


@pytest.mark.parametrize("family", ODD)
def test_a_dense_model_takes_the_structure_of_a_pruned_one(family):
    options = {**ODD[family], "layers": 4}
    model, dense = (tiny_model(family, **options) for _ in range(2))
    spec = spec_for(model)
    plan = random_plan(
        spec, random.Random(1), set(EVERY) - {"block"} - {g for g, _ in spec.refused}
    )
    apply_plan(model, plan)
    assert take_structure(dense, {n: tuple(p.shape) for n, p in model.named_parameters()})
    dense.load_state_dict(model.state_dict())
    ids = tiny_rows(1)[0][None]
    assert torch.equal(dense(ids).logits, model(ids).logits)


def test_layers_that_differ_in_more_than_their_weights_do_not_leave_unnamed():
    """Layers with and without rotary positions: shapes do not say which of them went."""
    options = {"no_rope_layers": [1, 0, 1, 0]}
    model, dense = (tiny_model("smollm3", **options) for _ in range(2))
    spec = spec_for(model)
    apply_plan(model, random_plan(spec, random.Random(0), {"block"}))
    assert model.config.no_rope_layers == [layer.self_attn.use_rope for layer in model.model.layers]
    with unchanged(dense), pytest.raises(PlanMismatchError, match="do not say which"):
        take_structure(dense, {n: tuple(p.shape) for n, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("granularity", "ratio"),
    [
        ("sub_block", 0.3),
        pytest.param("block", 0.3, marks=pytest.mark.slow),
        pytest.param("channel", 0.3278, marks=pytest.mark.slow),
    ],
)
def test_whatever_a_family_refuses_no_plan_removes(registered, granularity, ratio):
    registered(Family(model_type="own_llama", refuses={granularity: "its author says so"}))
    model = own_model()
    found = check_family(model, ratio=ratio)
    assert found.refused == {granularity: "its author says so"}
    assert f"{granularity} refused" in found.checks


def test_a_constant_behind_which_a_norm_follows_is_refused():
    model = tiny_model("gemma2", layers=2)
    all_channels = tuple(range(48))
    layers = (LayerPlan(0, (0, 1), ()), LayerPlan(1, (0, 1), all_channels))
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    constants = {(0, "mlp"): torch.ones(32).double()}
    made = Compensation(constants, plan.digest, weights_digest(model))
    with unchanged(model), pytest.raises(PlanMismatchError, match="norm follows every sub-block"):
        apply_plan(model, plan, made)


@pytest.mark.parametrize(
    "family", ["gemma2", "stablelm", "phi3", "gpt2", "opt", "bloom", "cohere2", "phi"]
)
def test_a_budget_in_latency_measures_every_kind_of_sub_block(family):
    result = run(
        tiny_model(family, layers=3), 1 / 3, budget="latency",
        latency_prompt_tokens=8, latency_new_tokens=2, granularities=("block",),
    )  # fmt: skip
    assert result.report.budget == "latency"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["conditional", "paper", "flap", "llm_pruner"])
@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_presets_prune_and_plain_transformers_loads(family, preset, tmp_path):
    model = uneven_norms(tiny_model(family, **ODD[family]))
    assert run(model, 0.25, preset=preset).report.achieved_ratio == pytest.approx(0.25, abs=0.005)
    path = save_pruned(model, tmp_path / "x")  # looked at in a fresh process too
    ids = tiny_rows(1)[0][None]
    wanted, got = model(ids).logits, AutoModelForCausalLM.from_pretrained(path)(ids).logits
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_gpt2_of_all_heads_and_fewer_channels_is_stock(tmp_path):
    model = tiny_model("gpt2")
    options = {"granularities": ("channel",), "allocator": "uniform_widths", "channel_multiple": 1}
    run(model, 0.25, **options)
    path = save_pruned(model, tmp_path / "x", format="stock", verify=False)
    loaded, ids = AutoModelForCausalLM.from_pretrained(path), tiny_rows(1)[0][None]
    assert loaded.config.n_inner == spec_for(model).blocks[0].mlp.num_channels < 48
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_auto_says_why_it_pads_a_family_without_a_model_file(tmp_path):
    model = tiny_model("smollm3")
    run(model, 0.3)
    path = save_pruned(model, tmp_path / "auto", verify=False)
    assert "auto took padded" in (path / "README.md").read_text()
    model = tiny_model("olmo")
    run(model, 0.3, add_biases=True)
    with pytest.raises(FormatError, match="pruned with add_biases=False"):
        save_pruned(model, tmp_path / "none", verify=False)


def test_a_family_is_said_to_keep_biases_where_a_format_holds_them():
    for name, family in FAMILIES.items():
        outputs = {family.attention_output, *(() if family.experts else (family.mlp_output,))}
        can = TARGETS[name].always.union(*TARGETS[name].flags.values())
        held = {path.rpartition(".")[2] for path in outputs} <= can or name in HELD
        assert family.keeps_biases == held, name


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].keeps_biases])
def test_what_the_default_preset_makes_of_a_family_can_be_saved(family, tmp_path):
    model = tiny_model(family)
    report = run(model, 0.3).report
    assert any(f"no format of save_pruned holds biases of {family}" in w for w in report.warnings)
    save_pruned(model, tmp_path / "saved", verify=False)


def test_a_compensation_that_is_a_bias_says_before_saving_that_it_cannot_be_saved():
    words = "compensation 'mean' is a bias, and no format of save_pruned holds biases of gemma2"
    report = run(tiny_model("gemma2"), 0.3, preset="flap").report
    assert any(words in warning for warning in report.warnings)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - MODEL_FILE))
def test_gguf_is_refused_where_no_graph_was_looked_at(family, tmp_path):
    with pytest.raises(FormatError, match=f"which graph of llama.cpp computes {family} was not"):
        save_pruned(tiny_model(family), tmp_path / "gguf", format="gguf", verify=False)


@pytest.mark.parametrize("family", sorted(set(ODD) - BEHIND_NORMS))
@pytest.mark.parametrize("name", ["stock", "padded"])
def test_the_constant_of_the_first_layer_is_saved_exactly(family, name, tmp_path):
    """It moves into the embeddings only where nothing scales them on their way to the stream."""
    model = tiny_model(family, **ODD[family])
    spec = spec_for(model)
    whole = PruningPlan.keep_all(spec).layers
    plan = PruningPlan(spec.fingerprint, (LayerPlan(0, (), ()), *whole[1:]))
    units = replay(model, RowSet.of(Row.of(row) for row in tiny_rows(8))).units
    apply_plan(model, plan, mean_compensation(model, plan, units))
    try:
        save_pruned(model, tmp_path / "x", format=name, verify=False)
    except FormatError as error:
        assert "has no bias on" in error.reason  # noqa: PT017 - refused by name, or exact
        return
    ids = tiny_rows(1)[0][None]
    wanted, got = model(ids).logits, load_pruned(tmp_path / "x")(ids).logits
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
