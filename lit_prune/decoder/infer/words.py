"""What was inferred of a model, as a table to read before it is believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.decoder.family import Family

_OUTSIDE = ("layers", "embedding_norm", "final_norm", "head")
_MODULES = (
    "attention_norm", "attention", "query", "key", "value", "attention_output",
    "attention_post_norm", "mlp_norm", "mlp", "gate", "up", "mlp_output", "mlp_post_norm",
)  # fmt: skip


def told(family: Family, model: PreTrainedModel) -> str:
    """Return every part of an entry with its path and shape, as plain text.

    Args:
        family: What was found.
        model: Where.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_prune.decoder import Family
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        ...                      vocab_size=32, num_attention_heads=4, num_key_value_heads=2)
        >>> text = told(Family(model_type="own"), LlamaForCausalLM(config))
        >>> print("".join(text.splitlines(keepends=True)[:4]))  # doctest: +NORMALIZE_WHITESPACE
        own: found in LlamaForCausalLM, no module by its name
          layers              model.layers             2 × LlamaDecoderLayer
          final_norm          model.norm               LlamaRMSNorm [16]
          head                lm_head                  Linear [32, 16]
    """
    layers: Any = model.get_submodule(family.layers)
    lines = [f"{family.model_type}: found in {type(model).__name__}, no module by its name"]
    for role in _OUTSIDE:
        if (path := getattr(family, role)) is not None:
            module: Any = model.get_submodule(path)
            what = f"{len(layers)} × {type(layers[0]).__name__}" if module is layers else None
            lines.append(_line(role, path, what or _shape(module)))
    lines.append("in each layer")
    lines += [
        _line(role, path, _shape(layers[0].get_submodule(path)))
        for role in _MODULES
        if (path := getattr(family, role)) is not None
    ]
    for path in family.attention_extras:
        shape = list(layers[0].get_parameter(path).shape)
        lines.append(_line("attention_extras", path, f"{shape}, no unit's own"))
    lines += [_line(name, str(value), "") for name, value in _rest(family, layers[0])]
    reads = "what enters the layer" if family.parallel else "that"
    lines.append(
        f"Each of the {len(layers)} layers, run with random weights, returns its input, what the "
        f"attention writes, and what the MLP writes of {reads}; nothing else."
    )
    lines += [f"refused: {unit}: {reason}" for unit, reason in family.refuses.items()]
    lines.append("Read it, then register_family(family) and check_family(a tiny random model).")
    return "\n".join(lines)


def _rest(family: Family, layer: Any) -> list[tuple[str, Any]]:  # noqa: ANN401 - a module
    """Return the fields that are no paths, where they say something."""
    attention: Any = layer.get_submodule(family.attention)
    sizes = [
        (role, f"{name} = {getattr(attention, name)}")
        for role in ("head_dim", "queries_per_group")
        if (name := getattr(family, role)) is not None
    ]
    fields = (
        "head_counts", "interleaved", "transposed", "mlp_chain", "parallel", "adds_residual",
        "residual_scale", "per_layer", "config_names",
    )  # fmt: skip
    others = [(name, getattr(family, name)) for name in fields]
    return sizes + [(name, value) for name, value in others if value]


def _line(role: str, path: str, what: str) -> str:
    return f"  {role:<19} {path:<34} {what}".rstrip()


def _shape(module: Any) -> str:  # noqa: ANN401 - a module
    weight = getattr(module, "weight", None)
    return type(module).__name__ + (f" {list(weight.shape)}" if weight is not None else "")
