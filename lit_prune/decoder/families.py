"""Where the parts of each supported decoder family are. Data; a new family is a new entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, get_args

from lit_prune.config import Granularity
from lit_prune.decoder.experts import Experts
from lit_prune.errors import ConfigError, UnsupportedModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.decoder.spec import SubBlockKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Paths of the parts, relative to the model (first three) or to one decoder layer.

    A layer computes ``x += scale * post_norm(attention(norm(x)))``, then the same with the MLP,
    each norm where the family has it. A family that differs from that in a way that no field says
    must not be entered.

    Attributes:
        model_type: Hugging Face ``config.model_type``.
        attention_norm: Norm in front of the attention; None where it reads the stream as it is.
        attention_post_norm: Norm over what the attention writes, before it is added to the stream.
        attention_extras: Parameters of the attention that no unit owns (norms over one head), by
            path.
        per_head: Parameters of the attention with one number for each query head (attention sinks),
            by path.
        head_counts: Attributes of the attention that say how many query and how many KV heads there
            are, where its code reads them (most read the weights' shapes).
        mlp_norm: Norm in front of the MLP, as ``attention_norm``.
        mlp_post_norm: Norm over what the MLP writes, as ``attention_post_norm``.
        gate: Gate projection; None where the MLP is ``down(act(up(x)))``.
        experts: Where layers have a mixture of experts in the place of the MLP; None where none
            has.
        per_layer: Fields of the config, beside ``layer_types``, that list one entry for each layer.
        residual_scale: Field of the config that multiplies what a sub-block adds to the stream.
        refuses: Granularities that cannot be removed exactly, each with the reason, a clause.
        refuses_config: Fields of the config under which nothing can, where they are set (true),
            each with the reason, a clause.

    Example:
        >>> Family(model_type="llama").up
        'mlp.up_proj'
    """

    model_type: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    attention_extras: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    head_counts: tuple[str, str] | None = None
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    mlp_output: str = "mlp.down_proj"
    experts: Experts | None = None
    per_layer: tuple[str, ...] = ()
    residual_scale: str | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    refuses_config: Mapping[str, str] = field(default_factory=dict)

    def inputs(self, kind: SubBlockKind) -> tuple[str, ...]:
        """Return the projections whose rows belong to units."""
        if kind == "attention":
            return (self.query, self.key, self.value)
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def norms(self, kind: SubBlockKind) -> tuple[str, ...]:
        """Return the norms that leave with a sub-block."""
        both = (
            (self.attention_norm, self.attention_post_norm)
            if kind == "attention"
            else (self.mlp_norm, self.mlp_post_norm)
        )
        return tuple(path for path in both if path is not None)

    def output(self, kind: SubBlockKind) -> str:
        """Return the projection whose columns belong to units."""
        return self.attention_output if kind == "attention" else self.mlp_output


_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_BIDIRECTIONAL = {"use_bidirectional_attention": "a model that looks ahead is no causal one"}
_ONE_NORM = {
    "kv_group": "its norms over queries and keys span all heads, so a head's values depend on the "
    "others"
}


