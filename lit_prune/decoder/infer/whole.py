"""A family entry found by running a model: explicit, printed, and to be confirmed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_prune.decoder.describe import refuse_altered_weights
from lit_prune.decoder.families import family_name, refuse_known_kind
from lit_prune.decoder.family import Family
from lit_prune.decoder.head import TASKS, task_named
from lit_prune.decoder.infer.counts import find_counts
from lit_prune.decoder.infer.cut import refuse_standing_in
from lit_prune.decoder.infer.outside import watch
from lit_prune.decoder.infer.stream import find_stream
from lit_prune.decoder.infer.trial import not_inferred
from lit_prune.decoder.infer.units import find_channels, find_heads
from lit_prune.decoder.infer.words import told
from lit_prune.decoder.projections import Projection
from lit_prune.decoder.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from lit_prune.decoder.infer.outside import Outside
    from lit_prune.decoder.infer.trial import Trial

# As Llama calls them; what surgery writes into a config where all layers are alike.
_FIELDS = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size",
)  # fmt: skip
_NO_LISTS = ("layer_types", "architectures")


def infer_family(model: PreTrainedModel, *, tell: Callable[[str], object] = print) -> Family:
    """Find the parts of a model whose type lit_prune does not know, and print them.

    No module is told by its name. Each layer is copied, given random weights, and run on random
    numbers: which module is the attention, which rows belong to a head, what a norm reads, shows in
    what changes when something is changed; and the layer must return its input and what attention
    and MLP write, nothing else. Attributes and fields of the config must hold the right number;
    names choose between those that do. What is ambiguous or not explained is refused.

    The entry says what holds for this model: a model of the same type whose config makes another of
    it (`Family.when`) needs conditions that no model shows. Read what is printed, register it, and
    run the contract, which infers nothing.

    Args:
        model: A causal language model, best a tiny random one on the CPU, with two KV groups or
            more. It is left bit for bit as it is; one layer at a time is copied.
        tell: What the table of what was found is handed to.

    Returns:
        The entry, not registered.

    Raises:
        UnsupportedModelError: Names what is not explained, and what was found.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_prune.decoder import infer_family, register_family
        >>> from lit_prune.testing import check_family
        >>> class OwnConfig(LlamaConfig):
        ...     model_type = "infer_own"
        >>> class OwnForCausalLM(LlamaForCausalLM):
        ...     config_class = OwnConfig
        >>> model = OwnForCausalLM(OwnConfig(hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        ...     pad_token_id=0, max_position_embeddings=64, initializer_range=0.3))
        >>> family = infer_family(model)  # doctest: +ELLIPSIS
        infer_own: found in OwnForCausalLM...
        >>> register_family(family)
        >>> check_family(model).granularities
        ('block', 'sub_block', 'kv_group', 'channel')
        >>> from lit_prune.decoder import FAMILIES
        >>> del FAMILIES["infer_own"]  # for this page only
    """
    refuse_known_kind(model)
    if task_named(type(model).__name__) is None:
        raise not_inferred(
            f"{type(model).__name__} is not a causal language model with a head; pass the whole "
            f"model: {', '.join(f'…{end}' for end in TASKS)}"
        )
    refuse_altered_weights(model)
    with quiet(model):
        outside = watch(model)
        found, scale, groups = _of_layer(first := outside.trial(0))
        for index in range(1, len(outside.layers)):
            other, other_scale, _ = _of_layer(trial := outside.trial(index))
            if other != found or abs(other_scale - scale) > 1e-4:
                raise not_inferred(
                    f"{trial.path} is not made as {first.path}", _differences(found, other)
                )
    per_layer = _listed_in(model.config, len(outside.layers))
    _refuse_numbers_that_differ(outside, model.config, per_layer)
    output = outside.layers[0].get_submodule(found.mlp_output)
    channels = Projection(output, found.transposed).in_features
    family = replace(
        found,
        model_type=family_name(model.config.model_type),
        layers=outside.path,
        final_norm=outside.final_norm,
        head=outside.head,
        embedding_norm=outside.embedding_norm,
        residual_scale=_scaled_by(model.config, scale),
        config_names=_names_in(model.config, groups, channels),
        per_layer=per_layer,
    )
    tell(told(family, model))
    return family


def _of_layer(trial: Trial) -> tuple[Family, float, int]:
    """Return an entry whose fields about a layer hold, its residual factor, and its KV groups."""
    stream = find_stream(trial)
    attention, mlp = stream.attention, stream.mlp
    refuse_standing_in(trial, stream)
    channels = find_channels(trial, mlp)
    heads, *sizes = find_heads(trial, attention)
    if heads.transposed != channels.transposed:
        raise trial.refusal("stores the projections of attention and MLP in two ways")
    counted = find_counts(trial, heads, (sizes[0], sizes[1], sizes[2]))
    entry = replace(
        counted,
        mlp=channels.mlp,
        mlp_chain=channels.mlp_chain,
        gate=channels.gate,
        up=channels.up,
        mlp_output=channels.mlp_output,
        refuses={**counted.refuses, **channels.refuses},
        attention_norm=attention.norm,
        attention_post_norm=attention.post_norm,
        mlp_norm=mlp.norm,
        mlp_post_norm=mlp.post_norm,
        parallel=stream.parallel,
        adds_residual=attention.adds_residual,
    )
    if not entry.separates:
        raise trial.refusal(
            f"has no norm that tells where {attention.path} ends and {mlp.path} begins: one behind "
            "the attention or in front of the MLP, and one at each of them"
        )
    return entry, stream.scale, sizes[1]


def _differences(one: Family, other: Family) -> list[str]:
    names = (name for name in Family.__dataclass_fields__)
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in names)
    return [f"{name} {a!r} and {b!r}" for name, a, b in pairs if a != b] or ["another factor"]


def _refuse_numbers_that_differ(
    outside: Outside,
    config: Any,  # noqa: ANN401 - untyped upstream
    per_layer: tuple[str, ...],
) -> None:
    """Need that the config says which layers hold other numbers: a removed one leaves its number.

    A list with an entry for each layer is cut with the layers. What a layer works out from its
    place in the stack (one over its depth, say) would be another when the model is loaded again.
    """
    lists = [getattr(config, name, None) for name in ("layer_types", *per_layer)]
    seen: dict[object, tuple[int, dict[str, object]]] = {}
    for index, layer in enumerate(outside.layers):
        numbers = {
            f"{path}.{name}".lstrip("."): value
            for path, module in layer.named_modules()
            for name, value in vars(module).items()
            if type(value) in (bool, int, float) and name not in ("layer_idx", "training")
        }
        kind = tuple(None if each is None else each[index] for each in lists)
        first, others = seen.setdefault(kind, (index, numbers))
        if numbers != others:
            names = sorted(k for k in numbers | others if numbers.get(k) != others.get(k))
            raise not_inferred(
                f"layers {first} and {index} hold different numbers, and no list of the config "
                f"says why: {names[0]} is {others.get(names[0])!r} and {numbers.get(names[0])!r}"
            )


def _scaled_by(config: Any, scale: float) -> str | None:  # noqa: ANN401 - untyped upstream
    if scale == 1.0:
        return None
    held: dict[str, Any] = vars(config)
    fits = [
        name
        for name, value in held.items()
        if type(value) in (int, float) and abs(value - scale) < 1e-4
    ]
    if len(fits) != 1:
        raise not_inferred(
            f"what sub-blocks write is multiplied by {scale:.6g}, which is not the value of one "
            "field of the config",
            fits,
        )
    return fits[0]


def _names_in(config: Any, groups: int, channels: int) -> dict[str, str | None]:  # noqa: ANN401
    """Return the fields of a config that are not called as Llama's; None where none is told."""
    own = getattr(config, "attribute_map", {})
    named = {name: own.get(name, name if name in vars(config) else None) for name in _FIELDS}
    for name, size, words in (
        ("num_key_value_heads", groups, ("kv", "key_value")),
        ("intermediate_size", channels, ("inner", "inter", "ff", "mlp")),
    ):
        fits = [
            field
            for field, value in vars(config).items()
            if type(value) is int and value == size and any(word in field for word in words)
        ]
        if named[name] is None and len(fits) == 1:
            named[name] = fits[0]
    return {name: found for name, found in named.items() if found != name}


def _listed_in(config: Any, count: int) -> tuple[str, ...]:  # noqa: ANN401 - untyped upstream
    """Return the fields of a config with one number or truth value for each layer."""
    return tuple(
        name
        for name, value in vars(config).items()
        if isinstance(value, list | tuple)
        and len(value) == count > 1
        and name not in _NO_LISTS
        and not name.endswith(("_token_id", "_token_ids"))
        and all(isinstance(each, int | float) for each in value)
    )
