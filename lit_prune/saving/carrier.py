"""Which stock class can hold a decoder, and the decoder in it.

Granite is a Llama with four multipliers, biases on request and any number of heads: with all
multipliers at one it computes what Llama, Mistral and Qwen2 compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import FAMILIES, task_of
from lit_prune.errors import FormatError
from lit_prune.metrics import footprint_of
from lit_prune.saving.body import widen
from lit_prune.saving.difference import difference, other_trait
from lit_prune.saving.experts import packed_notes, uneven_experts, width_fields
from lit_prune.saving.prepared import PreparedDirectory, plain_config
from lit_prune.saving.servers import vllm_notes
from lit_prune.saving.skeleton import as_read, build, stock_classes
from lit_prune.saving.weights import dtypes_of, tensors_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lit_prune.saving.body import Body, Widths

_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_ATTENTION = _QKV | {"o_proj"}
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a stock class can express.

    Attributes:
        flags: Config fields, and the projections that each gives a bias (all or none of them).
        always: Projections that always have one.
        divisor: Whether the number of heads must divide the hidden size.
        unlike: What it has and the carrier has not, or None where the carrier computes the same.
        even_heads: Whether heads are always ``hidden_size / heads`` wide.
        even_rope: Types of rotary positions under which they are.
        channels: Channels of every MLP, as a multiple of the hidden size, where none can be chosen.
    """

    flags: dict[str, frozenset[str]] = field(default_factory=dict)
    always: frozenset[str] = frozenset()
    divisor: bool = False
    unlike: str | None = None
    even_heads: bool = False
    even_rope: frozenset[str] = frozenset()
    channels: int | None = None

    def widened(self, body: Body, widths: Widths, config: Mapping[str, Any]) -> Widths:
        """Return the narrowest widths that it can express, at least these."""
        kinds = {str((config.get("rope_parameters") or {}).get("rope_type"))}
        if self.even_heads or kinds & self.even_rope:
            heads = body.hidden_size // body.head_dim
            widths = replace(widths, kv_groups=heads // widths.queries_per_group)
        if self.channels is not None:
            widths = replace(widths, channels=self.channels * body.hidden_size)
        return widths


_ONLY_ATTENTION = {"attention_bias": _ATTENTION}
_DENSE = frozenset({"query_key_value", "dense"})
_FOUR_H = frozenset({"dense_h_to_4h", "dense_4h_to_h"})
_BEHIND = "norms behind sub-blocks"
_TOGETHER = "layers that add attention and MLP together"
_EXPERTS = "mixtures of experts"
_BOTH = {**_ONLY_ATTENTION, "mlp_bias": _MLP}
TARGETS = {
    "llama": Target(flags=_BOTH, divisor=True),
    "mistral": Target(),
    "ministral": Target(unlike="windows that differ between layers"),
    "qwen2": Target(always=_QKV),
    "qwen3": Target(flags=_ONLY_ATTENTION, unlike="norms over queries and keys"),
    "granite": Target(flags=_BOTH),
    "smollm3": Target(flags=_BOTH, unlike="layers without rotary positions"),
    "gemma": Target(flags=_ONLY_ATTENTION, unlike="norms with weights around zero"),
    "gemma2": Target(flags=_ONLY_ATTENTION, divisor=True, unlike=_BEHIND),
    "gemma3_text": Target(flags=_ONLY_ATTENTION, divisor=True, unlike=_BEHIND),
    "olmo": Target(flags=_ONLY_ATTENTION, unlike="norms without weights"),
    "olmo2": Target(flags=_ONLY_ATTENTION, unlike=_BEHIND),
    "olmo3": Target(flags=_ONLY_ATTENTION, unlike=_BEHIND),
    "starcoder2": Target(
        flags={"use_bias": _ATTENTION | {"c_fc", "c_proj"}}, unlike="MLPs without a gate"
    ),
    "stablelm": Target(
        flags={"use_qkv_bias": _QKV}, even_heads=True, unlike="partly rotary positions"
    ),
    "cohere": Target(flags=_ONLY_ATTENTION, unlike=_TOGETHER),
    "cohere2": Target(flags=_ONLY_ATTENTION, even_heads=True, unlike=_TOGETHER),
    "phi": Target(always=_QKV | {"dense", "fc1", "fc2"}, unlike=_TOGETHER),
    "phi3": Target(even_rope=frozenset({"longrope"}), unlike="fused projections"),
    "gpt2": Target(
        always=frozenset({"c_attn", "c_fc", "c_proj"}), even_heads=True, unlike="learned positions"
    ),
    "gpt_neox": Target(
        flags={"attention_bias": _DENSE},
        always=_FOUR_H,
        even_heads=True,
        unlike="MLPs without a gate",
    ),
    "opt": Target(
        flags={"enable_bias": _QKV | {"out_proj", "fc1", "fc2"}},
        even_heads=True,
        unlike="learned positions",
    ),
    "falcon": Target(
        flags={"bias": _DENSE | _FOUR_H}, even_heads=True, unlike="MLPs without a gate"
    ),
    "bloom": Target(
        always=_DENSE | _FOUR_H, even_heads=True, channels=4, unlike="biases of the attention"
    ),
    "mixtral": Target(unlike=_EXPERTS),
    "qwen2_moe": Target(flags={"qkv_bias": _QKV}, unlike=_EXPERTS),
    "qwen3_moe": Target(flags=_ONLY_ATTENTION, unlike=_EXPERTS),
    "olmoe": Target(flags=_ONLY_ATTENTION, unlike=_EXPERTS),
    "gpt_oss": Target(flags=_ONLY_ATTENTION, unlike=_EXPERTS),
}
CARRIER = "granite"


def carry(
    model: PreTrainedModel, body: Body, widths: Widths, name: str, *, padded: bool
) -> PreparedDirectory:
    """Prepare a decoder of one width in its own stock class, or else in the carrier.

    Args:
        model: Where ``body`` comes from.
        body: The decoder.
        widths: Of all layers.
        name: Format, for messages.
        padded: Whether layers may be widened to what a class can express.

    Raises:
        FormatError: If neither class can hold it; says what blocks each.
    """
    needed = _needed(body)
    refusals = []
    for target in _targets(model, body):
        wide = _wide(model, body, widths, target) if padded else widths
        reason = _blocked(model, body, wide, target, needed)
        if reason is None:
            return _in(model, body, wide, target, needed, name)
        refusals.append(reason)
    raise FormatError(name, "; ".join(refusals))


def can_pad_into(model: PreTrainedModel, body: Body, widths: Widths) -> bool:
    """Return whether `carry` would find a class to pad into, without making anything."""
    needed = _needed(body)
    return any(
        _blocked(model, body, _wide(model, body, widths, target), target, needed) is None
        for target in _targets(model, body)
    )


def _wide(model: PreTrainedModel, body: Body, widths: Widths, target: str) -> Widths:
    can = TARGETS.get(target)
    return widths if can is None else can.widened(body, widths, model.config.to_dict())


def _targets(model: PreTrainedModel, body: Body) -> tuple[str, ...]:
    """Return the families whose classes may hold it; the carrier has no classifiers."""
    own = body.family.model_type
    carrier = (CARRIER,) if stock_classes(CARRIER, task_of(model))[1] is not None else ()
    return tuple(dict.fromkeys((own, *carrier)))


def _needed(body: Body) -> dict[str, int]:
    """Return the projections that need a bias, each with the first layer that needs it."""
    found: dict[str, int] = {}
    for index, layer in body.layers.items():
        for name in layer.biases:
            found.setdefault(name, index)
    return found


def _blocked(
    model: PreTrainedModel, body: Body, widths: Widths, target: str, needed: dict[str, int]
) -> str | None:
    """Say why a stock class cannot hold this decoder, or return None."""
    if target not in TARGETS:
        return (
            f"what the class of {target!r} can hold is not known to lit_prune (apply_plan makes "
            "the model again from the dense one, its plan and its compensation)"
        )
    can, class_name = TARGETS[target], stock_classes(target, task_of(model))[1].__name__
    if len(dtypes := dtypes_of(model)) > 1:
        words = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"its parameters are {words}, transformers loads one dtype"
    possible = can.always.union(*can.flags.values())
    if missing := sorted(needed.keys() - possible):
        return (
            f"{class_name} has no bias on {', '.join(missing)} (layer {needed[missing[0]]} needs "
            "one)"
        )
    heads = widths.kv_groups * widths.queries_per_group
    if can.divisor and body.hidden_size % heads:
        return (
            f"it has {heads} heads in each layer, {class_name} needs a divisor of hidden_size "
            f"{body.hidden_size}"
        )
    fixed = can.widened(body, widths, model.config.to_dict())
    if fixed.kv_groups != widths.kv_groups or (can.even_heads and body.hidden_size % body.head_dim):
        return (
            f"it has {heads} heads of {body.head_dim} in each layer, those of {class_name} are "
            f"hidden_size {body.hidden_size} wide together"
        )
    if fixed.channels != widths.channels:
        return (
            f"it has {widths.channels} channels in each layer, {class_name} always has "
            f"{fixed.channels}"
        )
    own = body.family.model_type
    if target == own:
        return uneven_experts(body)
    if own not in TARGETS:
        return f"whether {class_name} computes what {type(model).__name__} does is not known"
    if TARGETS[own].unlike is not None:
        return f"{class_name} has no {TARGETS[own].unlike}"
    config = model.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    slides = types is None or "sliding_attention" in types
    if window is not None and slides and window < config.max_position_embeddings:
        return f"{class_name} has no sliding window, this model looks back {window} tokens"
    return None


def _in(
    model: PreTrainedModel,
    body: Body,
    widths: Widths,
    target: str,
    needed: dict[str, int],
    name: str,
) -> PreparedDirectory:
    """Write the decoder in the terms of one stock class."""
    can, (config_class, model_class) = TARGETS[target], stock_classes(target, task_of(model))
    flags = {flag: bool(group & needed.keys()) for flag, group in can.flags.items()}
    biased = can.always.union(*(can.flags[flag] for flag, on in flags.items() if on))
    raw = plain_config(model)
    relabelled = target != body.family.model_type
    if relabelled:
        raw = {k: v for k, v in raw.items() if k in config_class.__dataclass_fields__} | {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "attention_multiplier": body.head_dim**-0.5,
            "dtype": raw["dtype"],
        }
    else:
        for listed in ("layer_types", *body.family.per_layer):
            if raw.get(listed) is not None:
                raw[listed] = [raw[listed][index] for index in body.layers]
    sizes = {
        "num_hidden_layers": len(body.layers),
        "head_dim": body.head_dim,
        "num_key_value_heads": widths.kv_groups,
        "num_attention_heads": widths.kv_groups * widths.queries_per_group,
        **width_fields(body, widths),
    }
    raw |= flags | FAMILIES[target].in_config(sizes)
    raw |= {"model_type": target, "architectures": [model_class.__name__]}
    config = as_read(raw)
    skeleton = build(config)
    if difference(skeleton, model) is None:
        tensors, ties = tensors_of(model)
        packed = packed_notes(body)
        return _prepared(name, config, tensors, ties, skeleton, verbatim=True, notes=packed)
    numbers = {index: position for position, index in enumerate(body.layers)}
    layers = f"{body.family.layers}."
    tensors = {n: t for n, t in body.tensors.items() if not n.startswith(layers)}
    for index, position in numbers.items():
        wide = widen(body, index, widths, biased)
        tensors |= {f"{layers}{position}.{path}": tensor for path, tensor in wide.items()}
    wanted = {n: tuple(t.shape) for n, t in tensors_of(skeleton)[0].items()}
    got = {n: tuple(t.shape) for n, t in tensors.items()}
    found = other_trait(skeleton, model, {p: i for i, p in numbers.items()})
    if wanted != got or found is not None:
        found = found or f"{sorted(set(wanted.items()) ^ set(got.items()))[:2]}"
        raise FormatError(
            name,
            f"rebuilt from its own config it differs in {found}. Was a module replaced by hand?",
        )
    notes = [*body.notes, *packed_notes(body), *_taxes(model, skeleton)]
    if relabelled:
        notes.insert(
            0,
            f"Re-labelled from {body.family.model_type} to {target}, whose classes can hold it; it "
            "computes the same.",
        )
    return _prepared(name, config, tensors, body.ties, skeleton, notes=tuple(notes))


def _prepared(
    name: str,
    config: dict[str, Any],
    tensors: dict[str, Any],
    ties: dict[str, str],
    skeleton: PreTrainedModel,
    *,
    verbatim: bool = False,
    notes: tuple[str, ...] = (),
) -> PreparedDirectory:
    if task_of(skeleton) == "next_token":
        notes += vllm_notes(config, tensors)
    return PreparedDirectory(
        format=name,
        config=config,
        tensors=tensors,
        ties=ties,
        skeleton=skeleton,
        verbatim=verbatim,
        notes=notes,
    )


def _taxes(model: PreTrainedModel, skeleton: PreTrainedModel) -> list[str]:
    """Say what zeros cost, in parameters and FLOPs."""
    before, after = footprint_of(model, context_length=1), footprint_of(skeleton, context_length=1)
    words = []
    for what, key in (("parameters", "total_parameters"), ("FLOPs per token", "flops_per_token")):
        old, new = getattr(before, key), getattr(after, key)
        if new != old:
            words.append(f"{what} {old:,} → {new:,} ({new / old - 1:+.2%})")
    return [f"Padding with zeros costs: {', '.join(words)}."] if words else []
