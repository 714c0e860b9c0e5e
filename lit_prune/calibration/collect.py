"""Taking the real token ids out of a user's batches, without a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_prune.calibration.data_name import data_notes
from lit_prune.calibration.images import NOTHING_LEFT, left_out, text_only
from lit_prune.calibration.inputs import CAPPED, real_tokens
from lit_prune.calibration.labels import DISAGREE
from lit_prune.calibration.rows import Row, RowSet
from lit_prune.decoder import media_tokens, task_of
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel


def collect_rows(
    model: PreTrainedModel, dataloader: Iterable[Any], max_tokens: int
) -> tuple[RowSet, tuple[str, ...]]:
    """Take the real token ids from a user's batches; no forward pass.

    Args:
        model: The language model that the ids are for.
        dataloader: Mappings with ``input_ids`` and, where there is padding, ``attention_mask``;
            ``labels`` where they exist.
        max_tokens: Take no new sample once there are this many real tokens.

    Returns:
        The distinct rows, and what the report should say about them.

    Raises:
        CalibrationError: If a batch is not a mapping with ``input_ids``, or its ids cannot be the
            model's.
    """
    found: dict[str, Row] = {}
    notes: dict[str, None] = dict.fromkeys(data_notes(dataloader))
    tokens = images = 0
    media = media_tokens(model)
    for number, batch in enumerate(dataloader):
        if not hasattr(batch, "keys"):
            raise CalibrationError(
                f"batch {number} is a {type(batch).__name__}{_inside(batch)}; expected a mapping "
                "with input_ids and, where there is padding, attention_mask. Wrap the loader: "
                "({'input_ids': x, 'attention_mask': m} for x, m in loader)."
            )
        inputs = {key: batch[key] for key in batch.keys()}  # noqa: SIM118 - a BatchEncoding, say
        inputs, rows = text_only(inputs, media)
        images += 0 if rows is None else len(batch["input_ids"]) - len(rows)
        real = real_tokens(inputs, model.config, f"batch {number}", task=task_of(model))
        notes |= dict.fromkeys(real.notes)
        for _, _, row in real.rows():
            if row.digest not in found:
                if tokens >= max_tokens:
                    notes[CAPPED] = None
                    return RowSet.of(found.values()), _told(notes, images)
                tokens += len(row.ids)
            if row.disagrees(found.get(row.digest)):
                notes[DISAGREE] = None
            found[row.digest] = row.merged(found.get(row.digest))
    if images and not found:
        raise CalibrationError(f"{NOTHING_LEFT}.")
    return RowSet.of(found.values()), _told(notes, images)


def _told(notes: Iterable[str], images: int) -> tuple[str, ...]:
    return (*notes, *((left_out(images),) if images else ()))


def _inside(batch: object) -> str:
    if not isinstance(batch, (list, tuple)):
        return ""
    return f" of {[list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in batch]}"
