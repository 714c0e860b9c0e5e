"""The calibration text itself: token id rows, kept so that anything can be replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_prune.calibration.split import SIDES, Side, row_digest, side_of
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Row:
    """One sample without its padding.

    Attributes:
        ids: Real token ids, ``[tokens]``, int64, on the CPU.
        scored: True where perplexity counts the token (its label was not -100), ``[tokens]``.
        digest: Identity, from the ids alone.
    """

    ids: Tensor
    scored: Tensor
    digest: str

    @classmethod
    def of(cls, ids: Tensor, scored: Tensor | None = None) -> Row:
        """Make a row from real token ids ``[tokens]`` and, optionally, which of them are scored."""
        ids = ids.detach().to("cpu", torch.int64, copy=True)
        scored = (
            torch.ones_like(ids, dtype=torch.bool)
            if scored is None
            else scored.detach().cpu().bool()
        )
        return cls(ids, scored, row_digest(ids))

    def merged(self, repeat: Row | None) -> Row:
        """Return this row, scored where either repeat is scored: the order leaves no trace."""
        return self if repeat is None else Row(self.ids, self.scored | repeat.scored, self.digest)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of like length, padded on the right; what a replay feeds the model.

    Attributes:
        input_ids: ``[rows, tokens]``, 0 where there is padding.
        attention_mask: ``[rows, tokens]``, bool.
        label_mask: ``[rows, tokens]``, bool; True where perplexity counts the token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    label_mask: Tensor

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
        """Return the tokens of one side that a perplexity counts: the first of a row never is."""
        return sum(int(row.scored[1:].sum()) for row in self.side(side))

    def describe_split(self) -> str:
        """Say in words what is calibrated and scored on what."""
        if self.split:
            return "calibrate, choose and score are disjoint samples, split by content"
        return (
            f"too few samples to split ({len(self.rows)}): calibrated, chosen and scored on the "
            "same text, so the perplexity after pruning is optimistic"
        )

    def batches(self, side: Side, max_tokens: int) -> Iterator[Batch]:
        """Yield the rows of a side as padded batches.

        Args:
            side: Which rows.
            max_tokens: Most tokens of a batch, padding included; a longer row is alone in its own.

        Raises:
            CalibrationError: If the side is empty.
        """
        rows = self.side(side)
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


def first_tokens(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """Yield batches until ``most`` real tokens have passed; at least one."""
    seen = 0
    for batch in batches:
        yield batch
        seen += int(batch.attention_mask.sum())
        if seen >= most:
            return


def _stack(rows: tuple[Row, ...], width: int) -> Batch:
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids)] = True
        scored[i, : len(row.ids)] = row.scored
    return Batch(ids, mask, scored)
