"""Experts leave: the packed parameters are sliced, or, in the reference, the router is told."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from lit_prune.decoder import DecoderParts, DecoderSpec, Routed, SubBlock
    from lit_prune.surgery.edits import StagedEdits


def slice_experts(
    edits: StagedEdits, parts: DecoderParts, layer: int, kept: tuple[int, ...]
) -> None:
    """Stage the parameters of router and bank with the kept experts alone.

    Args:
        edits: Where to.
        parts: The model's.
        layer: Which mixture.
        kept: Experts that stay, ascending.
    """
    routed, experts = parts.routed(layer), parts.family.experts
    assert routed is not None  # noqa: S101 - the spec says so
    assert experts is not None  # noqa: S101 - as above
    for module, name, parameter in routed.owned:
        rows = torch.tensor(kept, device=parameter.device)
        edits.parameter(module, name, parameter[rows], kept=(0, rows))
    for module in (routed.router, routed.bank):
        edits.attribute(module, experts.count, len(kept))


def expert_fields(
    edits: StagedEdits,
    parts: DecoderParts,
    spec: DecoderSpec,
    counts: Mapping[SubBlock, int],
    blocks: Sequence[int],
) -> dict[str, object]:
    """Return what the config says about experts when these blocks stay.

    Where layers keep different numbers the dense one stays, as other widths do. The model itself
    follows: its load-balancing loss counts the experts of a layer.
    """
    experts = parts.family.experts
    if experts is None:
        return {}
    fields: dict[str, object] = {}
    left = {
        counts[index, part.kind]
        for index, part in spec.sub_blocks
        if part.unit == "expert" and index in blocks
    } - {0}
    if len(left) == 1:
        count = left.pop()
        if not getattr(parts.model.config, "is_heterogeneous", False):
            fields[experts.count] = count
        if hasattr(parts.model, experts.count):
            edits.attribute(parts.model, experts.count, count)
    if len(blocks) < len(spec.blocks) and experts.plain_layers is not None:
        # which layers are plain is counted anew; that every n-th one is would no longer be true
        plain = [index for index in blocks if not _had_experts(parts, index)]
        fields[experts.plain_layers] = [blocks.index(index) for index in plain]
        if experts.sparse_step is not None:
            fields[experts.sparse_step] = 1
    return fields


def _had_experts(parts: DecoderParts, layer: int) -> bool:
    """Return whether a layer has, or before an earlier pruning had, a mixture of experts."""
    experts, config = parts.family.experts, parts.model.config
    assert experts is not None  # noqa: S101 - the caller has looked
    plain = getattr(config, experts.plain_layers, None) if experts.plain_layers else None
    step = getattr(config, experts.sparse_step, 1) if experts.sparse_step else 1
    return layer not in (plain or ()) and (layer + 1) % step == 0


def route_past(routed: Routed, kept: tuple[int, ...]) -> RemovableHandle:
    """Let the dense router choose among ``kept`` alone, until the handle is removed.

    As if the logits of the others were minus infinity: the router is run with its kept rows, and
    what it chooses is named by the dense indices. The experts themselves stay as they are.

    Args:
        routed: Experts of a layer.
        kept: Experts that stay, ascending.
    """
    narrow = copy.deepcopy(routed.router)
    for name, parameter in routed.router.named_parameters():
        rows = torch.tensor(kept, device=parameter.device)
        setattr(narrow, name, nn.Parameter(parameter.detach()[rows], requires_grad=False))
    return routed.router.register_forward_hook(partial(_choose, narrow, kept))


def _choose(
    narrow: nn.Module,
    kept: tuple[int, ...],
    _router: nn.Module,
    args: tuple[Tensor, ...],
    _output: object,
) -> tuple[Any, Any, Tensor]:
    # `forward` itself: hooks of the copied router belong to the one that was called
    logits, weights, chosen = narrow.forward(*args)
    return logits, weights, torch.tensor(kept, device=chosen.device)[chosen]
