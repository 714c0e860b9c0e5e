"""Where the parts of each supported decoder family are. Data; a new family is a new entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Paths of the parts, relative to the model (first four) or to one decoder layer.

    Attributes:
        model_type: Hugging Face ``config.model_type``.
        attention_extras: Parameters of the attention that no unit owns (norms over one head), by
            path.
    """

    model_type: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    attention_extras: tuple[str, ...] = ()
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    mlp_output: str = "mlp.down_proj"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama"),
        Family(model_type="mistral"),
        Family(model_type="qwen2"),
        Family(
            model_type="qwen3",
            attention_extras=("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        ),
        Family(model_type="granite"),
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
    """Return the family entry of ``model``, chosen by its config, never by its name or path.

    Raises:
        UnsupportedModelError: If there is none; lists the supported ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = family_name(model_type)
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has model_type {model_type!r}, which lit_prune does not "
            f"know. Supported: {', '.join(sorted(FAMILIES))} (causal language models with "
            "separate q/k/v and gate/up projections). A new family is one entry in "
            "lit_prune/decoder/families.py."
        )
    if not type(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a causal language model with a head; pass the whole "
            "…ForCausalLM."
        )
    return FAMILIES[name]
