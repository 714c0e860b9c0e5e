"""Which format holds what, and what it does to the model."""

import itertools
import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_prune.decoder import spec_for
from lit_prune.errors import ConfigError, FormatError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.pruner import prune
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.saving.formats import FORMATS
from lit_prune.surgery import apply_plan
from tests.models import batches_of, padded_batch, tiny_model, tiny_rows
from tests.saving.cases import ALL, FAMILIES, KINDS, listing, logits, model_types, pruned

STOCK_LIKE = ("stock", "padded")
DIRECTORIES = [name for name in FORMATS if name != "gguf"]  # that one: test_gguf.py


def config_of(path):
    return json.loads((path / "config.json").read_text())


def manifest_of(path):
    return json.loads((path / "MANIFEST.json").read_text())["architecture"]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("family", "kind"), [*itertools.product(FAMILIES, KINDS)])
def test_every_case_is_written_as_expected_or_refused_by_name(family, kind, tmp_path):
    number = FAMILIES.index(family) + KINDS.index(kind)
    model = pruned(family, kind, tie=number % 2 == 0, kv_heads=4 if number % 3 == 0 else 2)
    expected = model_types(family, kind)
    for name in DIRECTORIES:
        if expected[name] is None:
            with pytest.raises(FormatError, match=r"cannot hold this model: .*heterogeneous"):
                save_pruned(model, tmp_path / name, format=name, verify=False)
            assert listing(tmp_path) == sorted(set(listing(tmp_path)) - {name})
            continue
        path = save_pruned(model, tmp_path / name, format=name, verify=False)
        assert config_of(path)["model_type"] == expected[name]
        assert manifest_of(path)["format"] == name
        loaded = load_pruned(path)
        close(logits(loaded), logits(model))
        assert spec_for(loaded).model_type in (family, "granite")  # it can be pruned again
    path = save_pruned(model, tmp_path / "auto", verify=False)
    auto = "stock" if expected["stock"] else "heterogeneous"
    assert manifest_of(path)["format"] == auto
    assert manifest_of(path)["why"].startswith(f"auto took {auto}: ")


@pytest.mark.parametrize("name", STOCK_LIKE)
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_carried_model_generates_as_the_original(family, name, tmp_path):
    model = pruned(family, "uniform_mean" if name == "stock" else "no_first_attention_mean")
    path = save_pruned(model, tmp_path / "saved", format=name, verify=False)
    batch = padded_batch(tiny_rows(3, 12, uneven=True), side="left")
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    wanted = model.generate(**batch, **options, use_cache=False)
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert plain.config.model_type == "granite"
    assert torch.equal(plain.generate(**batch, **options), wanted)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(plain.generate(**batch, **options, **static), wanted)


def test_heads_that_do_not_divide_the_hidden_size_are_carried(tmp_path):
    # LlamaConfig refuses 3 heads on 32 channels
    model = tiny_model("llama", kv_heads=4)
    plan = tuple(LayerPlan(i, (0, 1, 3), tuple(range(9))) for i in range(4))
    apply_plan(model, PruningPlan(spec_for(model).fingerprint, plan))
    path = save_pruned(model, tmp_path / "saved", verify=False)
    assert config_of(path)["model_type"] == "granite"
    assert config_of(path)["num_attention_heads"] == 3
    close(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))


@pytest.mark.parametrize(
    ("family", "kind", "options", "words"),
    [
        ("llama", "uneven", {}, "layer 1 has num_key_value_heads 2 and layer 0 has 1"),
        ("llama", "no_first_attention", {}, "layer 0 has no attention"),
        ("llama", "no_mlp", {}, "layer 1 has num_key_value_heads 1 and layer 0 has 2"),
        (
            "qwen3",
            "uniform_mean",
            {},
            r"Qwen3ForCausalLM has no bias on down_proj \(layer 0 needs one\); GraniteForCausalLM "
            r"has no norms over queries and keys\. These can: heterogeneous",
        ),
        (
            "mistral",
            "uniform_mean",
            {"sliding_window": 8},
            "MistralForCausalLM has no bias on .*GraniteForCausalLM has no sliding window, this "
            "model looks back 8 tokens",
        ),
    ],
)
def test_refusal_names_what_blocks_and_what_can(family, kind, options, words, tmp_path):
    with pytest.raises(FormatError, match=words):
        save_pruned(pruned(family, kind, **options), tmp_path / "saved", format="stock")
    assert listing(tmp_path) == []
    path = save_pruned(pruned(family, kind, **options), tmp_path / "saved", verify=False)
    assert manifest_of(path)["format"] == "heterogeneous"


def test_padded_qwen3_is_refused_where_an_mlp_needs_a_bias(tmp_path):
    with pytest.raises(FormatError, match="Qwen3ForCausalLM has no bias on down_proj"):
        save_pruned(pruned("qwen3", "leading_mean"), tmp_path / "saved", format="padded")
    # a bias on the output of attention it has
    path = save_pruned(
        pruned("qwen3", "leading"), tmp_path / "saved", format="padded", verify=False
    )
    assert config_of(path)["model_type"] == "qwen3"


