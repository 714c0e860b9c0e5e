"""What is said of a decoder family: where its parts are, and how they belong to units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from lit_prune.decoder.experts import Experts
    from lit_prune.decoder.spec import SubBlockKind

T = TypeVar("T")
HeadCount = Literal["queries", "groups", "width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Paths of the parts, relative to the model (first three) or to one decoder layer.

    A layer computes ``x += scale * post_norm(attention(norm(x)))``, then the same with the MLP,
    each norm where the family has it. Where it is ``parallel`` both read the stream that enters the
    layer: ``x += attention(norm(x)) + mlp(norm(x))``, with one norm for both or one for each. A
    family that differs from that in a way that no field says must not be entered.

    Roles (query, key and value; gate and up) with the same path share one fused projection: one
    role after the other, in this order, unless ``interleaved`` says otherwise.

    Attributes:
        model_type: Hugging Face ``config.model_type``.
        embedding_norm: Norm between the embeddings and the first layer.
        attention_norm: Norm in front of the attention; None where it reads the stream as it is.
        attention_post_norm: Norm over what the attention writes, before it is added to the stream.
        attention_extras: Parameters of the attention that no unit owns (norms over one head), by
            path.
        per_head: Parameters of the attention with one number for each query head (attention sinks),
            by path.
        interleaved: Whether a fused query-key-value projection holds one KV group after the other,
            each with its query heads, its key head and its value head.
        transposed: Whether projections store their weights as ``[in, out]`` (Conv1D).
        head_dim: Attribute of the attention that says how wide a head is.
        queries_per_group: Attribute that says how many query heads share a key; where None, that is
            what ``head_counts`` says, and one without two counts.
        head_counts: Attributes that the attention's code reads, each with what it counts: query
            heads (``queries``), KV heads (``groups``), or columns of all query heads (``width``).
            Most read the weights' shapes. ``config.`` in front: it reads its config, which is
            shared.
        mlp_norm: Norm in front of the MLP, as ``attention_norm``; the same path where both
            sub-blocks of a ``parallel`` layer read one norm.
        mlp_post_norm: Norm over what the MLP writes, as ``attention_post_norm``.
        mlp_chain: Modules that run one after the other, the output projection last, where the MLP
            has no module of its own. ``mlp`` is the last of them then.
        gate: Gate projection; None where the MLP is ``down(act(up(x)))``.
        experts: Where layers have a mixture of experts in the place of the MLP; None where none
            has.
        parallel: Whether attention and MLP of a layer read the same stream, and are added to it
            together.
        keeps_biases: Whether a format of `save_pruned` can hold biases of the output projections.
        adds_residual: Whether sub-blocks are handed the residual, as second argument, and add it.
        adds_in_place: Whether a layer adds to what the MLP returns, in place.
        per_layer: Fields of the config, beside ``layer_types``, that list one entry for each layer.
        residual_scale: Field of the config that multiplies what a sub-block adds to the stream.
        config_names: Fields of the config that are not called as Llama's, by Llama's name; None
            where there is no such field.
        refuses: Granularities that cannot be removed exactly, each with the reason, a clause.
        refuses_config: Fields of the config under which nothing can, where they are set (true),
            each with the reason, a clause.
        needs_config: Fields of the config without which nothing can, each with the reason.
        when: Fields of the config under which, where they are set (true, or ``field=number``), the
            model is another one: each with the fields of this entry that then hold, by name; later
            ones win.

    Example:
        >>> Family(model_type="llama").up
        'mlp.up_proj'
    """

    model_type: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    embedding_norm: str | None = None
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    attention_extras: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    interleaved: bool = False
    transposed: bool = False
    head_dim: str = "head_dim"
    queries_per_group: str | None = "num_key_value_groups"
    head_counts: Mapping[str, HeadCount] = field(default_factory=dict)
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    mlp_chain: tuple[str, ...] = ()
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    mlp_output: str = "mlp.down_proj"
    experts: Experts | None = None
    parallel: bool = False
    keeps_biases: bool = True
    adds_residual: bool = False
    adds_in_place: bool = False
    per_layer: tuple[str, ...] = ()
    residual_scale: str | None = None
    config_names: Mapping[str, str | None] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    refuses_config: Mapping[str, str] = field(default_factory=dict)
    needs_config: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def roles(self, kind: SubBlockKind) -> tuple[str, ...]:
        """Return the projections of query, key and value, or of gate and up: fused ones repeat."""
        if kind == "attention":
            return (self.query, self.key, self.value)
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def inputs(self, kind: SubBlockKind) -> tuple[str, ...]:
        """Return the projections whose rows belong to units, each once."""
        return tuple(dict.fromkeys(self.roles(kind)))

    def norms(self, kind: SubBlockKind) -> tuple[str, ...]:
        """Return the norms around a sub-block."""
        both = (
            (self.attention_norm, self.attention_post_norm)
            if kind == "attention"
            else (self.mlp_norm, self.mlp_post_norm)
        )
        return tuple(path for path in both if path is not None)

    @property
    def separates(self) -> bool:
        """Whether norms tell where the attention ends, and where the MLP begins."""
        return None not in (
            self.attention_norm or self.attention_post_norm,
            self.mlp_norm or self.mlp_post_norm,
            self.attention_post_norm or self.mlp_norm,
        )

    def output(self, kind: SubBlockKind) -> str:
        """Return the projection whose columns belong to units."""
        return self.attention_output if kind == "attention" else self.mlp_output

    def in_config(self, values: Mapping[str, T]) -> dict[str, T]:
        """Return fields of a config under the names that this family has for them.

        Example:
            >>> names = {"intermediate_size": "ffn_dim", "head_dim": None}
            >>> family = Family(model_type="x", config_names=names)
            >>> family.in_config({"intermediate_size": 8, "head_dim": 4, "hidden_size": 2})
            {'ffn_dim': 8, 'hidden_size': 2}
        """
        named = ((self.config_names.get(name, name), value) for name, value in values.items())
        return {name: value for name, value in named if name is not None}

    def under(self, config: object) -> Family:
        """Return the entry that holds for models of a config, without conditions.

        Example:
            >>> from transformers import StableLmConfig
            >>> entry = Family(model_type="x", when={"use_parallel_residual": {"parallel": True}})
            >>> entry.under(StableLmConfig(use_parallel_residual=True)).parallel
            True
        """
        found = replace(self, when={})
        for option, changes in self.when.items():
            name, _, number = option.partition("=")
            value = getattr(config, name, None)
            if str(value) == number if number else value:
                found = replace(found, **changes)
        return found
