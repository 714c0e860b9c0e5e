"""How well a model does what its head is for, by the metric of that task."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from lit_prune.decoder import task_of
from lit_prune.metrics.classification import ClassificationResult, classification_of
from lit_prune.metrics.perplexity import PerplexityResult, perplexity_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

Quality: TypeAlias = PerplexityResult | ClassificationResult


def quality_of(model: PreTrainedModel, batches: Iterable[object]) -> Quality:
    """Return the perplexity of a language model, accuracy and cross-entropy of a classifier.

    Both have ``mean_nll``: what drafts are judged by. Arguments and errors are those of
    `perplexity_of` and `classification_of`.
    """
    if task_of(model) == "next_token":
        return perplexity_of(model, batches)
    return classification_of(model, batches)
