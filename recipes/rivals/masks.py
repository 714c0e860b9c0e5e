"""What the rivals that only mask have in common: the pattern 2:4, and the way through the model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rivals.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet


def lowest_two_of_four(scores: Tensor) -> Tensor:
    """Return True at the two lowest of every four neighbours in a row; ties: the earlier ones.

    Raises:
        ValueError: If a row does not consist of fours.
    """
    if scores.shape[1] % 4:
        raise ValueError(f"2:4 needs rows of a multiple of four weights, got {scores.shape[1]}.")
    fours = scores.reshape(len(scores), -1, 4)
    order = fours.argsort(dim=-1, stable=True)[..., :2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter(-1, order, True).reshape(scores.shape)


def by_layer(
    model: PreTrainedModel, rows: RowSet, masked_weight: Callable[[Tensor, Tensor], Tensor]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Mask every linear layer of the decoder, each on inputs behind the masked layers before it."""
    model = copy.deepcopy(model).eval()
    stream, zeros, weights = Stream(model, rows), 0, 0
    for layer in model.model.layers:
        moments = _second_moments(layer, stream)
        for linear, moment in moments.items():
            linear.weight.copy_(masked_weight(linear.weight, moment))
            zeros += int((linear.weight == 0).sum())
            weights += linear.weight.numel()
        stream.through(layer)
    notes = f"{zeros / weights:.0%} of the linear weights are zero, none is removed"
    return model, {"achieved": 0.0, "notes": notes}


def _second_moments(layer: nn.Module, stream: Stream) -> dict[nn.Linear, Tensor]:
    """Return the sum of ``x xᵀ`` over the inputs of each linear layer, before any is changed."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    inputs: dict[nn.Linear, list[Tensor]] = {linear: [] for linear in linears}
    hooks = [
        linear.register_forward_pre_hook(lambda module, given: inputs[module].append(given[0]))
        for linear in linears
    ]
    try:
        stream.each(lambda states, keywords: layer(states, **keywords))
    finally:
        for hook in hooks:
            hook.remove()
    return {linear: stream.second_moment(found) for linear, found in inputs.items()}
