"""Which tokens of a batch are real: the checks on what a language model is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.calibration.labels import class_labels
from lit_prune.calibration.rows import Row
from lit_prune.decoder import IGNORED_LABEL
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig

    from lit_prune.decoder import Task

# Notes for the report.
CAPPED = "the calibration text was cut at max_calibration_tokens: later samples were not used"
PACKED = (
    "packed rows were split where position_ids restart: each segment is a sample of its own, as it "
    "is to the attention"
)


def by_token(x: Tensor, mask: Tensor) -> Tensor:
    """Return what a module gets as ``[batch, tokens, width]``: some layers flatten their tokens.

    Anything else comes back as it is.

    Example:
        >>> by_token(torch.zeros(6, 4), torch.ones(2, 3)).shape
        torch.Size([2, 3, 4])
    """
    flat = x.shape[:-1] == (mask.numel(),)
    return x.reshape(*mask.shape, x.shape[-1]) if flat else x


@dataclass(frozen=True, slots=True)
class RealTokens:
    """A checked batch.

    Attributes:
        ids: ``[batch, tokens]``, int64.
        segments: The sample of its row that a token belongs to, counted from 0, -1 where there is
            padding; ``[batch, tokens]``, on the device of ``ids``. All 0 unless samples are packed.
        scored: True where the label is not -100, ``[batch, tokens]``; None without labels. Of a
            classifier: where its head is read.
        notes: What the report should say about the batch.
        labels: Of a classifier: its classes, -100 where there is none, ``[batch, tokens]``.
    """

    ids: Tensor
    segments: Tensor
    scored: Tensor | None
    notes: tuple[str, ...] = ()
    labels: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """True where a token is real, ``[batch, tokens]``."""
        return self.segments >= 0

    def rows(self) -> Iterator[tuple[int, Tensor, Row]]:
        """Yield every sample without padding, and where it was: row, and columns ``[tokens]``."""
        scored = self.mask if self.scored is None else self.scored
        for i, segments in enumerate(self.segments):
            for segment in range(int(segments.max()) + 1 if len(segments) else 0):
                where = segments == segment
                labels = None if self.labels is None else self.labels[i][where]
                yield i, where, Row.of(self.ids[i][where], scored[i][where], labels)


def real_tokens(
    inputs: Mapping[str, Any],
    config: PreTrainedConfig,
    place: str,
    *,
    caches: bool = False,
    task: Task = "next_token",
) -> RealTokens:
    """Check the arguments of a language model's forward, and say which tokens are real.

    Args:
        inputs: Forward arguments by name; ``input_ids``, ``attention_mask``, ``position_ids`` and
            ``labels`` are read.
        config: The model's config: vocabulary, longest context, pad and end-of-text tokens.
        place: Which batch this is, for messages.
        caches: Whether the forward fills a KV cache. Packed samples see each other then.
        task: What the head is for; says what labels are.

    Raises:
        CalibrationError: If ids are missing, of the wrong type, rank or range, too long, contain
            padding that no mask marks, or stand at positions that a replay would not give them; if
            labels are none that the head could be asked for.
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
    mask, note = _mask(inputs.get("attention_mask"), ids, config, place)
    segments = _segments(inputs, mask, place, caches=caches)
    packed = bool((segments > 0).any())
    width = _longest_segment(segments) if packed else ids.shape[1]
    if longest and width > longest:
        raise CalibrationError(
            f"{place}: {width} tokens a sample, the model's max_position_embeddings is "
            f"{longest}. Cut or pack the validation text to at most that."
        )
    notes = tuple(text for text in (note, PACKED if packed else "") if text)
    labels = inputs.get("labels")
    if task != "next_token":
        if packed and task == "sequence":
            raise CalibrationError(
                f"{place}: packed samples, and a head that reads one token of each row. Give each "
                "sample a row of its own."
            )
        read, classes = class_labels(labels, ids.long(), mask, config, place, task)
        return RealTokens(ids.long(), segments, read, notes, classes)
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != ids.shape):
        raise CalibrationError(
            f"{place}: labels must have the shape of input_ids, {list(ids.shape)}."
        )
    return RealTokens(
        ids.long(),
        segments,
        None if labels is None else (labels != IGNORED_LABEL).to(ids.device),
        notes,
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


def _segments(inputs: Mapping[str, Any], mask: Tensor, place: str, *, caches: bool) -> Tensor:
    """Number the samples of each row, ``[batch, tokens]``; refuse what a replay would do otherwise.

    Where neither a mask nor a cache is given, transformers lets tokens see only those whose
    positions lead up to theirs (`find_packed_sequence_indices`). Else a packed row is one long
    sample at odd positions.
    """
    whole = mask.long() - 1
    positions = inputs.get("position_ids")
    if positions is None:
        if inputs.get("cu_seq_lens_q") is not None:
            raise CalibrationError(
                f"{place}: packed samples (cu_seq_lens_q) without position_ids. Pass position_ids "
                "that restart at 0 with each sample, so that it can be told where they begin."
            )
        return whole
    batch, tokens = mask.shape
    if not isinstance(positions, Tensor) or positions.shape not in ((batch, tokens), (1, tokens)):
        got = list(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
        raise CalibrationError(f"{place}: position_ids is {got}, expected {[batch, tokens]}.")
    positions = positions.to(mask.device).expand(batch, tokens)
    counted = torch.arange(tokens, device=mask.device)
    segments = whole.clone()
    for i, keep in enumerate(mask):
        if bool((positions[i] == counted)[keep].all()):
            continue  # where the model itself would put them
        here = positions[i][keep]
        begins = torch.ones_like(here, dtype=torch.bool)
        begins[1:] = here[1:] != here[:-1] + 1
        if bool(here[begins].any()):
            first = int(here[begins][here[begins] != 0][0])
            raise CalibrationError(
                f"{place}: position_ids of row {i} begin, or go on, at {first}; expected 0, 1, 2 "
                "and so on over the real tokens of each sample. A replay puts them there: pass "
                "position_ids like that, or none."
            )
        given = "an attention_mask" if inputs.get("attention_mask") is not None else ""
        given = given or ("a KV cache" if caches else "")
        if given and int(begins.sum()) > 1:
            raise CalibrationError(
                f"{place}: position_ids of row {i} restart {int(begins.sum()) - 1} times, but with "
                f"{given} transformers lets packed samples see each other. Pass use_cache=False "
                "and no attention_mask, so that each stands for itself, or do not pack."
            )
        segments[i][keep] = begins.long().cumsum(0) - 1
    return segments


def _longest_segment(segments: Tensor) -> int:
    return max(int(row[row >= 0].bincount().max()) for row in segments if bool((row >= 0).any()))
