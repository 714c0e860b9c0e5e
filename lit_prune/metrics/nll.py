"""Negative log-likelihood of tokens: which are scored, and their exact sum. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from lit_prune.decoder import IGNORED_LABEL
from lit_prune.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# Logits upcast at a time: 32 MiB in float32. A batch of 8 x 2048 tokens over 128k would be 8 GiB.
_CHUNK_VALUES = 2**23


class TokenNll(NamedTuple):
    """Partial sums of one batch (see `token_nll`); all zero-dimensional."""

    nll_sum: Tensor
    num_tokens: Tensor
    num_non_finite: Tensor


@torch.no_grad()
def token_nll(logits: Tensor, input_ids: Tensor, scored: Tensor) -> TokenNll:
    """Sum the negative log-likelihoods of the scored tokens.

    ``logits[:, t]`` predicts ``input_ids[:, t + 1]``. Half-precision logits are upcast *before* the
    log-softmax, a bounded number of tokens at a time. Where finite logits are so far apart that
    their difference overflows float32, the token is computed again in float64.

    Args:
        logits: ``[batch, tokens, vocabulary]``, any floating dtype; positions that score nothing
            are never read.
        input_ids: ``[batch, tokens]``, integers on the device of ``logits``.
        scored: ``[batch, tokens]``, bool; whether the token *at* that position is scored. Column 0
            is ignored.

    Returns:
        Sum in nats (float64, over the tokens whose value is finite), count of scored tokens
        (int64), and count of tokens without a finite value (int64).

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 1e4], [0.0, 0.0]]])
        >>> token_nll(logits, torch.tensor([[0, 1, 0]]), torch.ones(1, 3, dtype=torch.bool)).nll_sum
        tensor(10000.6931, dtype=torch.float64)
    """
    rows, columns = scored[:, 1:].nonzero(as_tuple=True)
    targets = input_ids[rows, columns + 1].long()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chunk = max(1, _CHUNK_VALUES // logits.shape[-1])
    parts = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, targets.numel(), chunk):
        part = slice(start, start + chunk)
        picked, target = logits[rows[part], columns[part]].to(dtype), targets[part]
        nll = functional.cross_entropy(picked, target, reduction="none")
        # to the CPU first: MPS has no float64
        nll = nll.cpu().double()
        bad = ~nll.isfinite()
        if bad.any():
            where = bad.to(picked.device)
            nll[bad] = functional.cross_entropy(
                picked[where].cpu().double(), target[where].cpu(), reduction="none"
            )
        parts.append(nll)
    nll = torch.cat(parts)
    finite = nll.isfinite()
    return TokenNll(nll[finite].sum(), torch.tensor(nll.numel()), (~finite).sum())


def scored_tokens(
    input_ids: Tensor, *, attention_mask: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Say which tokens perplexity scores.

    A token is scored where it and its predecessor are real and it is kept. The first real token of
    a row is never scored: nothing real predicts it (under left padding its predecessor is padding,
    whose logits mean nothing).

    Args:
        input_ids: ``[batch, tokens]``.
        attention_mask: ``[batch, tokens]``, non-zero where real; None means all.
        keep: ``[batch, tokens]``, true where a label exists (not -100); None means all.

    Returns:
        ``[batch, tokens]``, bool.

    Example:
        >>> scored_tokens(torch.ones(1, 4), attention_mask=torch.tensor([[0, 1, 1, 1]]))
        tensor([[False, False,  True,  True]])
    """
    real = (
        torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is None
        else attention_mask != 0
    )
    scored = torch.zeros_like(real)
    scored[:, 1:] = real[:, 1:] & real[:, :-1]
    return scored if keep is None else scored & (keep != 0)


def check_shapes(logits: Tensor, input_ids: Tensor, masks: Mapping[str, Tensor | None]) -> None:
    """Refuse logits, ids and masks that cannot come from one forward.

    Raises:
        ConfigError: Names the first tensor that does not fit.
    """
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape or not logits.is_floating_point():
        raise ConfigError(
            f"logits are {logits.dtype} {list(logits.shape)} for input_ids "
            f"{list(input_ids.shape)}; expected floating [batch, tokens, vocabulary] and "
            "[batch, tokens] of one forward, without a shift."
        )
    for name, mask in masks.items():
        if mask is not None and mask.shape != input_ids.shape:
            raise ConfigError(
                f"{name} is {list(mask.shape)}; expected {list(input_ids.shape)}, the shape of "
                "input_ids."
            )
    if masks["label_mask"] is not None and masks["labels"] is not None:
        raise ConfigError("both label_mask and labels are given; pass one of them.")


def check_targets(
    input_ids: Tensor, scored: Tensor, labels: Tensor | None, *, vocabulary: int, batch: int
) -> None:
    """Refuse scored ids outside the vocabulary, and labels that are no copy of the ids.

    Raises:
        CalibrationError: If an id is outside; ``batch`` is named.
        ConfigError: If a label is neither -100 nor the id at its position.
    """
    targets = input_ids[scored]
    outside = int(((targets < 0) | (targets >= vocabulary)).sum())
    if outside:
        raise CalibrationError(
            f"{outside} of {targets.numel()} scored tokens in batch {batch} are outside the "
            f"vocabulary of {vocabulary}: do the tokenizer and the model belong together?"
        )
    if labels is not None and not torch.equal(labels[scored].to(targets.dtype), targets):
        raise ConfigError(
            f"labels of batch {batch} differ from input_ids where they are not {IGNORED_LABEL}; "
            "expected a copy of input_ids, not shifted (the shift is done by the metric)."
        )
