"""How far what a model says next is from what the dense model says, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.decoder import IGNORED_LABEL, DecoderParts, after_head, head_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedModel

    from lit_prune.calibration.rows import Batch

# Tokens whose logits are held at once: vocabularies of 150,000 would fill the memory otherwise.
_LOGIT_TOKENS = 1024


class Divergence:
    """KL divergence to the dense model on one text, for drafts that are looked at under masks.

    Of the dense model the final hidden states are kept, not the logits. Make and call it inside
    `quiet`.

    Args:
        model: The dense model, as it stands.
        batches: The text.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[Batch]) -> None:
        self._parts = DecoderParts(model)
        head: Any = head_of(model)
        self._head = head.forward  # under a mask another may stand in its place
        self._dense = [(batch, self._hidden(batch).cpu()) for batch in batches]

    def __call__(self) -> float:
        """Return the mean KL of the model as it stands now, nats per token that is predicted.

        Of a classifier, per token that its head is read at.
        """
        total, tokens = 0.0, 0
        for batch, dense in self._dense:
            hidden = self._hidden(batch)
            labels = torch.full((len(hidden),), IGNORED_LABEL, device=hidden.device)
            total += compare_heads(
                self._parts, dense.to(hidden), hidden, labels, dense_head=self._head
            )[0]
            tokens += len(hidden)
        return total / max(tokens, 1)

    def _hidden(self, batch: Batch) -> Tensor:
        """Return the normed states that the head is read at, ``[tokens, hidden_size]``."""
        parts = self._parts
        device = next(parts.model.parameters()).device
        whole = parts.model.base_model(**batch.model_inputs(device), use_cache=False)
        states: Tensor = whole.last_hidden_state
        return states[batch.read()[0].to(device)]


def compare_heads(
    parts: DecoderParts,
    dense: Tensor,
    hidden: Tensor,
    labels: Tensor,
    *,
    dense_head: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """Return the sums over tokens of the KL divergence and of the increase of the NLL, nats.

    Args:
        parts: Whose head reads them.
        dense: Normed hidden states of the dense model, ``[tokens, hidden_size]``.
        hidden: Those to compare, ``[tokens, hidden_size]``.
        labels: What comes next, ``[tokens]``; -100 where that is not known.
        dense_head: What reads ``dense``; None: the same head.
    """
    head: Any = head_of(parts.model)
    heads = (dense_head or head, head)
    kl = nll = 0.0
    for chunk in torch.arange(len(labels), device=labels.device).split(_LOGIT_TOKENS):
        one, other = (
            after_head(read(x[chunk]).float(), parts.model).log_softmax(-1)
            for read, x in zip(heads, (dense, hidden), strict=True)
        )
        kl += float((one.exp() * (one - other)).sum(-1).double().sum())
        classes = labels[chunk].unsqueeze(-1)
        difference = (one - other).gather(-1, classes.clamp_min(0))
        nll += float(difference[classes != IGNORED_LABEL].double().sum())
    return kl, nll
