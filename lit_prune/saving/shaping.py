"""Giving the layers of an empty model the shapes of a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_prune.decoder import KINDS, ConstantOutput, DecoderParts, SubBlockKind
from lit_prune.saving.layout import AttentionLayout, MlpLayout, RemovedLayout, projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.saving.layout import Layout


def shape_layers(model: PreTrainedModel, layout: Layout) -> None:
    """Replace what differs in every layer of ``model``, which is on the meta device.

    Args:
        model: A stock model with the hidden size, head dimension and number of layers of
            ``layout``.
        layout: The layers as they shall be.
    """
    parts = DecoderParts(model)
    for index, layer in enumerate(layout.layers):
        for kind in KINDS:
            wanted = layer.attention if kind == "attention" else layer.mlp
            if isinstance(wanted, RemovedLayout):
                _remove(parts, index, kind, layout.hidden_size if wanted.constant else None)
                continue
            sizes = _sizes(wanted, layout.hidden_size)
            for role, path in projections(parts.family, kind).items():
                linear = nn.Linear(*sizes[role], bias=role in wanted.biases, device="meta")
                _replace(parts.layers[index], path, linear)
            if isinstance(wanted, AttentionLayout):
                attention: Any = parts.sub_block(index, kind)
                attention.num_key_value_groups = wanted.queries_per_group
                attention.layer_idx = wanted.cache_slot


def _sizes(wanted: AttentionLayout | MlpLayout, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Return in and out features of each projection, by role."""
    if isinstance(wanted, MlpLayout):
        wide = (hidden_size, wanted.channels)
        return {"gate": wide, "up": wide, "output": wide[::-1]}
    keys = wanted.kv_groups * wanted.head_dim
    queries = keys * wanted.queries_per_group
    return {
        "query": (hidden_size, queries),
        "key": (hidden_size, keys),
        "value": (hidden_size, keys),
        "output": (queries, hidden_size),
    }


def _remove(parts: DecoderParts, index: int, kind: SubBlockKind, constant: int | None) -> None:
    bias = None if constant is None else nn.Parameter(torch.empty(constant, device="meta"))
    module = ConstantOutput(bias, returns_weights=kind == "attention")
    _replace(parts.layers[index], parts.sub_block_path(kind), module)
    _replace(parts.layers[index], parts.norm_path(kind), nn.Identity())


def _replace(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, module)
