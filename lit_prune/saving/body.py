"""A decoder on its way into a stock class: empty layers gone, every layer in the same widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import FAMILIES, Family
from lit_prune.decoder.layout import (
    AttentionLayout,
    LayerLayout,
    MlpLayout,
    RemovedLayout,
    layout_of,
    projections,
)
from lit_prune.saving.experts import widened_experts
from lit_prune.saving.weights import tensors_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Body:
    """What stays of a model when layers that do nothing leave.

    Attributes:
        family: Where its parts are.
        hidden_size: Width of the residual stream.
        head_dim: Width of a head.
        layers: By index in the model, in order.
        shells: Layers that only hold a constant.
        tensors: Everything that is stored, under the names of the model; constants have moved.
        ties: Further name → the stored name.
        notes: What moved, in sentences.
    """

    family: Family
    hidden_size: int
    head_dim: int
    layers: dict[int, LayerLayout]
    shells: frozenset[int]
    tensors: dict[str, Tensor]
    ties: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Widths:
    """One width for all layers: KV heads, query heads for each, channels."""

    kv_groups: int
    queries_per_group: int
    channels: int

    @classmethod
    def of(cls, body: Body) -> Widths:
        """Return the widest of each."""
        parts = [part for layer in body.layers.values() for part in (layer.attention, layer.mlp)]
        attentions = [part for part in parts if isinstance(part, AttentionLayout)]
        return cls(
            kv_groups=max(part.kv_groups for part in attentions),
            queries_per_group=max(part.queries_per_group for part in attentions),
            channels=max(
                (part.channels for part in parts if isinstance(part, MlpLayout)), default=1
            ),
        )


def body_of(model: PreTrainedModel) -> Body:
    """Drop the layers of a model that hold nothing but constants.

    A constant goes into the bias of the sub-block before it; in front of the first one it goes into
    the embeddings. Both are exact: nothing reads the residual stream in between.
    """
    layout = layout_of(model)
    family = FAMILIES[layout.family]
    stored, ties = tensors_of(model)
    tensors = dict(stored)
    embeddings = next(n for n, p in model.named_parameters() if p is _embedding(model))
    free = embeddings not in ties.values() and _plain_residual(model)
    layers: dict[int, LayerLayout] = {}
    shells: set[int] = set()
    notes = []
    for index, layer in enumerate(layout.layers):
        empty = isinstance(layer.attention, RemovedLayout) and isinstance(layer.mlp, RemovedLayout)
        names = _constants(family, index, layer) if empty else []
        if not empty:
            layers[index] = layer
        elif not names:
            continue
        elif layers.keys() - shells:
            last = max(layers.keys() - shells)
            bias, layers[last] = _with_output_bias(family, last, layers[last])
            old = tensors.get(bias)
            tensors[bias] = _sum([tensors.pop(n) for n in names] + ([] if old is None else [old]))
            notes.append(f"The constant of layer {index} was added to {bias}.")
        elif free:
            constant = _sum([tensors.pop(name) for name in names])
            tensors[embeddings] = tensors[embeddings] + constant
            notes.append(f"The constant of layer {index} was added to the embeddings.")
        else:
            layers[index] = layer
            shells.add(index)
            notes.append(f"Layer {index} is zeros and a bias: it holds a constant.")
    return Body(
        family=family,
        hidden_size=layout.hidden_size,
        head_dim=next(iter(layout.attentions.values())).head_dim,
        layers=layers,
        shells=frozenset(shells),
        tensors=tensors,
        ties=ties,
        notes=tuple(notes),
    )


def widen(body: Body, index: int, widths: Widths, biased: frozenset[str]) -> dict[str, Tensor]:
    """Return the tensors of a layer in the given widths, by path in the layer.

    Args:
        body: Holds the layer.
        index: Which one, counted in the model.
        widths: At least as wide as the layer.
        biased: Names of the projections that have a bias, a zero one where the layer has none.
    """
    family, layer = body.family, body.layers[index]
    prefix = f"{family.layers}.{index}."
    own = {n.removeprefix(prefix): t for n, t in body.tensors.items() if n.startswith(prefix)}
    like = next(iter(body.tensors.values()))
    experts = widened_experts(body, layer, own)
    wide: dict[str, Tensor] = {**(experts or {})}
    for path, (narrow, new) in _units(body, layer, widths).items():
        if experts is not None and path in projections(family, "mlp"):
            continue
        weight, bias = own.get(f"{path}.weight"), own.get(f"{path}.bias")
        narrow_rows, new_rows = (*narrow, body.hidden_size), (*new, body.hidden_size)
        if path in (
            family.output("attention"),
            family.output("mlp"),
        ):  # its columns belong to units
            columns = None if weight is None else weight.T
            grown = _grow(columns, narrow_rows, new_rows, like).flatten(0, -2).T.contiguous()
            # of a removed sub-block: its constant
            bias = own.get(f"{path.rpartition('.')[0]}.bias") if bias is None else bias
            full_bias = like.new_zeros(body.hidden_size) if bias is None else bias
        else:
            grown = _grow(weight, narrow_rows, new_rows, like).flatten(0, -2)
            full_bias = _grow(bias, narrow, new, like).flatten()
        wide[f"{path}.weight"] = grown
        if path.rpartition(".")[2] in biased:
            wide[f"{path}.bias"] = full_bias
    # where a sub-block went, its norms may hold anything
    for norm in (*family.norms("attention"), *family.norms("mlp")):
        for leaf in ("weight", "bias"):  # those of the last one, which is of the same class
            if (last := body.tensors.get(f"{family.final_norm}.{leaf}")) is not None:
                wide[f"{norm}.{leaf}"] = own.get(f"{norm}.{leaf}", torch.ones_like(last))
    for path in family.per_head:
        narrow, new = (tuple(axes[:2]) for axes in _units(body, layer, widths)[family.query])
        wide[path] = _grow(own.get(path), narrow, new, like).flatten()
    for path in family.attention_extras:
        others = (t for n, t in body.tensors.items() if n.endswith(f".{path}"))
        wide[path] = own.get(path, torch.ones_like(next(others, like.new_ones(body.head_dim))))
    return wide


def _units(
    body: Body, layer: LayerLayout, widths: Widths
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the units of each projection as axes, in the layer and widened."""
    groups = queries = channels = 0
    if isinstance(layer.attention, AttentionLayout):
        groups, queries = layer.attention.kv_groups, layer.attention.queries_per_group
    if isinstance(layer.mlp, MlpLayout):
        channels = layer.mlp.channels
    d = body.head_dim
    heads = (groups, queries, d), (widths.kv_groups, widths.queries_per_group, d)
    keys = (groups, d), (widths.kv_groups, d)
    query, key, value, output = projections(body.family, "attention")
    mlp = dict.fromkeys(projections(body.family, "mlp"), ((channels,), (widths.channels,)))
    return {query: heads, key: keys, value: keys, output: heads, **mlp}