def test_mixed_dtypes_need_the_heterogeneous_format(tmp_path):
    model = pruned(kind="uniform")
    model.model.norm.double()
    with pytest.raises(FormatError, match="float32 and float64, transformers loads one dtype"):
        save_pruned(model, tmp_path / "saved", format="stock")


def test_unknown_format_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'padded'"):
        save_pruned(pruned(), tmp_path / "saved", format="paded")


def test_what_auto_took_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lit_prune")
    save_pruned(pruned(), tmp_path / "saved", verify=False)
    assert "as heterogeneous (auto took heterogeneous: layer 1 has" in caplog.text


@pytest.mark.parametrize("tie", [False, True])
def test_constant_of_removed_first_layers_finds_an_exact_place(tie, tmp_path):
    model = pruned("llama", "first_gone_mean", tie=tie)
    path = save_pruned(model, tmp_path / "saved", format="stock", verify=False)
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(plain), logits(model))  # the same sums
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tie
    where = "is zeros and a bias" if tie else "added to the embeddings"
    assert where in manifest_of(path)["notes"][0]
    assert plain.config.num_hidden_layers == (4 if tie else 3)


def test_padded_states_its_cost_in_parameters_and_flops(tmp_path):
    path = save_pruned(pruned(), tmp_path / "saved", format="padded", verify=False)
    (note,) = manifest_of(path)["notes"]
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert f"parameters 25,408 → {plain.num_parameters():,} (+38.16%)" in note
    assert "FLOPs per token 42,432 → 61,952 (+46.00%)" in note


def test_everything_of_the_config_that_matters_comes_along(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = pruned("mistral", "uniform_mean", rope_parameters=rope, tie=True, rms_norm_eps=1e-3)
    model = model.to(torch.bfloat16)
    model.generation_config.max_new_tokens = 17
    path = save_pruned(model, tmp_path / "saved", format="stock", verify=False)
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert plain.dtype == torch.bfloat16
    assert plain.generation_config.max_new_tokens == 17
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert dict(plain.config.rope_parameters) == rope
    assert plain.config.rms_norm_eps == 1e-3
    ids = torch.arange(3, 60).repeat(1, 2)  # beyond the original length
    loaded = load_pruned(path)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        for other, share in ((loaded, 0.03), (plain, 0.2)):  # plain: rotary frequencies not rounded
            got = other(input_ids=ids).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=share * float(wanted.abs().max()))


def test_a_loaded_carrier_is_pruned_and_saved_again(tmp_path):
    loaded = load_pruned(save_pruned(pruned("qwen2", "uniform_mean"), tmp_path / "a", verify=False))
    spec = spec_for(loaded)
    layers = tuple(LayerPlan(b.index, (0,), (1, 2) if b.index else (3,)) for b in spec.blocks)
    apply_plan(loaded, PruningPlan(spec.fingerprint, layers))
    path = save_pruned(loaded, tmp_path / "b", verify=False)
    assert config_of(path)["model_type"] == "pruned_granite"
    assert torch.equal(logits(load_pruned(path)), logits(loaded))


def test_a_loaded_carrier_is_pruned_by_the_default_preset(tmp_path):
    path = save_pruned(pruned("mistral", "uniform_mean"), tmp_path / "a", verify=False)
    model = load_pruned(path)
    assert type(model).__name__ == "GraniteForCausalLM"
    before = spec_for(model).decoder_parameters
    result = prune(model, batches_of(tiny_rows(24, 24)), pruning_ratio=0.3)
    removed = 1 - spec_for(model).decoder_parameters / before
    assert abs(removed - 0.3) < 0.006
    assert result.report.achieved_ratio == pytest.approx(removed)
    again = load_pruned(save_pruned(model, tmp_path / "b", verify=False))
    close(logits(again), logits(model))


def test_granite_with_its_own_multipliers_keeps_them(tmp_path):
    from transformers import GraniteConfig

    config = GraniteConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        attention_multiplier=0.1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    layers = (LayerPlan(0, (), ()), LayerPlan(1, (0,), ALL), LayerPlan(2, (0, 1), (1, 2)))
    apply_plan(model, PruningPlan(spec_for(model).fingerprint, layers))
    for name in ("heterogeneous", "padded"):
        path = save_pruned(model, tmp_path / name, format=name, verify=False)
        close(logits(load_pruned(path)), logits(model))
        close(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))


def test_every_sharded_format_is_read_back(tmp_path):
    for kind, name in (("uniform", "stock"), ("uneven", "padded"), ("uneven", "heterogeneous")):
        path = save_pruned(
            pruned(kind=kind), tmp_path / name, format=name, verify=False, max_shard_bytes=20_000
        )
        assert sum(n.startswith("model-") for n in listing(path)) > 2
        close(logits(AutoModelForCausalLM.from_pretrained(path)), logits(pruned(kind=kind)))
