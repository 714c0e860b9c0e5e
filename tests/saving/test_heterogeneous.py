"""What a model with layers of different sizes can do, and what it refuses."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, pipeline

from lit_prune import load_pruned, prune, save_pruned
from lit_prune.decoder import fingerprint, spec_for
from lit_prune.decoder.layout import layout_of
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.saving.models import HELD as KNOWN
from lit_prune.saving.models import MIXTURES, class_names, model_file, pruned_classes
from lit_prune.saving.weights import digest_of
from lit_prune.surgery import apply_plan
from lit_prune.surgery.apply import applied
from tests.models import batches_of, padded_batch, tiny_rows
from tests.saving.cases import ALL, FAMILIES, alter, listing, logits, pruned
from tests.saving.test_card import tiny_tokenizer

# Lines of the master that a file has otherwise: fused projections, attentions that ask a config.
UNLIKE = {
    "phi3": {
        '"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),',
        '"mlp": ("gate_proj", "up_proj", "down_proj"),',
        "self.mlp.config = self.self_attn.config = config  # where set_attn_implementation writes",
        "class PrunedPhi3ForTokenClassification(",  # on one line there
        "_Strict, GenericForTokenClassification, Phi3PreTrainedModel",
    }
}
KINDS = ("no_first_attention_mean", "leading_mean", "no_mlp", "uneven")
OPTIONS = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


@pytest.fixture
def directory(tmp_path):
    return save_pruned(pruned(kind="leading_mean"), tmp_path / "saved", verify=False)


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_model_files_are_copies_of_one_and_import_nothing_of_ours(family):
    master = "mixtral" if family in MIXTURES else "llama"
    text, name = model_file(family).read_text(), class_names(family)[0]
    name = name.removeprefix("Pruned").removesuffix("Config")
    wanted = model_file(master).read_text().replace(master.capitalize(), name)
    wanted = wanted.replace(master, family)
    assert text == wanted or family in UNLIKE
    lost = {line.strip() for line in set(wanted.splitlines()) - set(text.splitlines())}
    assert lost == UNLIKE.get(family, set())
    assert "lit_prune" not in "".join(x for x in text.splitlines() if "import" in x)


def test_importing_the_package_does_not_import_modeling_code():
    script = (
        "import sys, lit_prune\n"
        "assert not [n for n in sys.modules if 'modeling_pruned' in n], 'eager'\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.for_model('pruned_qwen3', num_hidden_layers=1)\n"
        "assert type(config).__module__.endswith('modeling_pruned_qwen3'), type(config)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_and_attention_implementations_agree(family, kind, tmp_path):
    path = save_pruned(
        pruned(family, kind), tmp_path / "saved", format="heterogeneous", verify=False
    )
    model = AutoModelForCausalLM.from_pretrained(path)  # no flag: registered by the import
    batch = padded_batch(tiny_rows(3, 12, uneven=True), side="left")
    wanted = pruned(family, kind).generate(**batch, **OPTIONS, use_cache=False)
    assert torch.equal(model.generate(**batch, **OPTIONS, use_cache=False), wanted)
    assert torch.equal(model.generate(**batch, **OPTIONS), wanted)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**batch, **OPTIONS, **static), wanted)
    chunked = {"prefill_chunk_size": 4, "disable_compile": True}
    assert torch.equal(model.generate(**batch, **OPTIONS, **chunked), wanted)
    before = logits(model)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)
    assert torch.equal(model.generate(**batch, **OPTIONS), wanted)
    with torch.no_grad():
        output = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == len(layout_of(model).attentions)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, tmp_path):
    path = save_pruned(
        pruned(family, "leading_mean"), tmp_path / "saved", format="heterogeneous", verify=False
    )
    model, ids = load_pruned(path).train(), torch.arange(3, 19).unsqueeze(0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_lora_is_added_trained_and_merged(directory):
    model = load_pruned(directory)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    wrapped, ids = peft.get_peft_model(model, config), torch.arange(3, 19).unsqueeze(0)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    trained = [p for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.01
    before = logits(wrapped.eval())
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-4)
    again = load_pruned(save_pruned(merged, directory.parent / "merged", verify=False))
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_writes_what_from_pretrained_reads(family, tmp_path):
    first = save_pruned(pruned(family, "leading_mean"), tmp_path / "a", verify=False)
    model = load_pruned(first)
    model.save_pretrained(tmp_path / "b")
    assert f"modeling_pruned_{family}.py" in listing(tmp_path / "b")
    written = json.loads((tmp_path / "b/config.json").read_text())
    ours = json.loads((first / "config.json").read_text())
    for key in ("per_layer_config", "auto_map", "architectures", "model_type", "head_dim"):
        assert written[key] == ours[key], key
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert digest_of(again) == digest_of(model)
    assert torch.equal(logits(again), logits(model))
    copied = copy.deepcopy(again)
    assert torch.equal(logits(copied), logits(model))


def test_text_generation_pipeline(tmp_path):
    path = save_pruned(pruned(), tmp_path / "saved", tokenizer=tiny_tokenizer(), verify=False)
    generate = pipeline("text-generation", model=str(path), tokenizer=str(path), device="cpu")
    (result,) = generate("hello world", max_new_tokens=3, do_sample=False)
    assert result["generated_text"].startswith("hello world")


# ---- pruned again ----


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_f10_loaded_model_is_pruned_again_by_prune(family, tmp_path):
    path = save_pruned(pruned(family, "no_first_attention_mean"), tmp_path / "a", verify=False)
    model = load_pruned(path)
    assert fingerprint(model) == fingerprint(pruned(family, "no_first_attention_mean"))
    before = spec_for(model).total_parameters
    prune(model, batches_of(tiny_rows(24, 24)), pruning_ratio=0.3, preset="flap")
    assert spec_for(model).total_parameters < before
    held = model.config.to_dict()["per_layer_config"]
    again = load_pruned(save_pruned(model, tmp_path / "b", format="heterogeneous", verify=False))
    assert again.config.to_dict()["per_layer_config"] == held
    assert torch.equal(logits(again), logits(model))
    model.save_pretrained(tmp_path / "c")  # the config follows surgery
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c")), logits(model))


def test_f10_surgery_on_a_loaded_model_is_taken_back_whole(directory):
    model = load_pruned(directory)
    config, before = model.config.to_dict(), digest_of(model)
    layers = [
        LayerPlan(0, (), ()),
        LayerPlan(1, (), (0,)),
        LayerPlan(2, (), ()),
        LayerPlan(3, (1,), ALL[:9]),
    ]
    plan = PruningPlan(spec_for(model).fingerprint, tuple(layers))
    with pytest.raises(RuntimeError, match="later"), applied(model, plan):
        raise RuntimeError("later")
    assert model.config.to_dict() == config
    assert digest_of(model) == before
    apply_plan(model, plan)
    batch = padded_batch(tiny_rows(3, 12, uneven=True), side="left")
    assert torch.equal(
        model.generate(**batch, **OPTIONS), model.generate(**batch, **OPTIONS, use_cache=False)
    )


# ---- F40: nothing is dropped, nothing is made up ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.3.mlp.gate_proj.weight"), "missing_keys"),
        (lambda t: t.pop("model.layers.0.self_attn.bias"), "missing_keys"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(16, 32)}),
            "unexpected_keys",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.gate_proj.weight": torch.ones(5, 32)}),
            "mismatch",
        ),
    ],
)
@pytest.mark.parametrize("forced", [False, True])
def test_f40_weights_that_do_not_belong_to_the_config_are_an_error(
    change, words, forced, directory
):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=words):
        AutoModelForCausalLM.from_pretrained(directory, ignore_mismatched_sizes=forced)


@pytest.mark.parametrize(
    "kind", ["uniform", "uniform_mean", "no_first_attention", "no_mlp", "leading_mean"]
)
def test_f40_stock_class_named_outright_fails(kind, tmp_path):
    path = save_pruned(pruned(kind=kind), tmp_path / "saved", format="heterogeneous", verify=False)
    with pytest.raises(RuntimeError, match=r"num_attention_heads.*per-layer"):
        LlamaForCausalLM.from_pretrained(path)


def test_f40_layers_that_the_config_does_not_describe_are_an_error(directory):
    alter(
        directory / "config.json", lambda c: c["per_layer_config"]["3"].pop("num_attention_heads")
    )
    with pytest.raises(ZeroDivisionError):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_pruned_class_without_differences_is_the_stock_class(family):
    config_class, model_class = pruned_classes(family)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    model = model_class(config_class(**sizes)).eval()
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(stock), logits(model))
