"""A decoder on its way into a stock class: empty layers gone, every layer in the same widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import KINDS, Family, SubBlockKind, family_of
from lit_prune.decoder.layout import (
    AttentionLayout,
    LayerLayout,
    MlpLayout,
    RemovedLayout,
    layout_of,
    projections,
)
from lit_prune.decoder.projections import rows_by_role, unit_rows
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
    family = family_of(model)
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
    family = body.family
    prefix = f"{family.layers}.{index}."
    own = {n.removeprefix(prefix): t for n, t in body.tensors.items() if n.startswith(prefix)}
    like = next(iter(body.tensors.values()))
    experts = widened_experts(body, body.layers[index], own)
    wide: dict[str, Tensor] = {**(experts or {})}
    for kind in KINDS:
        if kind == "mlp" and experts is not None:
            continue
        here, there = _rows(body, index, kind), _rows(body, index, kind, widths)
        for path in projections(family, kind):
            weight, bias = own.get(f"{path}.weight"), own.get(f"{path}.bias")
            places = here[path], there[path]
            # units own rows of an input, columns of an output; either is stored across in places
            across = (path == family.output(kind)) != family.transposed
            lines = None if weight is None else weight.T if across else weight
            grown = _grow(lines, *places, (body.hidden_size,), like)
            wide[f"{path}.weight"] = grown.T.contiguous() if across else grown
            if path.rpartition(".")[2] not in biased:
                continue
            if path == family.output(kind):  # of a removed sub-block: its constant
                home = family.attention if kind == "attention" else family.mlp
                bias = own.get(f"{home}.bias") if bias is None else bias
                wide[f"{path}.bias"] = like.new_zeros(body.hidden_size) if bias is None else bias
            else:
                wide[f"{path}.bias"] = _grow(bias, *places, (), like)
    # where a sub-block went, its norms may hold anything
    for norm in (*family.norms("attention"), *family.norms("mlp")):
        for leaf in ("weight", "bias"):  # those of the last one, which is of the same class
            if (last := body.tensors.get(f"{family.final_norm}.{leaf}")) is not None:
                wide[f"{norm}.{leaf}"] = own.get(f"{norm}.{leaf}", torch.ones_like(last))
    for path in family.per_head:
        heads = _heads(body, index), _heads(body, index, widths)
        wide[path] = _grow(own.get(path), *heads, (), like)
    for path in family.attention_extras:
        others = (t for n, t in body.tensors.items() if n.endswith(f".{path}"))
        wide[path] = own.get(path, torch.ones_like(next(others, like.new_ones(body.head_dim))))
    return wide


def _rows(
    body: Body, index: int, kind: SubBlockKind, widths: Widths | None = None
) -> dict[str, tuple[Tensor, ...]]:
    """Return which lines of each projection every unit owns, in a layer as it is or in widths."""
    units, queries = _units(body, index, kind, widths)
    width = queries * body.head_dim if kind == "attention" else 1
    rows = rows_by_role(body.family, kind, units, body.head_dim, queries)
    return {**rows, body.family.output(kind): unit_rows((width,), units)}


def _heads(body: Body, index: int, widths: Widths | None = None) -> tuple[Tensor, ...]:
    """Return which query heads every KV group owns."""
    units, queries = _units(body, index, "attention", widths)
    return unit_rows((queries,), units)


def _units(body: Body, index: int, kind: SubBlockKind, widths: Widths | None) -> tuple[int, int]:
    """Return how many units there are, and query heads of each."""
    if widths is not None:
        units = widths.kv_groups if kind == "attention" else widths.channels
        return units, widths.queries_per_group
    part = body.layers[index].attention if kind == "attention" else body.layers[index].mlp
    if isinstance(part, AttentionLayout):
        return part.kv_groups, part.queries_per_group
    return (part.channels, 1) if isinstance(part, MlpLayout) else (0, 1)


def _grow(
    old: Tensor | None,
    here: tuple[Tensor, ...],
    there: tuple[Tensor, ...],
    rest: tuple[int, ...],
    like: Tensor,
) -> Tensor:
    """Put the lines of every unit where they belong among zeros, for each role."""
    grown = (like if old is None else old).new_zeros((sum(rows.numel() for rows in there), *rest))
    if old is None:
        return grown
    for narrow, wide in zip(here, there, strict=True):
        units, width = narrow.shape
        grown[wide[:units, :width].to(grown.device)] = old[narrow.to(grown.device)]
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
    if family_of(model).embedding_norm is not None:
        return False
    scales = ("embedding_multiplier", "residual_multiplier")
    plain = type(model.get_input_embeddings()) is torch.nn.Embedding  # Gemma's scales
    return plain and all(getattr(model.config, name, 1) == 1 for name in scales)
