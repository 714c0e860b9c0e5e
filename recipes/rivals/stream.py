"""Calibration text on its way through a model, one decoder layer at a time.

So that a layer can be changed once those before it have been, as the codes of these rivals do.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.calibration import RowSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096


class _ReachedError(Exception):
    """The first layer has been reached."""


def seen(rows: RowSet) -> RowSet:
    """Return the rows that presets see too (their calibrate and choose sides), as one side."""
    digests = {row.digest for side in ("calibrate", "choose") for row in rows.side(side)}
    return RowSet(tuple(row for row in rows.rows if row.digest in digests), split=False)


class Stream:
    """Hidden states in front of a layer, batch by batch, with what else its forward is given."""

    def __init__(self, model: PreTrainedModel, rows: RowSet) -> None:
        self.states: list[Tensor] = []
        self.keywords: list[dict[str, Any]] = []
        self.real: list[Tensor] = []
        first = model.model.layers[0]
        hook = first.register_forward_pre_hook(self._catch, with_kwargs=True)
        try:
            for batch in seen(rows).batches("calibrate", BATCH_TOKENS):
                self.real.append(batch.attention_mask.to(model.device))
                with contextlib.suppress(_ReachedError):
                    model.model(**batch.model_inputs(model.device), use_cache=False)
        finally:
            hook.remove()

    def _catch(self, _layer: nn.Module, arguments: tuple[Tensor], keywords: dict[str, Any]) -> None:
        self.states.append(arguments[0])
        self.keywords.append(keywords)
        raise _ReachedError

    def each(self, step: Callable[..., Tensor]) -> list[Tensor]:
        """Return ``step(states, keywords)`` of every batch."""
        pairs = zip(self.states, self.keywords, strict=True)
        return [step(states, keywords) for states, keywords in pairs]

    def through(self, layer: nn.Module) -> None:
        """Pass a layer."""
        self.states = self.each(lambda states, keywords: layer(states, **keywords))

    def second_moment(self, states: list[Tensor]) -> Tensor:
        """Return the sum of ``x xᵀ`` over real tokens, float64."""
        total = torch.zeros((), dtype=torch.float64)
        for batch, real in zip(states, self.real, strict=True):
            tokens = batch[real].double()
            total = total.to(tokens.device) + tokens.T @ tokens
        return total
