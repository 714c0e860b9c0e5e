"""Where the parts of each supported decoder family are. Data; a new family is a new entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

from lit_prune.config import Granularity
from lit_prune.errors import ConfigError, UnsupportedModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.decoder.spec import SubBlockKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Paths of the parts, relative to the model (first three) or to one decoder layer.

    A layer computes ``x += scale * post_norm(attention(norm(x)))``, then the same with the MLP,
    each norm where the family has it. Where it is ``parallel`` both read the stream that enters the
    layer: ``x += attention(norm(x)) + mlp(norm(x))``, with one norm for both or one for each. A
    family that differs from that in a way that no field says must not be entered.

    Attributes:
        model_type: Hugging Face ``config.model_type``.
        attention_norm: Norm in front of the attention; None where it reads the stream as it is.
        attention_post_norm: Norm over what the attention writes, before it is added to the stream.
        attention_extras: Parameters of the attention that no unit owns (norms over one head), by
            path.
        head_counts: Attributes of the attention that say how many query and how many KV heads there
            are, where its code reads them (most read the weights' shapes).
        mlp_norm: Norm in front of the MLP, as ``attention_norm``; the same path where both
            sub-blocks of a ``parallel`` layer read one norm.
        mlp_post_norm: Norm over what the MLP writes, as ``attention_post_norm``.
        gate: Gate projection; None where the MLP is ``down(act(up(x)))``.
        parallel: Whether attention and MLP of a layer read the same stream, and are added to it
            together.
        per_layer: Fields of the config, beside ``layer_types``, that list one entry for each layer.
        residual_scale: Field of the config that multiplies what a sub-block adds to the stream.
        refuses: Granularities that cannot be removed exactly, each with the reason, a clause.
        refuses_config: Fields of the config under which nothing can, where they are set (true),
            each with the reason, a clause.
        when: Fields of the config under which, where they are set (true), the model is another one:
            each with the fields of this entry that then hold, by name; later ones win.

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
    head_counts: tuple[str, str] | None = None
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    mlp_output: str = "mlp.down_proj"
    parallel: bool = False
    per_layer: tuple[str, ...] = ()
    residual_scale: str | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    refuses_config: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def inputs(self, kind: SubBlockKind) -> tuple[str, ...]:
        """Return the projections whose rows belong to units."""
        if kind == "attention":
            return (self.query, self.key, self.value)
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def norms(self, kind: SubBlockKind) -> tuple[str, ...]:
        """Return the norms around a sub-block."""
        both = (
            (self.attention_norm, self.attention_post_norm)
            if kind == "attention"
            else (self.mlp_norm, self.mlp_post_norm)
        )
        return tuple(path for path in both if path is not None)

    def output(self, kind: SubBlockKind) -> str:
        """Return the projection whose columns belong to units."""
        return self.attention_output if kind == "attention" else self.mlp_output

    def under(self, config: object) -> Family:
        """Return the entry that holds for models of a config, without conditions.

        Example:
            >>> from transformers import StableLmConfig
            >>> FAMILIES["stablelm"].under(StableLmConfig(use_parallel_residual=True)).parallel
            True
        """
        found = replace(self, when={})
        for option, changes in self.when.items():
            if getattr(config, option, None):
                found = replace(found, **changes)
        return found


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
_PARALLEL = Family(model_type="", mlp_norm="input_layernorm", parallel=True)
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
            refuses_config={"qk_layernorm": _NORM_EACH["kv_group"]},
            when={"use_parallel_residual": {"parallel": True, "mlp_norm": "input_layernorm"}},
        ),
        replace(
            _PARALLEL,
            model_type="cohere",
            when={"use_qk_norm": {"attention_extras": _HEAD_NORMS, "refuses": _NORM_EACH}},
        ),
        replace(_PARALLEL, model_type="cohere2"),
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


def register_family(family: Family) -> None:
    """Make a family of one's own known, for this process.

    Check it with `lit_prune.testing.check_family` on a tiny model before it is relied on.

    Args:
        family: Where its parts are.

    Raises:
        ConfigError: If the model type is known already or has no name of its own, if the entry
            refuses a granularity that there is none of, names no norms, or one norm for two
            streams.

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
    _check_entry(family)
    for option, changes in family.when.items():
        if unknown := sorted(set(changes) - set(Family.__dataclass_fields__)):
            raise ConfigError(
                f"family {name!r}, when {option!r}: there is no field {unknown[0]!r}"
                f"{did_you_mean(unknown[0], Family.__dataclass_fields__)}."
            )
        _check_entry(replace(family, **changes))
    FAMILIES[name] = family


def _check_entry(family: Family) -> None:
    """Refuse an entry that contradicts itself."""
    name = family.model_type
    if None in (
        family.attention_norm or family.attention_post_norm,
        family.mlp_norm or family.mlp_post_norm,
        family.attention_post_norm or family.mlp_norm,
    ):
        raise ConfigError(
            f"family {name!r} names no norm before or after a sub-block: the stream behind the "
            "attention is found by one."
        )
    if not family.parallel and family.attention_norm == family.mlp_norm is not None:
        raise ConfigError(
            f"family {name!r} names the norm {family.mlp_norm!r} for attention and MLP: where both "
            "read one norm, they read one stream. Say parallel=True."
        )
    known = get_args(Granularity)
    if unknown := sorted(set(family.refuses) - set(known)):
        raise ConfigError(
            f"family {name!r} refuses {unknown[0]!r}{did_you_mean(unknown[0], known)}; "
            f"granularities are {list(known)}."
        )


def family_of(model: PreTrainedModel) -> Family:
    """Return the family entry that holds for ``model``: chosen by its config, never by its name.

    Raises:
        UnsupportedModelError: If there is none; lists the supported ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = family_name(model_type)
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
    family = FAMILIES[name].under(model.config)
    for option, reason in family.refuses_config.items():
        if getattr(model.config, option, None):
            raise UnsupportedModelError(
                f"{type(model).__name__} has config.{option} set: {reason}. lit_prune prunes "
                f"{model_type!r} models without it only."
            )
    return family
