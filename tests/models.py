"""Tiny random models of every supported family, made on the spot; nothing is downloaded."""

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lit_prune.decoder import FAMILIES

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# whose attention and MLP may read the same stream, unless told otherwise
SEQUENTIAL = {
    "gpt_neox": {"use_parallel_residual": False},
    "falcon": {"parallel_attn": False},
}

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
    "gpt_oss": {
        **_SIX, "intermediate_size": 20, "sliding_window": 8,
        # its usual positions are stretched for 131,072 tokens
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
HEADS = {
    "next_token": AutoModelForCausalLM,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}


def tiny_model(
    family="llama", *, kv_heads=2, layers=4, tie=False, seed=0, task="next_token", **overrides
):
    """A random causal language model: 4 query heads of 8, hidden 32, 48 channels, 64 token ids.

    Of a mixture: six experts of 20, computed one after the other.
    """
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
    usual = SEQUENTIAL.get(family) or MIXTURES.get(family, {})
    options = {**options, **usual, **overrides}
    if family in FAMILIES:
        options = FAMILIES[family].in_config(options)
    config = CONFIGS.get(family, CONFIG_MAPPING[family])(**options)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = HEADS[task].from_config(config).eval()
    for name, parameter in model.named_parameters():
        # the usual initialisation (0.02) leaves activations too small for a test to see a mistake
        if "norm" not in name:
            parameter.data.normal_(0, 0.3 if parameter.ndim > 1 else 0.1)
    torch.random.set_rng_state(state)
    if family in MIXTURES:  # those chosen by default differ between one token and many
        model.set_experts_implementation("eager")
    return model


def tiny_mixture(family="mixtral", **overrides):
    """A random mixture of experts."""
    return tiny_model(family, **overrides)


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


def tiny_classifier(task, family="llama", *, classes=3, **options):
    """A random classifier of texts or tokens on the decoder of `tiny_model`."""
    return tiny_model(family, task=task, num_labels=classes, **options)


def labelled(task, batches, *, classes=3, seed=0):
    """Give batches random labels: one for each row, or one for each real token, some left out."""
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"] != 0
        shape = ids.shape[:1] if task == "sequence" else ids.shape
        labels = torch.randint(-1, classes, shape, generator=generator)
        labels[labels < 0] = -100 if task == "token" else 0
        batch["labels"] = labels if task == "sequence" else labels.masked_fill(~mask, -100)
    return batches


def batches_of(rows, size=4, **options):
    """Rows as a list of padded batches."""
    return [padded_batch(rows[i : i + size], **options) for i in range(0, len(rows), size)]
