"""Tiny random models of every supported family, made on the spot; nothing is downloaded."""

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def tiny_model(family="llama", *, kv_heads=2, layers=4, tie=False, seed=0, **overrides):
    """A random causal language model: 4 query heads of 8, hidden 32, 48 channels, 64 token ids."""
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tie,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # families beside these four are seen in `tests/test_testing.py`, by the contract
    config = CONFIGS.get(family, CONFIG_MAPPING[family])(**{**options, **overrides})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        # the usual initialisation (0.02) leaves activations too small for a test to see a mistake
        if "norm" not in name:
            parameter.data.normal_(0, 0.3 if parameter.ndim > 1 else 0.1)
    torch.random.set_rng_state(state)
    return model


def tiny_rows(count=24, length=24, *, vocab=64, seed=0, uneven=False):
    """Random token id rows (no pad id 0), as a list of 1-D tensors."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length] * count
    if uneven:
        lengths = torch.randint(length // 2, length + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab, (int(n),), generator=generator) for n in lengths]


def padded_batch(rows, *, side="right", pad=0, extra=0):
    """Stack rows into a batch of ids and mask, padded on one side."""
    width = max(len(r) for r in rows) + extra
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def batches_of(rows, size=4, **options):
    """Rows as a list of padded batches."""
    return [padded_batch(rows[i : i + size], **options) for i in range(0, len(rows), size)]


# Mixtures of experts: six, of which a token meets two; a shared expert, plain layers, sinks.
_SIX = {"num_experts_per_tok": 2, "num_experts": 6}
MIXTURES = {
    "mixtral": {**_SIX, "intermediate_size": 20, "sliding_window": 8},
    "qwen2_moe": {
        **_SIX, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        **_SIX, "moe_intermediate_size": 20, "mlp_only_layers": [1], "norm_topk_prob": True,
        "head_dim": 10, "attention_bias": True,
    },
    "olmoe": {**_SIX, "intermediate_size": 20, "clip_qkv": 2.0},
    "gpt_oss": {**_SIX, "intermediate_size": 20, "sliding_window": 8, "kv_heads": 1},
}  # fmt: skip


def tiny_mixture(family="mixtral", **overrides):
    """A random mixture of experts, otherwise as `tiny_model`.

    The exact kernels: those that are chosen by default differ between one token and many.
    """
    options = {**MIXTURES[family], **overrides}
    if family == "gpt_oss":  # its usual positions are stretched for 131,072 tokens
        options.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    model = tiny_model(family, **options)
    model.set_experts_implementation("eager")
    return model
