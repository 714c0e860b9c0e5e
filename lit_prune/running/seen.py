"""What the validations of a run have shown, and a calibration on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.calibration import CAPPED, Calibration, Row, RowSet, data_notes
from lit_prune.decoder import fingerprint, spec_for
from lit_prune.errors import CalibrationError
from lit_prune.measuring import calibrate
from lit_prune.methods import entropy_scores
from lit_prune.ranks import ALONE
from lit_prune.running.loops import is_rehearsal
from lit_prune.running.refusals import refuse_nothing_seen
from lit_prune.views import log_unit_entropy

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor
    from transformers import PreTrainedModel

    from lit_prune.calibration import Observer
    from lit_prune.config import PruningConfig
    from lit_prune.decoder import SubBlock
    from lit_prune.ranks import Ranks
    from lit_prune.running.artifacts import Artifacts


@dataclass(frozen=True, slots=True)
class Seen:
    """The last complete validation.

    Attributes:
        rows: What passed through the model in it.
        step: Optimizer steps that had been made.
        notes: What the report should say about the text.
        units: Moments of the inputs of every output projection; empty where no token fell on the
            calibrate side, or where several processes saw parts: a sample that two of them saw
            would count twice.
        error: What went wrong while it was observed, where that could not be raised at once.
    """

    rows: RowSet
    step: int
    notes: tuple[str, ...] = ()
    units: dict[SubBlock, tuple[Tensor, Tensor]] = field(default_factory=dict)
    error: Exception | None = None

    @classmethod
    def by(cls, observer: Observer, step: int) -> Self:
        """Return what this process has seen."""
        rows, notes = RowSet.of(observer.rows.values()), tuple(observer.notes)
        return cls(rows, step, notes, observer.unit_moments(), observer.error)

    def _to_json(self) -> dict[str, Any]:
        rows = [
            [None if x is None else x.tolist() for x in (row.ids, row.scored.int(), row.labels)]
            for row in self.rows.rows
        ]
        return {"rows": rows, "step": self.step, "notes": self.notes}


def seen_by_all(seen: Seen | None, ranks: Ranks, max_tokens: int) -> Seen | None:
    """Return what all ranks have seen, the same on all of them; repeats count once.

    Args:
        seen: What this rank has; None where its loader was empty.
        ranks: All must call this.
        max_tokens: Real tokens to keep, at most.

    Returns:
        None if no rank has validated.

    Raises:
        LitPruneError: If a rank has met an error while it observed; on all ranks.
    """
    ranks.agree(None if seen is None else seen.error)
    if ranks.size == 1:
        return seen
    shares = [share for share in ranks.gather(seen and seen._to_json()) if share is not None]
    if not shares:
        return None
    whole = RowSet.of(
        Row.of(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(scored, dtype=torch.bool),
            None if labels is None else torch.tensor(labels, dtype=torch.int64),
        )
        for share in shares
        for ids, scored, labels in share["rows"]
    )
    rows = whole.capped(max_tokens)
    notes = [note for share in shares for note in share["notes"]]
    notes += [CAPPED] if len(rows.rows) < len(whole.rows) else []
    return Seen(rows, max(share["step"] for share in shares), tuple(dict.fromkeys(notes)))


def judge(
    trainer: Trainer,
    model: PreTrainedModel,
    seen: Seen,
    config: PruningConfig,
    artifacts: Artifacts,
) -> Calibration:
    """Refuse a validation that is too little to calibrate on: now, not when training is over.

    What was seen, before any replay, is written to the run's folder, and its entropies are logged.

    Raises:
        CalibrationError: If the language model saw no text, or too little.
    """
    refuse_nothing_seen(trainer, seen.rows, seen.notes)
    calibration = Calibration(fingerprint(model), seen.rows, seen.units, notes=seen.notes)
    if not is_rehearsal(trainer):
        calibration.require(config.min_calibration_tokens)
    artifacts.calibration(calibration)
    if trainer.is_global_zero and calibration.units:
        scores = entropy_scores(spec_for(model), calibration, config)
        log_unit_entropy(trainer.loggers, scores.units, seen.step)
    return calibration


def calibrate_on(
    trainer: Trainer,
    model: PreTrainedModel,
    seen: Seen,
    config: PruningConfig,
    ranks: Ranks = ALONE,
) -> Calibration | None:
    """Measure what the request needs on the text that a validation showed.

    Returns:
        None in a ``fast_dev_run`` that is too short for it.

    Raises:
        CalibrationError: If the text is unusable.
    """
    # after a fit the weights may be others than those validated: more steps, averages, a best
    # checkpoint that was loaded back
    fitted = trainer.state.fn == TrainerFn.FITTING
    units = None if fitted else (seen.units or None)
    notes = (*seen.notes, *data_notes(trainer.val_dataloaders))
    try:
        return calibrate(
            model,
            seen.rows,
            config,
            units=units,
            notes=notes,
            progress=shows_progress(trainer),
            ranks=ranks,
        )
    except CalibrationError as error:
        if not is_rehearsal(trainer):
            raise
        rank_zero_info(f"lit_prune: fast_dev_run is too short to plan a pruning: {error}")
        return None


def steps_since(trainer: Trainer, seen: Seen) -> list[str]:
    """Say how many optimizer steps followed the validation, where any did."""
    moved = trainer.global_step - seen.step
    if trainer.state.fn != TrainerFn.FITTING or not moved:
        return []
    return [f"{moved} optimizer steps followed the last validation: replayed its text"]


def shows_progress(trainer: Trainer) -> bool:
    """Return whether this process shows progress bars."""
    bar = trainer.progress_bar_callback
    return trainer.is_global_zero and bool(getattr(bar, "is_enabled", False))
