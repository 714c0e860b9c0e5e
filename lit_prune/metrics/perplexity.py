"""Perplexity from logits: float32 log-softmax, float64 sums, exact counts of real tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import IGNORED_LABEL
from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.metrics.exact import ExactMetric
from lit_prune.metrics.fields import tensor_field
from lit_prune.metrics.nll import (
    check_shapes,
    check_targets,
    scored_tokens,
    token_nll,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """Perplexity and what it was computed on; rows are scored independently, without a stride.

    Attributes:
        mean_nll: Mean negative log-likelihood per scored token, nats.
        perplexity: ``exp(mean_nll)``; infinite only where that overflows float64 (above 709.78
            nats).
        num_tokens: Scored tokens.
        num_real_tokens: Attended tokens, scored or not.
        num_rows: Rows that hold a real token.
        context_length: Real tokens in the longest row.
    """

    mean_nll: float
    perplexity: float
    num_tokens: int
    num_real_tokens: int
    num_rows: int
    context_length: int


class Perplexity(ExactMetric):
    """Perplexity of a causal language model over real tokens: ``exp`` of the mean token NLL.

    The shift is done here: pass the logits and ids of one forward as they are. Sums are float64,
    counts int64; they keep their dtype when the module around them is cast, and add up exactly over
    ranks. Use `update`, not the call operator: a batch without any scored token is legitimate, its
    own perplexity is not.

    ``torchmetrics.text.Perplexity`` takes ``softmax().log()`` in the dtype of the logits: infinite
    on a damaged model, 3 % off in bfloat16, with a float32 count that stops at 2^24
    (reference/ecosystem.md, P12). Hence this one.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(2, 5, 7), torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 1, 2]]),
        ...               attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]))
        >>> metric.compute()
        tensor(7.0000, dtype=torch.float64)
        >>> metric.result().num_tokens
        5
    """

    is_differentiable = False
    higher_is_better = False

    nll_sum: Tensor
    num_scored: Tensor
    num_real: Tensor
    rows: Tensor
    longest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("num_scored", "num_real", "rows"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("longest", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")
        self._result: PerplexityResult | None = None

    def update(
        self,
        logits: Tensor,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        label_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Add one batch; on an error nothing is added.

        Args:
            logits: ``[batch, tokens, vocabulary]``, any floating dtype.
            input_ids: ``[batch, tokens]``; moved to the device of the logits, like the masks.
            attention_mask: ``[batch, tokens]``, non-zero where real.
            label_mask: ``[batch, tokens]``, true where the token at that position counts.
            labels: ``[batch, tokens]``, the usual Hugging Face labels instead of ``label_mask``: a
                copy of ``input_ids`` with -100 where a token does not count, *not* shifted
                beforehand.

        Raises:
            ConfigError: If shapes differ, both masks are given, or the labels are no copy of the
                ids.
            CalibrationError: If a scored id is outside the vocabulary, or a scored token has no
                finite NLL: its logits are NaN or +inf, or its own logit is -inf (-inf elsewhere is
                a probability of zero, and fine).
        """
        batch = int(self._update_count) - 1  # torchmetrics has counted this one
        masks = {"attention_mask": attention_mask, "label_mask": label_mask, "labels": labels}
        check_shapes(logits, input_ids, masks)
        input_ids = input_ids.to(logits.device)
        here = {
            name: None if mask is None else mask.to(logits.device) for name, mask in masks.items()
        }
        attention_mask, label_mask, labels = here.values()
        keep = label_mask if labels is None else labels != IGNORED_LABEL
        scored = scored_tokens(input_ids, attention_mask=attention_mask, keep=keep)
        check_targets(input_ids, scored, labels, vocabulary=logits.shape[-1], batch=batch)
        part = token_nll(logits, input_ids, scored)
        if part.num_non_finite:
            raise CalibrationError(
                f"{part.num_non_finite} of {part.num_tokens} scored tokens in batch {batch} have "
                "no finite negative log-likelihood: their logits are NaN or infinite. float16 "
                "overflows above 65504: run the model in bfloat16 or float32."
            )
        real = torch.ones_like(scored) if attention_mask is None else attention_mask != 0
        lengths = real.sum(dim=1).to(self.rows.device)
        # not in place: a state made in Lightning's inference mode could not be changed outside it
        self.nll_sum = self.nll_sum + part.nll_sum.to(self.nll_sum.device)
        self.num_scored = self.num_scored + part.num_tokens.to(self.num_scored.device)
        self.num_real = self.num_real + lengths.sum()
        self.rows = self.rows + (lengths > 0).sum()
        if len(lengths):
            self.longest = torch.maximum(self.longest, lengths.max())

    def compute(self) -> Tensor:
        """Return the perplexity over all ranks, float64 scalar; call it on every rank.

        Raises:
            CalibrationError: If no token was scored.
        """
        num_tokens = int(self.num_scored)
        if num_tokens == 0:
            raise CalibrationError(
                f"no token to score in {int(self.rows)} rows of {int(self.num_real)} real tokens: "
                "a row needs two adjacent real tokens, the second with a label other than -100. Is "
                "the loader empty, or everything masked?"
            )
        mean_nll = self.nll_sum / num_tokens
        perplexity = mean_nll.exp()
        self._result = PerplexityResult(
            mean_nll=float(mean_nll),
            perplexity=float(perplexity),
            num_tokens=num_tokens,
            num_real_tokens=int(self.num_real),
            num_rows=int(self.rows),
            context_length=int(self.longest),
        )
        return perplexity

    def result(self) -> PerplexityResult:
        """Return perplexity, mean NLL and counts over all ranks; synchronises like `compute`."""
        # kept aside by `compute`, because torchmetrics undoes the merge over ranks when it returns
        self.compute()
        assert self._result is not None  # noqa: S101 - `compute` has set it or raised
        return self._result

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood per scored token over all ranks, nats."""
        return self.result().mean_nll

    @property
    def num_tokens(self) -> int:
        """Scored tokens over all ranks."""
        return self.result().num_tokens


@torch.no_grad()
def perplexity_of(model: nn.Module, batches: Iterable[object]) -> PerplexityResult:
    """Run a causal language model over batches and return its perplexity.

    The model is not changed: it runs in the mode it is in (``eval()`` is the caller's), without
    gradients or KV cache. Only the batches of this process count; over ranks, use `Perplexity`.

    Args:
        model: Hugging Face causal language model.
        batches: Mappings or objects with ``input_ids [batch, tokens]`` and, where they have them,
            ``attention_mask``, ``label_mask`` or ``labels`` of the same shape; moved to the device
            of the model.

    Returns:
        Perplexity with its counts.

    Raises:
        CalibrationError: If there is no batch, no token to score, or a logit is not finite.
        ConfigError: If a batch has no ``input_ids``, or its shapes differ.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     vocab_size=11)).eval()
        >>> result = perplexity_of(model, [{"input_ids": torch.arange(10).reshape(2, 5)}])
        >>> result.num_tokens, result.num_rows, result.context_length
        (8, 2, 5)
    """
    device = next(model.parameters()).device
    metric = Perplexity(sync_on_compute=False).to(device)
    for batch in batches:
        fields = {
            name: tensor_field(batch, name, device)
            for name in ("attention_mask", "label_mask", "labels")
        }
        input_ids = tensor_field(batch, "input_ids", device)
        if input_ids is None:
            raise ConfigError(
                f"a batch is a {type(batch).__name__} without input_ids; expected input_ids "
                "[batch, tokens]."
            )
        output = model(
            input_ids=input_ids, attention_mask=fields["attention_mask"], use_cache=False
        )
        metric.update(output.logits, input_ids, **fields)
    if not metric.update_called:
        raise CalibrationError("there is no batch to compute a perplexity on: the loader is empty.")
    return metric.result()
