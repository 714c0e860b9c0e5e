"""Which tokens of a batch are real: the checks on what a language model is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.calibration.rows import Row
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig

# A note for the report.
CAPPED = "the calibration text was cut at max_calibration_tokens: later samples were not used"


@dataclass(frozen=True, slots=True)
class RealTokens:
    """A checked batch.

    Attributes:
        ids: ``[batch, tokens]``, int64.
        mask: True where a token is real, ``[batch, tokens]``, on the device of ``ids``.
        scored: True where the label is not -100, ``[batch, tokens]``; None without labels.
        note: What the report should say about the mask, or an empty string.
    """

    ids: Tensor
    mask: Tensor
    scored: Tensor | None
    note: str = ""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield every sample that has a real token, without padding, and its place in the batch."""
        scored = self.mask if self.scored is None else self.scored
        for i, keep in enumerate(self.mask):
            if bool(keep.any()):
                yield i, Row.of(self.ids[i][keep], scored[i][keep])


def real_tokens(inputs: Mapping[str, Any], config: PreTrainedConfig, place: str) -> RealTokens:
    """Check the arguments of a language model's forward, and say which tokens are real.

    Args:
        inputs: Forward arguments by name; ``input_ids``, ``attention_mask`` and ``labels`` are
            read.
        config: The model's config: vocabulary, longest context, pad and end-of-text tokens.
        place: Which batch this is, for messages.

    Raises:
        CalibrationError: If ids are missing, of the wrong type, rank or range, too long, or contain
            padding that no mask marks.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        keys = sorted(k for k, v in inputs.items() if v is not None)
        raise CalibrationError(
            f"{place}: no input_ids among the arguments {keys}. lit_prune keeps token ids to "
            "replay them; pass input_ids=… (not inputs_embeds) to the language model in "
            "validation_step."
        )
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise CalibrationError(
            f"{place}: input_ids has shape {list(ids.shape)} and dtype {ids.dtype}, expected "
            "[batch, tokens] of int64."
        )
    vocabulary, longest = config.vocab_size, getattr(config, "max_position_embeddings", None)
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise CalibrationError(
                f"{place}: token ids run from {low} to {high}, the model's vocabulary has "
                f"{vocabulary}. Is this the model's own tokenizer?"
            )
    if longest and ids.shape[1] > longest:
        raise CalibrationError(
            f"{place}: {ids.shape[1]} tokens a sample, the model's max_position_embeddings is "
            f"{longest}. Cut or pack the validation text to at most that."
        )
    mask, note = _mask(inputs.get("attention_mask"), ids, config, place)
    labels = inputs.get("labels")
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != ids.shape):
        raise CalibrationError(
            f"{place}: labels must have the shape of input_ids, {list(ids.shape)}."
        )
    return RealTokens(
        ids.long(), mask, None if labels is None else (labels != -100).to(ids.device), note
    )


def _mask(mask: object, ids: Tensor, config: PreTrainedConfig, place: str) -> tuple[Tensor, str]:
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise CalibrationError(
                f"{place}: attention_mask is {got}, expected {list(ids.shape)}, 1 where a token "
                "is real. Statistics must know which tokens are padding."
            )
        return mask.to(ids.device).bool(), ""
    everything = torch.ones_like(ids, dtype=torch.bool)
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if pad is None or not bool((ids == pad).any()):
        return everything, ""
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad in ends:
        return everything, (
            f"no attention_mask was given and the pad token ({pad}) is the end-of-text token: "
            "every token was taken for real text"
        )
    raise CalibrationError(
        f"{place}: {int((ids == pad).sum())} of {ids.numel()} tokens are the pad token ({pad}), "
        "and no attention_mask says so. Pass attention_mask=… to the language model: padding "
        "would distort every statistic."
    )
