"""Batches of multimodal models: what holds no image is text, and text is what calibrates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Forward arguments with one row for each sample.
_BY_ROW = ("input_ids", "attention_mask", "position_ids", "labels")
LEFT_OUT = "samples with an image were left out: statistics are of samples of text alone"


def text_only(
    inputs: Mapping[str, Any], media: Sequence[int]
) -> tuple[dict[str, Any], Tensor | None]:
    """Return the arguments of the samples without an image, and which rows they were.

    Args:
        inputs: Forward arguments by name.
        media: Token ids that stand for parts of an image.

    Returns:
        All of them and None where no row has an image.

    Example:
        >>> inputs = {"input_ids": torch.tensor([[9, 5], [4, 5]]), "pixel_values": torch.ones(1)}
        >>> text_only(inputs, [9])
        ({'input_ids': tensor([[4, 5]])}, tensor([1]))
    """
    ids = inputs.get("input_ids")
    if not media or not isinstance(ids, Tensor) or ids.ndim != 2:
        return dict(inputs), None
    images = torch.isin(ids, torch.tensor(media, device=ids.device)).any(1)
    if not bool(images.any()):
        return dict(inputs), None
    rows = (~images).nonzero().flatten()
    kept = {name: inputs[name] for name in _BY_ROW if isinstance(inputs.get(name), Tensor)}
    return {
        name: value[rows] if len(value) == len(ids) else value for name, value in kept.items()
    }, rows


def left_out(number: int) -> str:
    """Return the note about samples that were left out."""
    return f"{number} {LEFT_OUT}"


NOTHING_LEFT = (
    "every sample had an image, and lit_prune calibrates on text alone: validate samples without "
    "images too, or call lit_prune.prune(model, loader_of_text, ...)"
)
