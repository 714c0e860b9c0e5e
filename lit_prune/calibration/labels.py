"""The labels of a classifier's batch: checked, and put where its head is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_prune.decoder import IGNORED_LABEL, placed_labels, read_at
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lit_prune.decoder import Task

# A note for the report.
DISAGREE = "some samples occur twice with different labels: the larger label counts"


def class_labels(
    labels: object, ids: Tensor, mask: Tensor, config: PreTrainedConfig, place: str, task: Task
) -> tuple[Tensor, Tensor]:
    """Say where the head of a classifier is read, and the class there.

    Args:
        labels: What the batch gives: one class for each row (``sequence``) or token (``token``),
            -100 where there is none; None where it gives none at all.
        ids: ``[batch, tokens]``, int64.
        mask: Real tokens, ``[batch, tokens]``, bool.
        config: Of the model.
        place: Which batch this is, for messages.
        task: What the head is for.

    Returns:
        Where it is read, bool: at one token of each row; at the labelled tokens, all real ones
        where no token of a row is. And the classes, int64, -100 where there is none. Both
        ``[batch, tokens]``.

    Raises:
        CalibrationError: If labels have another shape or type, a class does not exist, or the head
            would read padding.
    """
    if task == "sequence":
        _refuse_reading_padding(ids, mask, config, place)
    placed = torch.full_like(ids, IGNORED_LABEL)
    if labels is not None:
        checked = _checked(labels, ids, config, place, task)
        placed = placed_labels(task, checked, ids, mask, config)
    if task == "token":
        labelled = placed != IGNORED_LABEL
        return torch.where(labelled.any(1, keepdim=True), labelled, mask), placed
    read = torch.zeros_like(mask).scatter(1, read_at(ids, mask, config).unsqueeze(1), value=True)
    return read & mask, placed


def _checked(
    labels: object, ids: Tensor, config: PreTrainedConfig, place: str, task: Task
) -> Tensor:
    classes = int(config.num_labels or 0)
    shapes = [list(ids.shape)] if task == "token" else [[len(ids)], [len(ids), 1]]
    if not isinstance(labels, Tensor) or list(labels.shape) not in shapes:
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        what = "each token" if task == "token" else "each sample"
        raise CalibrationError(
            f"{place}: labels are {got}, expected {shapes[0]}: one class for {what}."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise CalibrationError(
            f"{place}: labels are {labels.dtype}, expected integers from 0 to "
            f"{classes - 1}, or -100. Only heads that choose one class are measured: "
            "without labels the model can be pruned all the same."
        )
    labels = labels.to(ids.device).long()
    outside = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= classes))
    if bool(outside.any()):
        raise CalibrationError(
            f"{place}: label {int(labels[outside][0])} is none of the model's "
            f"{classes} classes (nor -100)."
        )
    return labels


def _refuse_reading_padding(
    ids: Tensor, mask: Tensor, config: PreTrainedConfig, place: str
) -> None:
    """Transformers looks for the last token that is not the padding token, and sees no mask."""
    if not ids.numel() or (len(ids) > 1 and getattr(config, "pad_token_id", None) is None):
        return  # of such a batch it returns nothing
    read = read_at(ids, torch.ones_like(mask), config)
    wrong = mask.any(1) & ~mask.gather(1, read.unsqueeze(1)).squeeze(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CalibrationError(
            f"{place}: the head reads row {row} at token {int(read[row])}, which attention_mask "
            f"calls padding: its id is {int(ids[row, read[row]])}, and config.pad_token_id is "
            f"{config.pad_token_id}. Let the config name the token that pads."
        )
