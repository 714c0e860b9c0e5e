"""Lightning's checkpoint files around a pruning: the best one before it, the pruned one after."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.errors import ArtifactError, ConfigError, UnsupportedModelError
from lit_prune.running.loops import is_a, is_rehearsal
from lit_prune.running.seen import steps_since
from lit_prune.running.sharded import is_sharded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer

    from lit_prune.running.seen import Seen

_log = logging.getLogger(__name__)

Weights = Literal["last", "best"]


def refuse_weights(weights: Weights, when: str) -> None:
    """Refuse a choice of weights that cannot be meant.

    Raises:
        ConfigError: Says what to do.
    """
    if weights not in ("last", "best"):
        raise ConfigError(f"weights must be 'last' or 'best', got {weights!r}.")
    if weights == "best" and when != "fit_end":
        raise ConfigError(
            f"weights 'best' are those of a fit when it ends, got {when=}. Prune at 'fit_end', or "
            "give trainer.validate the ckpt_path of the weights that you want to prune."
        )


def refuse_no_best(trainer: Trainer) -> None:
    """Refuse to prune the best weights where nothing says which those are.

    Raises:
        ConfigError: Says what is missing.
        UnsupportedModelError: If the weights are sharded.
    """
    if is_sharded(trainer):
        raise UnsupportedModelError(
            "weights='best' of sharded parameters are not gathered: load the best checkpoint, "
            "consolidated, and prune that with lit_prune.prune(...); or use weights='last'."
        )
    if not is_rehearsal(trainer) and _monitored(trainer) is None:
        raise ConfigError(
            "weights='best' are those that a ModelCheckpoint finds best, and this Trainer has none "
            "with a monitor. Add ModelCheckpoint(monitor='val_loss'), naming what you log, or "
            "leave weights='last'."
        )


@contextmanager
def chosen_weights(
    trainer: Trainer, pl_module: LightningModule, seen: Seen, weights: Weights | None, *, keep: bool
) -> Iterator[list[str]]:
    """Bring the weights that shall be pruned into the module, and what optimizers knew of them.

    Options of the optimizers stay where the run has brought them, and so do schedules. If what the
    ``with`` holds fails, the last weights are back.

    Args:
        trainer: Whose fit has ended.
        pl_module: Holds the last weights.
        seen: The last validation.
        weights: Which; None where no fit has ended, so that there is one kind only.
        keep: False brings the last weights back in any case.

    Yields:
        What the report shall say about it.

    Raises:
        ArtifactError: If the best checkpoint cannot be read.
        UnsupportedModelError: If it is sharded.
    """
    checkpoint, said = _monitored(trainer), steps_since(trainer, seen)
    if weights is None or checkpoint is None or is_rehearsal(trainer):
        yield said
        return
    if not checkpoint.best_model_path:
        if weights == "best":
            said.append("no best checkpoint was written: the last weights were pruned")
        yield said
        return
    best = f"{checkpoint.best_model_path} ({_score(checkpoint)})"
    if weights == "last":
        if not _is_last(trainer, checkpoint, seen):
            said.append(
                f"the last weights were pruned; the best by {checkpoint.monitor} are in {best}: "
                "weights='best' prunes those"
            )
        yield said
        return
    found = _read(trainer, checkpoint.best_model_path)
    if found["global_step"] == trainer.global_step:
        yield [*said, f"the last weights, which were pruned, are the best by {checkpoint.monitor}"]
        return
    states = found.get("optimizer_states")
    words = "" if states else "; it holds no optimizer states, so that moments start anew"
    kept = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
    before = [(optimizer.state, optimizer.param_groups) for optimizer in trainer.optimizers]
    done = False
    try:
        pl_module.load_state_dict(found["state_dict"], strict=pl_module.strict_loading)
        _load_moments(trainer, states)
        step = found["global_step"]
        del found, states  # as large as the model, and its moments
        yield [
            f"the best weights were pruned, of step {step}, not the last of step "
            f"{trainer.global_step}: {best}{words}"
        ]
        done = True
    finally:
        if not (done and keep):
            pl_module.load_state_dict(kept)
            for optimizer, (state, groups) in zip(trainer.optimizers, before, strict=True):
                optimizer.state, optimizer.param_groups = state, groups


def save_pruned_checkpoint(trainer: Trainer) -> None:
    """Save ``pruned.ckpt`` beside the checkpoints of the run, where it makes any; on every rank.

    A failure is a warning: the model is pruned, and in hand.
    """
    checkpoint = next((x for x in _checkpoints(trainer) if x.dirpath), None)
    if checkpoint is None or is_rehearsal(trainer):
        return
    path, version = _named(checkpoint, ""), checkpoint.STARTING_VERSION
    while checkpoint.file_exists(path, trainer):
        path, version = _named(checkpoint, f"-v{version}"), version + 1
    try:
        trainer.save_checkpoint(path, checkpoint.save_weights_only)
    except (OSError, RuntimeError) as error:
        _log.warning(
            "%s could not be written: %s. The model is pruned: trainer.save_checkpoint(...) or "
            "save_pruned(...) saves it elsewhere. Is the disk full?",
            path,
            error,
        )
        return
    rank_zero_info(f"lit_prune: the pruned run is in {path}; trainer.fit(ckpt_path=...) goes on.")


def _named(checkpoint: ModelCheckpoint, version: str) -> str:
    return os.path.join(str(checkpoint.dirpath), f"pruned{version}{checkpoint.FILE_EXTENSION}")


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    found: list[Any] = [x for x in trainer.checkpoint_callbacks if is_a(x, "ModelCheckpoint")]
    return found


def _monitored(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the checkpoint callback that knows the best weights."""
    return next((x for x in _checkpoints(trainer) if x.monitor), None)


def _score(checkpoint: ModelCheckpoint) -> str:
    score = checkpoint.best_model_score
    return f"{checkpoint.monitor} {'unknown' if score is None else format(float(score), '.4g')}"


def _is_last(trainer: Trainer, checkpoint: ModelCheckpoint, seen: Seen) -> bool:
    """Return whether the last validation is the best one, and no step followed it.

    The file would say it for sure, and is as large as the model.
    """
    score = trainer.callback_metrics.get(str(checkpoint.monitor))
    best = checkpoint.best_model_score
    same = score is not None and best is not None and float(score) == float(best)
    return same and seen.step == trainer.global_step


def _read(trainer: Trainer, path: str) -> dict[str, Any]:
    if os.path.isdir(path):
        raise UnsupportedModelError(
            f"{path} is a sharded checkpoint, and the best weights are in it. Consolidate it "
            "(python -m lightning.pytorch.utilities.consolidate_checkpoint), load it, and prune "
            "with lit_prune.prune(...); or use weights='last'. The model is unchanged."
        )
    try:
        found = trainer.strategy.checkpoint_io.load_checkpoint(
            path, map_location="cpu", weights_only=True
        )
    except Exception as error:  # of the file, of its format, of what it holds
        raise ArtifactError(
            f"{path}, with the best weights, cannot be read: {error} The model is unchanged and "
            "holds the last weights; weights='last' prunes those."
        ) from error
    return dict(found)


def _load_moments(trainer: Trainer, states: list[dict[str, Any]] | None) -> None:
    """Give optimizers the moments of a checkpoint, or none; their options stay."""
    if not states:
        for optimizer in trainer.optimizers:
            optimizer.state = defaultdict(dict)
        return
    for optimizer, state in zip(trainer.optimizers, states, strict=True):
        options = [dict(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
