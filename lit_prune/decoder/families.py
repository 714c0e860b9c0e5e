"""Where the parts of each supported decoder family are. Data; a new family is a new entry."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lit_prune.decoder.experts import Experts
from lit_prune.decoder.family import Family
from lit_prune.decoder.head import TASKS, task_named
from lit_prune.decoder.other_kinds import other_kind
from lit_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_PHI_HEAD_NORMS = tuple(
    f"self_attn.{name}_layernorm.{leaf}" for name in "qk" for leaf in ("weight", "bias")
)
_BIDIRECTIONAL = {"use_bidirectional_attention": "a model that looks ahead is no causal one"}
_ONE_NORM = {
    "kv_group": "its norms over queries and keys span all heads, so a head's values depend on the "
    "others"
}
_NORM_EACH = {"kv_group": "each head has norms of its own, which are not sliced"}


_SANDWICH = Family(  # a norm before and one behind each sub-block
    model_type="",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    keeps_biases=False,
    refuses_config=_BIDIRECTIONAL,
)
_BEHIND = Family(  # norms behind only, and over all heads
    model_type="",
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    attention_extras=_HEAD_NORMS,
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
    keeps_biases=False,
    refuses=_ONE_NORM,
)
_FOUR_H = Family(  # Megatron's names
    model_type="",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention="self_attention",
    query="self_attention.query_key_value",
    key="self_attention.query_key_value",
    value="self_attention.query_key_value",
    attention_output="self_attention.dense",
    interleaved=True,
    queries_per_group=None,
    gate=None,
    up="mlp.dense_h_to_4h",
    mlp_output="mlp.dense_4h_to_h",
)
_SLOPES = "the slopes of its attention biases (ALiBi) depend on how many heads there are"
_PARALLEL = Family(model_type="", mlp_norm="input_layernorm", parallel=True)
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama"),
        Family(model_type="mistral"),
        Family(model_type="ministral", keeps_biases=False),
        Family(model_type="qwen2"),
        Family(model_type="qwen3", attention_extras=_HEAD_NORMS),
        Family(model_type="granite", residual_scale="residual_multiplier"),
        Family(model_type="smollm3", per_layer=("no_rope_layers",)),
        Family(model_type="gemma", keeps_biases=False, refuses_config=_BIDIRECTIONAL),
        replace(_SANDWICH, model_type="gemma2"),
        replace(_SANDWICH, model_type="gemma3_text", attention_extras=_HEAD_NORMS),
        Family(model_type="olmo", keeps_biases=False),
        replace(_BEHIND, model_type="olmo2"),
        replace(_BEHIND, model_type="olmo3"),
        Family(model_type="starcoder2", gate=None, up="mlp.c_fc", mlp_output="mlp.c_proj"),
        Family(
            model_type="stablelm",
            keeps_biases=False,
            head_counts={"num_heads": "queries", "num_key_value_heads": "groups"},
            refuses_config={"qk_layernorm": _NORM_EACH["kv_group"]},
            when={"use_parallel_residual": {"parallel": True, "mlp_norm": "input_layernorm"}},
        ),
        replace(
            _PARALLEL,
            model_type="cohere",
            keeps_biases=False,
            when={"use_qk_norm": {"attention_extras": _HEAD_NORMS, "refuses": _NORM_EACH}},
        ),
        replace(_PARALLEL, model_type="cohere2", keeps_biases=False),
        replace(
            _PARALLEL,
            model_type="phi",
            final_norm="model.final_layernorm",
            attention_output="self_attn.dense",
            gate=None,
            up="mlp.fc1",
            mlp_output="mlp.fc2",
            when={"qk_layernorm": {"attention_extras": _PHI_HEAD_NORMS}},
        ),
        Family(
            model_type="phi3",
            query="self_attn.qkv_proj",
            key="self_attn.qkv_proj",
            value="self_attn.qkv_proj",
            head_counts={
                "num_key_value_heads": "groups",
                "config.num_attention_heads": "queries",
            },
            gate="mlp.gate_up_proj",
            up="mlp.gate_up_proj",
        ),
        Family(
            model_type="gpt2",
            layers="transformer.h",
            final_norm="transformer.ln_f",
            attention="attn",
            attention_norm="ln_1",
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            attention_output="attn.c_proj",
            transposed=True,
            queries_per_group=None,
            head_counts={"num_heads": "queries", "split_size": "width"},
            mlp_norm="ln_2",
            gate=None,
            up="mlp.c_fc",
            mlp_output="mlp.c_proj",
            config_names={
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "num_key_value_heads": None,
                "head_dim": None,
                "intermediate_size": "n_inner",
            },
            refuses_config={
                "scale_attn_by_inverse_layer_idx": "a layer divides its attention by its number, "
                "and layers are renumbered",
                "add_cross_attention": "attention to an encoder is not part of a decoder's layer",
            },
        ),
        replace(
            _FOUR_H,
            model_type="gpt_neox",
            layers="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            attention="attention",
            query="attention.query_key_value",
            key="attention.query_key_value",
            value="attention.query_key_value",
            attention_output="attention.dense",
            head_dim="head_size",
            config_names={"num_key_value_heads": None},
            when={"use_parallel_residual": {"parallel": True}},  # each behind a norm of its own
        ),
        Family(
            model_type="opt",
            layers="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            attention_norm="self_attn_layer_norm",
            attention_output="self_attn.out_proj",
            queries_per_group=None,
            head_counts={"num_heads": "queries"},
            mlp="fc2",
            mlp_norm="final_layer_norm",
            mlp_chain=("fc1", "activation_fn", "fc2"),
            gate=None,
            up="fc1",
            mlp_output="fc2",
            config_names={
                "num_key_value_heads": None,
                "head_dim": None,
                "intermediate_size": "ffn_dim",
            },
            needs_config={
                "do_layer_norm_before": "norms over the residual stream itself would have to stay "
                "when a sub-block goes",
            },
        ),
        replace(
            _FOUR_H,
            model_type="falcon",
            head_counts={"num_heads": "queries", "num_kv_heads": "groups"},
            config_names={
                "num_key_value_heads": "num_kv_heads",
                "head_dim": None,
                "intermediate_size": "ffn_hidden_size",
            },
            when={
                "alibi": {"refuses": {"kv_group": _SLOPES}},
                "parallel_attn": {
                    "parallel": True,
                    "adds_in_place": True,
                    "mlp_norm": "input_layernorm",
                },
                "new_decoder_architecture": {
                    "needs_config": {
                        "parallel_attn": "without it, its layers run norms that they do not have"
                    },
                },
                "num_ln_in_parallel_attn=2": {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
            },
        ),
        replace(
            _FOUR_H,
            model_type="bloom",
            embedding_norm="transformer.word_embeddings_layernorm",
            head_counts={"num_heads": "queries"},
            adds_residual=True,
            config_names={
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "num_key_value_heads": None,
                "head_dim": None,
                "intermediate_size": None,
            },
            refuses={"kv_group": _SLOPES},
            refuses_config={
                "apply_residual_connection_post_layernorm": "a norm stands in the residual stream",
                "slow_but_exact": "slices of a projection are multiplied one by one, past its "
                "module",
            },
        ),
        Family(model_type="mixtral", experts=Experts()),
        Family(
            model_type="qwen2_moe",
            experts=Experts(
                others=("mlp.shared_expert", "mlp.shared_expert_gate"),
                plain_layers="mlp_only_layers",
                sparse_step="decoder_sparse_step",
            ),
        ),
        Family(
            model_type="qwen3_moe",
            attention_extras=_HEAD_NORMS,
            experts=Experts(plain_layers="mlp_only_layers", sparse_step="decoder_sparse_step"),
        ),
        Family(
            model_type="olmoe",
            attention_extras=_HEAD_NORMS,
            experts=Experts(),
            refuses=_ONE_NORM,
        ),
        Family(
            model_type="gpt_oss",
            per_head=("self_attn.sinks",),
            experts=Experts(router="mlp.router", returns_scores=True, stored_apart=False),
        ),
    )
}
# Model types of our own classes, whose layers differ: pruned_llama …
PRUNED = "pruned_"


def family_name(model_type: object) -> str:
    """Return the family that a model type belongs to, our own classes included.

    Example:
        >>> family_name("pruned_llama"), family_name("llama")
        ('llama', 'llama')
    """
    return str(model_type).removeprefix(PRUNED)


def family_of(model: PreTrainedModel) -> Family:
    """Return the family entry that holds for ``model``: chosen by its config, never by its name.

    Raises:
        UnsupportedModelError: If there is none; lists the supported ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = family_name(model_type)
    refuse_known_kind(model)
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has model_type {model_type!r}, which lit_prune does not "
            f"know. Supported: {', '.join(sorted(FAMILIES))}. Declare a new one by "
            "lit_prune.decoder.register_family(Family(...)), or by what "
            "lit_prune.decoder.infer_family(model) finds, and check it by "
            "lit_prune.testing.check_family."
        )
    if task_named(type(model).__name__) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a causal language model with a head; pass the whole "
            f"model: {', '.join(f'…{end}' for end in TASKS)}."
        )
    _refuse_other_labels(model)
    family = FAMILIES[name].under(model.config)
    for options, set_, word in (
        (family.refuses_config, True, "without"),
        (family.needs_config, False, "with"),
    ):
        for option, reason in options.items():
            if bool(getattr(model.config, option, None)) == set_:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has config.{option} {'set' if set_ else 'not set'}: "
                    f"{reason}. lit_prune prunes {model_type!r} models {word} it only."
                )
    return family


def refuse_known_kind(model: PreTrainedModel) -> None:
    """Refuse a model of a kind that is known not to work.

    Raises:
        UnsupportedModelError: Says why.
    """
    config = getattr(model, "config", None)
    name = family_name(model_type := getattr(config, "model_type", None))
    reason = None if name in FAMILIES else other_kind(config)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {model_type!r}) cannot be pruned: "
            f"{reason}. Supported: {', '.join(sorted(FAMILIES))}."
        )


def _refuse_other_labels(model: PreTrainedModel) -> None:
    """Refuse a classifier whose head does not choose one class of several."""
    if task_named(type(model).__name__) == "next_token":
        return
    kind = getattr(model.config, "problem_type", None)
    if kind not in (None, "single_label_classification") or (model.config.num_labels or 0) < 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {model.config.num_labels} output(s), "
            f"problem_type {kind!r}: lit_prune measures heads that choose one class of several "
            "(no regression, reward, or several labels at once)."
        )