def _grow(
    old: Tensor | None, narrow: tuple[int, ...], new: tuple[int, ...], like: Tensor
) -> Tensor:
    """Put a tensor into a corner of zeros."""
    if old is not None and narrow == new:
        return old.reshape(new)
    grown = (like if old is None else old).new_zeros(new)
    if old is not None:
        grown[tuple(slice(size) for size in narrow)] = old.reshape(narrow)
    return grown


def _constants(family: Family, index: int, layer: LayerLayout) -> list[str]:
    parts = {family.attention: layer.attention, family.mlp: layer.mlp}
    return [
        f"{family.layers}.{index}.{path}.bias"
        for path, part in parts.items()
        if isinstance(part, RemovedLayout) and part.constant
    ]


def _with_output_bias(family: Family, index: int, layer: LayerLayout) -> tuple[str, LayerLayout]:
    """Return the name of the last output bias of a layer, and the layer with it."""
    path = family.mlp_output
    if isinstance(layer.mlp, MlpLayout):
        names = dict.fromkeys((*layer.mlp.biases, path.rpartition(".")[2]))
        layer = replace(layer, mlp=replace(layer.mlp, biases=tuple(names)))
    else:
        path = family.attention_output
        assert isinstance(layer.attention, AttentionLayout)  # noqa: S101 - the layer is not empty
        names = dict.fromkeys((*layer.attention.biases, path.rpartition(".")[2]))
        layer = replace(layer, attention=replace(layer.attention, biases=tuple(names)))
    return f"{family.layers}.{index}.{path}.bias", layer


def _sum(tensors: list[Tensor]) -> Tensor:
    whole = torch.stack([tensor.double() for tensor in tensors]).sum(0)
    return whole.to(tensors[0].dtype)


def _embedding(model: PreTrainedModel) -> Tensor:
    embedding: Any = model.get_input_embeddings()
    weight: Tensor = embedding.weight
    return weight


def _plain_residual(model: PreTrainedModel) -> bool:
    """Whether embeddings and outputs enter the residual stream as they are (Granite may scale)."""
    scales = ("embedding_multiplier", "residual_multiplier")
    plain = type(model.get_input_embeddings()) is torch.nn.Embedding  # Gemma's scales
    return plain and all(getattr(model.config, name, 1) == 1 for name in scales)
