"""Accuracy and cross-entropy of a classifier of texts or tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_prune.decoder import IGNORED_LABEL, logits_of, placed_labels, task_of
from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.metrics.fields import tensor_field

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationResult:
    """Quality of a classifier and what it was computed on.

    Attributes:
        accuracy: Share of labels that the largest logit names.
        mean_nll: Mean cross-entropy for each label, nats.
        num_labels: Labels that were compared.
        num_real_tokens: Attended tokens.
        num_rows: Rows that hold a real token.
        context_length: Real tokens in the longest row.
    """

    accuracy: float
    mean_nll: float
    num_labels: int
    num_real_tokens: int
    num_rows: int
    context_length: int


@torch.no_grad()
def classification_of(model: PreTrainedModel, batches: Iterable[object]) -> ClassificationResult:
    """Run a classifier over batches and compare what it says with the labels.

    The model is not changed: it runs in the mode it is in (``eval()`` is the caller's), without
    gradients. Only the batches of this process count.

    Args:
        model: Hugging Face classifier of texts or tokens.
        batches: Mappings or objects with ``input_ids [batch, tokens]``, where there is padding
            ``attention_mask``, and ``labels``: one for each token, or, of a classifier of texts,
            one for each row; -100 where there is none.

    Returns:
        Accuracy and cross-entropy with their counts.

    Raises:
        CalibrationError: If there is no label, or a logit is not finite.
        ConfigError: If a batch has no ``input_ids``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForSequenceClassification
        >>> model = LlamaForSequenceClassification(LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     vocab_size=11, num_labels=3)).eval()
        >>> batch = {"input_ids": torch.arange(10).reshape(2, 5), "labels": torch.tensor([0, 2])}
        >>> classification_of(model, [batch]).num_labels
        2
    """
    device, task = next(model.parameters()).device, task_of(model)
    accuracy = MulticlassAccuracy(
        num_classes=model.config.num_labels, average="micro", ignore_index=IGNORED_LABEL,
        sync_on_compute=False,
    )  # fmt: skip
    # on the CPU, of which every device's float64 is
    mean = MeanMetric(sync_on_compute=False).set_dtype(torch.float64)
    labelled = real = rows = longest = 0
    for number, batch in enumerate(batches):
        ids, mask, labels = (
            tensor_field(batch, name, device) for name in ("input_ids", "attention_mask", "labels")
        )
        if ids is None:
            raise ConfigError(f"a batch is a {type(batch).__name__} without input_ids.")
        attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        lengths = attended.sum(1)
        real, rows = real + int(lengths.sum()), rows + int((lengths > 0).sum())
        longest = max(longest, int(lengths.max()) if len(lengths) else 0)
        if labels is None:
            continue
        if labels.shape != ids.shape:
            labels = placed_labels(task, labels, ids, attended, model.config)
        where = (labels != IGNORED_LABEL) & attended
        if not bool(where.any()):
            continue
        told = {} if mask is None else {"attention_mask": mask.long()}
        logits = logits_of(model, input_ids=ids, **told)[where].cpu().double()
        if not bool(torch.isfinite(logits).all()):
            raise CalibrationError(
                f"{int((~torch.isfinite(logits)).sum())} logits of batch {number} are NaN or "
                "infinite. float16 overflows above 65504: run the model in bfloat16 or float32."
            )
        classes = labels[where].cpu()
        accuracy.update(logits, classes)
        mean.update(functional.cross_entropy(logits, classes, reduction="none"))
        labelled += len(classes)
    if not labelled:
        raise CalibrationError(
            f"no label in {rows} rows of {real} real tokens: accuracy and loss cannot be measured. "
            "Give labels (other than -100) beside input_ids, or a preset that judges no drafts."
        )
    return ClassificationResult(
        accuracy=float(accuracy.compute()),
        mean_nll=float(mean.compute()),
        num_labels=labelled,
        num_real_tokens=real,
        num_rows=rows,
        context_length=longest,
    )
