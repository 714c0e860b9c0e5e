"""Mixtures of experts on their way into a stock class.

A removed mixture comes back as one of zeros, which adds nothing wherever tokens are routed. A
removed *expert* cannot: whatever row the router has for it, some tokens would choose it, and no
finite row is minus infinity. So layers must keep equally many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder.layout import ExpertsLayout, MlpLayout, RemovedLayout

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import Family
    from lit_prune.decoder.layout import LayerLayout
    from lit_prune.saving.body import Body, Widths


def uneven_experts(body: Body) -> str | None:
    """Say where layers hold different numbers of experts, or return None."""
    first: tuple[int, int] | None = None
    for index, layer in body.layers.items():
        if not isinstance(layer.mlp, ExpertsLayout):
            continue
        first = first or (index, layer.mlp.experts)
        if layer.mlp.experts != first[1]:
            return (
                f"layer {index} has {layer.mlp.experts} experts and layer {first[0]} has "
                f"{first[1]}, a stock class has one number for all layers, and an expert of zeros "
                "would be chosen (prune with allocator='uniform_widths')"
            )
    return None


def count_field(family: Family) -> str | None:
    """Return how ``config.json`` of a stock class calls the number of experts.

    Example:
        >>> from lit_prune.decoder import FAMILIES
        >>> count_field(FAMILIES["mixtral"]), count_field(FAMILIES["olmoe"])
        ('num_local_experts', 'num_experts')
    """
    from transformers import CONFIG_MAPPING

    if family.experts is None:
        return None
    count = family.experts.count
    return str(CONFIG_MAPPING[family.model_type].attribute_map.get(count, count))


def width_fields(body: Body, widths: Widths) -> dict[str, Any]:
    """Return what a config says about MLPs and experts of one width each.

    Where all layers have experts, ``intermediate_size`` is that of an expert, and stays.
    """
    fields: dict[str, Any] = {}
    parts = [layer.mlp for layer in body.layers.values()]
    counts = {part.experts for part in parts if isinstance(part, ExpertsLayout)}
    if not counts or any(isinstance(part, MlpLayout) for part in parts):
        fields["intermediate_size"] = widths.channels
    if counts and (count := count_field(body.family)) is not None:
        fields[count] = max(counts)
    return fields


def packed_notes(body: Body) -> tuple[str, ...]:
    """Say what other readers than transformers make of packed experts."""
    experts = body.family.experts
    if experts is None or not experts.stored_apart:
        return ()
    return (
        "Experts are stored packed, as transformers 5 holds them. Servers that read one tensor for "
        "each expert want what AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes.",
    )


def widened_experts(
    body: Body, layer: LayerLayout, own: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """Return the tensors of a mixture by path in its layer; None where the layer has a plain MLP.

    Args:
        body: Holds the layer.
        layer: Its shape.
        own: Its tensors, by path in the layer.
    """
    inside = f"{body.family.mlp}."
    if isinstance(layer.mlp, ExpertsLayout):
        return {path: tensor for path, tensor in own.items() if path.startswith(inside)}
    others = [i for i, x in body.layers.items() if isinstance(x.mlp, ExpertsLayout)]
    if not others or not isinstance(layer.mlp, RemovedLayout):
        return None
    prefix = f"{body.family.layers}.{others[0]}."
    return {
        path: torch.zeros_like(tensor)
        for name, tensor in body.tensors.items()
        if (path := name.removeprefix(prefix)) != name and path.startswith(inside)
    }
