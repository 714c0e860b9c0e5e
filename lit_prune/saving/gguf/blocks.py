"""Decoder layers as the tensors of llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_prune.decoder.layout import AttentionLayout, MlpLayout
from lit_prune.saving.body import Widths, widen

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import Family
    from lit_prune.saving.body import Body
    from lit_prune.saving.gguf.architecture import Architecture


def block_widths(choice: Architecture, body: Body) -> dict[int, Widths]:
    """Return what each layer is written in; no heads at all: 0.

    What llama.cpp gets wrong is written so that it cannot: a block that attends must have an MLP
    (its attention would be dropped), a constant in place of an attention needs a head to be added
    behind, and the first block tells the width of a head. Each is a unit of zeros.
    """
    if not choice.per_block:
        return dict.fromkeys(body.layers, Widths.of(body))
    found = {}
    for position, (index, layer) in enumerate(body.layers.items()):
        attention, mlp = layer.attention, layer.mlp
        channels = mlp.channels if isinstance(mlp, MlpLayout) else 1
        if isinstance(attention, AttentionLayout):
            groups, queries = attention.kv_groups, attention.queries_per_group
        else:
            groups = int(attention.constant or position == 0 or choice.fused)
            queries = 1
        found[index] = Widths(groups, queries, channels)
    return found


def block_tensors(
    choice: Architecture, body: Body, index: int, widths: Widths, position: int
) -> dict[str, Tensor]:
    """Return the tensors of one layer under the names of llama.cpp.

    Args:
        choice: The architecture.
        body: Holds the layer.
        index: Which one, counted in the model.
        widths: What it is written in.
        position: Its number in the file.
    """
    family, layer = body.family, body.layers[index]
    own = widen(body, index, widths, choice.needs.union(layer.biases))
    if not widths.kv_groups:
        kept = (family.mlp_norm, family.gate, family.up, family.mlp_output)
        own = {n: t for n, t in own.items() if n.rpartition(".")[0] in kept}
    if choice.permuted and widths.kv_groups:
        heads = {family.query: widths.kv_groups * widths.queries_per_group}
        heads[family.key] = widths.kv_groups
        for path, count in heads.items():
            for name in (f"{path}.weight", f"{path}.bias"):
                if name in own:
                    own[name] = neighbours(own[name], count)
    if choice.fused:
        parts = [own.pop(f"{path}.weight") for path in (family.query, family.key, family.value)]
        own["attn_qkv.weight"] = torch.cat(parts)
    names = _names(family)
    return {
        f"blk.{position}.{names.get(name.rpartition('.')[0], name.rpartition('.')[0])}."
        f"{name.rpartition('.')[2]}": tensor
        for name, tensor in own.items()
    }


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Reorder ``[heads * head_dim, ...]``: rotary halves of a head become neighbours.

    Example:
        >>> neighbours(torch.arange(8), heads=2)
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape).contiguous()


def _names(family: Family) -> dict[str, str]:
    known = {
        family.attention_norm: "attn_norm",
        family.query: "attn_q",
        family.key: "attn_k",
        family.value: "attn_v",
        family.attention_output: "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        family.mlp_norm: "ffn_norm",
        family.gate: "ffn_gate",
        family.up: "ffn_up",
        family.mlp_output: "ffn_down",
    }
    return {path: name for path, name in known.items() if path is not None}
