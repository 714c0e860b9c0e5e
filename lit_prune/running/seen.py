"""The last complete validation of a run, and calibrating on what it showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.calibration import Calibration, RowSet, data_notes
from lit_prune.errors import CalibrationError
from lit_prune.measuring import calibrate
from lit_prune.running.loops import is_rehearsal

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel

    from lit_prune.calibration import Observer
    from lit_prune.config import PruningConfig


@dataclass(frozen=True, slots=True)
class Seen:
    """The last complete validation.

    Attributes:
        observer: What passed through the model in it.
        step: Optimizer steps that had been made.
    """

    observer: Observer
    step: int


def calibrate_on(
    trainer: Trainer, model: PreTrainedModel, seen: Seen, config: PruningConfig
) -> Calibration | None:
    """Measure what the request needs on the text that a validation showed.

    Returns:
        None in a ``fast_dev_run`` that is too short for it.

    Raises:
        CalibrationError: If the text is unusable.
    """
    observer = seen.observer
    # after a fit the weights may be others than those validated: more steps, averages, a best
    # checkpoint that was loaded back
    fitted = trainer.state.fn == TrainerFn.FITTING
    units = None if fitted else (observer.unit_moments() or None)
    notes = (*observer.notes, *data_notes(trainer.val_dataloaders))
    rows = RowSet.of(observer.rows.values())
    try:
        return calibrate(
            model, rows, config, units=units, notes=notes, progress=shows_progress(trainer)
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
