"""Models of other kinds are refused by name, with the reason, before anything runs."""

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from lit_prune import prune
from lit_prune.decoder import find_causal_lm
from lit_prune.errors import UnsupportedModelError
from tests.models import batches_of, tiny_rows

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "pad_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
PALI = {
    "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 16},
    "text_config": {"model_type": "gemma", **SIZES, **HEADS, "head_dim": 8},
    "projection_dim": 16,
}
LLAVA = {
    "vision_config": {"model_type": "clip_vision_model", **VISION},
    "text_config": {"model_type": "llama", **SIZES, **HEADS},
}
MODELS = {
    "T5ForConditionalGeneration": ("t5", T5, "encoder–decoder"),
    "BartForConditionalGeneration": ("bart", BART, "encoder–decoder"),
    "BartForSequenceClassification": ("bart", BART, "encoder–decoder"),
    "BartForCausalLM": ("bart", BART, "encoder–decoder"),
    "MambaForCausalLM": ("mamba", {**SIZES, "state_size": 4}, r"state-space \(recurrent\) model"),
    "Mamba2ForCausalLM": (
        "mamba2",
        {**SIZES, "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4},
        "no KV groups",
    ),
    "RecurrentGemmaForCausalLM": (
        "recurrent_gemma", {**SIZES, **HEADS, "lru_width": 16, "head_dim": 8}, "hybrid",
    ),
    "JambaForCausalLM": (
        "jamba",
        {**SIZES, **HEADS, "use_mamba_kernels": False, "num_experts": 2, "mamba_d_state": 4},
        "hybrid",
    ),
    "BertForSequenceClassification": ("bert", {**SIZES, **HEADS}, "it is an encoder:"),
    "PaliGemmaForConditionalGeneration": ("paligemma", PALI, "see each other both ways"),
    "LlavaNextForConditionalGeneration": ("llava_next", LLAVA, "of gemma3, llava, mistral3 only"),
    "LlavaModel": ("llava", LLAVA, "inside …ForConditionalGeneration of gemma3"),
    "BertForMaskedLM": ("bert", {**SIZES, **HEADS}, "each token sees those after it"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_kinds_are_refused_with_the_reason(name):
    model_type, options, words = MODELS[name]
    model = getattr(transformers, name)(CONFIG_MAPPING[model_type](**options))
    message = (
        rf"{name} \(model_type '{model_type}'\) cannot be pruned: .*{words}.*Supported: .*gemma"
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for refused in (
        lambda: prune(model, batches_of(tiny_rows(4)), pruning_ratio=0.3),
        lambda: find_causal_lm(nn.ModuleDict({"inside": model})),
        lambda: find_causal_lm(nn.ModuleDict({"inside": model}), "inside"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            refused()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
