"""What Lightning's loops, devices and other callbacks need to be told."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from transformers import PreTrainedModel


def makes_its_model(pl_module: LightningModule) -> bool:
    """Return whether the user's module builds its model in ``configure_model``."""
    # not by identity: under `pytorch_lightning` the one that does nothing is another function
    root = type(pl_module).configure_model.__module__.partition(".")[0]
    return root not in ("lightning", "pytorch_lightning")


def load_validation(trainer: Trainer) -> None:
    """Load the validation loaders of a fit before its first step, however far off they are."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # once: later calls find them loaded
    trainer.training = True


def validate_within_fit(trainer: Trainer) -> None:
    """Run the validation loop of a fit once, as the training loop does."""
    rank_zero_info("lit_prune: nothing validated so far; validating to calibrate.")
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def is_a(thing: object, *names: str) -> bool:
    """Return whether Lightning calls the class of ``thing``, or one above it, by such a name.

    Each of its import roots, ``lightning.pytorch`` and ``pytorch_lightning``, has classes of its
    own.
    """
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def rewrap(trainer: Trainer) -> None:
    """Let DDP, while it trains, find the parameters that the model has now."""
    strategy: Any = trainer.strategy
    if is_a(strategy, "DDPStrategy"):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def is_rehearsal(trainer: Trainer) -> bool:
    """Return whether this is a ``fast_dev_run``: all code runs once, nothing is meant."""
    return bool(getattr(trainer, "fast_dev_run", False))


def forget_averages(trainer: Trainer) -> None:
    """Let averaging callbacks drop their copy, as if no fit had begun.

    It has dense shapes, it has been copied into the model when training ended, and a later
    ``trainer.validate`` or ``save_checkpoint`` would put it back.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_a(callback, "WeightAveraging"):
            callback._average_model = None


@contextmanager
def on_device(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Work where the model was trained: Lightning has moved it to the CPU when a fit ends."""
    home = next(model.parameters()).device
    try:
        model.to(device)  # type: ignore[arg-type]
        yield
    finally:
        model.to(home)  # type: ignore[arg-type]
