"""What vLLM's sources expect of a stock directory, against what lies in it. No server is run."""

import itertools
import json

import pytest
from safetensors import safe_open

from lit_prune.saving import save_pruned
from tests.models import tiny_model
from tests.saving.cases import FAMILIES, KINDS, model_types, pruned

FORMATS = ("stock", "padded")


def expected_by_vllm(config):
    """Names and shapes that its classes make of a config (tensor parallelism of one)."""
    hidden, heads, groups = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    kind = config["model_type"]
    dim = hidden // heads if kind == "qwen2" else config["head_dim"]
    width = config["intermediate_size"]
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden), "self_attn.k_proj": (groups * dim, hidden),
        "self_attn.v_proj": (groups * dim, hidden), "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }  # fmt: skip
    attention = kind == "qwen2" or config.get("attention_bias")
    output = attention and kind not in ("qwen2", "qwen3")
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            found[f"{prefix}{name}.weight"] = shape
            of_attention = output if "o_proj" in name else attention
            if of_attention if "attn" in name else config.get("mlp_bias"):
                found[f"{prefix}{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = (hidden,)
        if kind == "qwen3":
            for norm in ("q_norm", "k_norm"):
                found[f"{prefix}self_attn.{norm}.weight"] = (dim,)
    return found


def stored(path):
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def notes_of(path):
    return " ".join(json.loads((path / "MANIFEST.json").read_text())["architecture"]["notes"])


@pytest.mark.parametrize(("family", "kind"), [*itertools.product(FAMILIES, KINDS)])
def test_vllm_expects_what_is_there_or_the_note_says_otherwise(family, kind, tmp_path):
    for name in FORMATS:
        if model_types(family, kind)[name] is None:
            continue
        model = pruned(family, kind, tie=kind == "uniform")
        path = save_pruned(model, tmp_path / name, format=name, verify=False)
        config = json.loads((path / "config.json").read_text())
        assert config["hidden_act"] == "silu"
        assert config["head_dim"] == 8
        assert (expected_by_vllm(config) == stored(path)) == ("vLLM" not in notes_of(path))


def test_a_bias_that_vllm_would_skip_is_said(tmp_path):
    """Qwen3 in transformers has a bias on o_proj, in vLLM it has none."""
    model = tiny_model("qwen3", attention_bias=True)
    path = save_pruned(model, tmp_path / "saved", format="stock", verify=False)
    assert "vLLM reads no bias on o_proj of qwen3 and skips it" in notes_of(path)
    assert "vLLM reads no bias on o_proj" in (path / "README.md").read_text()
    plain = save_pruned(tiny_model("qwen3"), tmp_path / "plain", format="stock", verify=False)
    assert "vLLM" not in notes_of(plain)


def test_heads_that_vllm_would_compute_wrongly_are_said(tmp_path):
    path = save_pruned(pruned("qwen2", "uniform"), tmp_path / "a", format="stock", verify=False)
    assert "hidden_size / num_attention_heads refuse these weights" in notes_of(path)