_SANDWICH = Family(  # a norm before and one behind each sub-block
    model_type="",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    refuses_config=_BIDIRECTIONAL,
)
_BEHIND = Family(  # norms behind only, and over all heads
    model_type="",
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    attention_extras=_HEAD_NORMS,
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
    refuses=_ONE_NORM,
)
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama"),
        Family(model_type="mistral"),
        Family(model_type="ministral"),
        Family(model_type="qwen2"),
        Family(model_type="qwen3", attention_extras=_HEAD_NORMS),
        Family(model_type="granite", residual_scale="residual_multiplier"),
        Family(model_type="smollm3", per_layer=("no_rope_layers",)),
        Family(model_type="gemma", refuses_config=_BIDIRECTIONAL),
        replace(_SANDWICH, model_type="gemma2"),
        replace(_SANDWICH, model_type="gemma3_text", attention_extras=_HEAD_NORMS),
        Family(model_type="olmo"),
        replace(_BEHIND, model_type="olmo2"),
        replace(_BEHIND, model_type="olmo3"),
        Family(model_type="starcoder2", gate=None, up="mlp.c_fc", mlp_output="mlp.c_proj"),
        Family(
            model_type="stablelm",
            head_counts=("num_heads", "num_key_value_heads"),
            refuses_config={
                "use_parallel_residual": "attention and MLP of a layer read the same stream",
                "qk_layernorm": "each head has norms of its own, which are not sliced",
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
_PARALLEL = (
    "attention and MLP of a layer read the same norm (parallel residual), and lit_prune calibrates "
    "and compensates them one after the other"
)
# Model types that are known, and why they are not supported.
REFUSED: dict[str, str] = {"cohere": _PARALLEL, "cohere2": _PARALLEL, "phi": _PARALLEL}
# Model types of our own classes, whose layers differ: pruned_llama …
PRUNED = "pruned_"


def family_name(model_type: object) -> str:
    """Return the family that a model type belongs to, our own classes included.

    Example:
        >>> family_name("pruned_llama"), family_name("llama")
        ('llama', 'llama')
    """
    return str(model_type).removeprefix(PRUNED)


def register_family(family: Family) -> None:
    """Make a family of one's own known, for this process.

    Check it with `lit_prune.testing.check_family` on a tiny model before it is relied on.

    Args:
        family: Where its parts are.

    Raises:
        ConfigError: If the model type is known already or has no name of its own, if the entry
            refuses a granularity that there is none of, or names no norms.

    Example:
        >>> register_family(Family(model_type="llama"))
        Traceback (most recent call last):
        lit_prune.errors.ConfigError: family 'llama' is known already...
    """
    name = family.model_type
    if not name or family_name(name) != name:
        raise ConfigError(
            f"model_type must be a name that does not begin with {PRUNED!r}: {name!r}."
        )
    if name in FAMILIES:
        raise ConfigError(
            f"family {name!r} is known already and is not overwritten. Give your config class a "
            "model_type of its own."
        )
    if None in (
        family.attention_norm or family.attention_post_norm,
        family.mlp_norm or family.mlp_post_norm,
        family.attention_post_norm or family.mlp_norm,
    ):
        raise ConfigError(
            f"family {name!r} names no norm before or after a sub-block: the stream behind the "
            "attention is found by one."
        )
    known = get_args(Granularity)
    if unknown := sorted(set(family.refuses) - set(known)):
        raise ConfigError(
            f"family {name!r} refuses {unknown[0]!r}{did_you_mean(unknown[0], known)}; "
            f"granularities are {list(known)}."
        )
    FAMILIES[name] = family


def family_of(model: PreTrainedModel) -> Family:
    """Return the family entry of ``model``, chosen by its config, never by its name or path.

    Raises:
        UnsupportedModelError: If there is none; lists the supported ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = family_name(model_type)
    if name in REFUSED and name not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {model_type!r}) cannot be pruned: "
            f"{REFUSED[name]}. Supported: {', '.join(sorted(FAMILIES))}."
        )
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has model_type {model_type!r}, which lit_prune does not "
            f"know. Supported: {', '.join(sorted(FAMILIES))} (causal language models with "
            "separate q/k/v projections). Declare a new one by "
            "lit_prune.decoder.register_family(Family(...)), and check it by "
            "lit_prune.testing.check_family."
        )
    if not type(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a causal language model with a head; pass the whole "
            "…ForCausalLM."
        )
    family = FAMILIES[name]
    for option, reason in family.refuses_config.items():
        if getattr(model.config, option, None):
            raise UnsupportedModelError(
                f"{type(model).__name__} has config.{option} set: {reason}. lit_prune prunes "
                f"{model_type!r} models without it only."
            )
    return family
