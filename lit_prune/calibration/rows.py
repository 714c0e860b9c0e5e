"""The calibration text itself: token id rows, kept so that anything can be replayed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_prune.calibration.split import SIDES, Side, row_digest, side_of
from lit_prune.decoder import IGNORED_LABEL
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Row:
    """One sample without its padding.

    Attributes:
        ids: Real token ids, ``[tokens]``, int64, on the CPU.
        scored: True where perplexity counts the token (its label was not -100), ``[tokens]``; of a
            classifier, where its head is read.
        digest: Identity, from the ids alone.
        labels: Of a classifier: the classes, -100 where there is none, ``[tokens]``, int64. None
            where the tokens themselves are what is predicted.
    """

    ids: Tensor
    scored: Tensor
    digest: str
    labels: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, scored: Tensor | None = None, labels: Tensor | None = None) -> Row:
        """Make a row from real token ids ``[tokens]`` and, optionally, scored tokens and labels."""
        ids = ids.detach().to("cpu", torch.int64, copy=True)
        scored = (
            torch.ones_like(ids, dtype=torch.bool)
            if scored is None
            else scored.detach().cpu().bool()
        )
        if labels is not None:
            labels = labels.detach().to("cpu", torch.int64, copy=True)
        return cls(ids, scored, row_digest(ids), labels)

    def merged(self, repeat: Row | None) -> Row:
        """Return this row, scored where either repeat is scored: the order leaves no trace.

        Of two labels the larger counts; -100 is less than all.
        """
        if repeat is None:
            return self
        labels = self.labels
        if labels is not None and repeat.labels is not None:
            labels = torch.maximum(labels, repeat.labels)
        return Row(self.ids, self.scored | repeat.scored, self.digest, labels)

    def disagrees(self, repeat: Row | None) -> bool:
        """Return whether a repeat has another label somewhere."""
        if repeat is None or self.labels is None or repeat.labels is None:
            return False
        labelled = (self.labels != IGNORED_LABEL) & (repeat.labels != IGNORED_LABEL)
        return bool((self.labels != repeat.labels)[labelled].any())

    @property
    def num_scored(self) -> int:
        """Tokens (labels, of a classifier) that count: the first token of a row never does."""
        if self.labels is not None:
            return int((self.labels != IGNORED_LABEL).sum())
        return int(self.scored[1:].sum())


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of like length, padded on the right; what a replay feeds the model.

    Attributes:
        input_ids: ``[rows, tokens]``, 0 where there is padding.
        attention_mask: ``[rows, tokens]``, bool.
        label_mask: ``[rows, tokens]``, bool; True where perplexity counts the token; of a
            classifier, where its head is read.
        labels: Of a classifier: ``[rows, tokens]``, int64, -100 where there is no label.
    """

    input_ids: Tensor
    attention_mask: Tensor
    label_mask: Tensor
    labels: Tensor | None = None

    def read(self) -> tuple[Tensor, Tensor]:
        """Return at which tokens the head is read, and what it should say there.

        Both ``[rows, tokens]``; the second is -100 where that is not known.
        """
        if self.labels is not None:
            return self.label_mask, self.labels
        follows = torch.zeros_like(self.attention_mask)
        # padding is on the right: a real token has real ones before it
        follows[:, :-1] = self.attention_mask[:, 1:]
        return follows, self.input_ids.roll(-1, 1)

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return keyword arguments for the model; no mask where nothing is padded (faster)."""
        inputs = {"input_ids": self.input_ids.to(device)}
        if not bool(self.attention_mask.all()):
            inputs["attention_mask"] = self.attention_mask.long().to(device)
        return inputs


@dataclass(frozen=True, slots=True)
class RowSet:
    """Distinct rows in canonical order (longest first, then by digest), each on one side.

    Attributes:
        rows: The samples.
        split: False where the text was too short to be split: then every side is all of it.
    """

    rows: tuple[Row, ...]
    split: bool

    @classmethod
    def of(cls, rows: Iterable[Row]) -> RowSet:
        """Drop repeats and fix the order: order, batch size and rank of arrival leave no trace."""
        distinct: dict[str, Row] = {}
        for row in rows:
            distinct[row.digest] = row.merged(distinct.get(row.digest))
        ordered = tuple(sorted(distinct.values(), key=lambda row: (-len(row.ids), row.digest)))
        sides = {side_of(row.digest) for row in ordered if len(row.ids) > 1}
        return cls(ordered, split=len(sides) == len(SIDES))

    def capped(self, most: int) -> RowSet:
        """Return rows until there are ``most`` real tokens: chosen by content, in no order of text.

        For rows that several processes saw, where none came before the other.
        """
        if sum(len(row.ids) for row in self.rows) <= most:
            return self
        taken: list[Row] = []
        tokens = 0
        # not by the front of the digest, which says the side
        for row in sorted(self.rows, key=lambda row: row.digest[::-1]):
            if tokens >= most:
                break
            taken.append(row)
            tokens += len(row.ids)
        return RowSet.of(taken)

    def side(self, side: Side) -> tuple[Row, ...]:
        """Return the rows of one side; all rows where the text was too short to be split."""
        return tuple(row for row in self.rows if not self.split or side_of(row.digest) == side)

    def num_tokens(self, side: Side) -> int:
        """Return the real tokens of one side."""
        return sum(len(row.ids) for row in self.side(side))

    def num_scored(self, side: Side) -> int:
        """Return the tokens (labels, of a classifier) of one side that a quality counts."""
        return sum(row.num_scored for row in self.side(side))

    @property
    def classifies(self) -> bool:
        """Whether this is the text of a classifier."""
        return any(row.labels is not None for row in self.rows)

    def describe_split(self) -> str:
        """Say in words what is calibrated and scored on what."""
        if self.split:
            return "calibrate, choose and score are disjoint samples, split by content"
        quality = "accuracy" if self.classifies else "perplexity"
        return (
            f"too few samples to split ({len(self.rows)}): calibrated, chosen and scored on the "
            f"same text, so the {quality} after pruning is optimistic"
        )

    def batches(self, side: Side, max_tokens: int, most: int | None = None) -> Iterator[Batch]:
        """Yield the rows of a side as padded batches.

        Args:
            side: Which rows.
            max_tokens: Most tokens of a batch, padding included; a longer row is alone in its own.
            most: Stop before more real tokens than this have passed, but yield a row; None: all.

        Raises:
            CalibrationError: If the side is empty.
        """
        rows = self.side(side)
        if most is not None:
            passed = accumulate(len(row.ids) for row in rows)
            rows = rows[: max(1, sum(tokens <= most for tokens in passed))]
        if not rows:
            raise CalibrationError(
                f"no sample on the {side} side; is the calibration loader empty?"
            )
        start = 0
        while start < len(rows):
            width = len(rows[start].ids)  # the longest: rows are sorted
            take = max(1, max_tokens // max(width, 1))
            yield _stack(rows[start : start + take], width)
            start += take

    def num_batches(self, side: Side, max_tokens: int) -> int:
        """Return how many batches `batches` yields."""
        return sum(1 for _ in self.batches(side, max_tokens))


def _stack(rows: tuple[Row, ...], width: int) -> Batch:
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids)] = True
        scored[i, : len(row.ids)] = row.scored
        if row.labels is not None:
            labels[i, : len(row.ids)] = row.labels
    classifies = any(row.labels is not None for row in rows)
    return Batch(ids, mask, scored, labels if classifies else None)
