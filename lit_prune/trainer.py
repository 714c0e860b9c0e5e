"""What the callback does with a Trainer: refusals, validations, files, device, averaged copies."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import WeightAveraging

from lit_prune.errors import CalibrationError, ConfigError, PlanMismatchError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport
    from lit_prune.surgery import Compensation

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse a strategy under which parameters cannot be replaced in place.

    Raises:
        UnsupportedModelError: Names the strategy and what to use.
    """
    strategy = trainer.strategy
    if type(strategy).__name__ in _SHARDED:
        raise UnsupportedModelError(
            f"{type(strategy).__name__} shards the parameters, and shards are not cut in place. "
            "Save a consolidated checkpoint and prune that with lit_prune.prune(...), or train "
            "with strategy='ddp' or on one device."
        )
    start = getattr(strategy.launcher, "_start_method", None)
    if start in ("fork", "spawn", "forkserver"):
        # the parent process reloads the trained weights into its own, dense module
        raise UnsupportedModelError(
            f"strategy with start method {start!r}: the trained weights come back into a dense "
            "module. Train on one device, or with strategy='ddp'."
        )
    if trainer.world_size > 1:
        raise UnsupportedModelError(
            f"pruning on {trainer.world_size} processes is not supported yet. Train without this "
            "callback, then prune on one: EntropyPruningCallback(when='validate') and "
            "Trainer(devices=1).validate(module, ckpt_path=...)."
        )


def refuse_compiled(pl_module: LightningModule, model: PreTrainedModel) -> None:
    """Refuse a language model that runs compiled: hooks inside it would see nothing.

    Raises:
        UnsupportedModelError: Names the compiled module.
    """
    inside = set(model.modules())

    def compiled(module: nn.Module) -> bool:
        wrapped = isinstance(module, torch._dynamo.OptimizedModule)
        return wrapped or module._compiled_call_impl is not None

    for name, module in pl_module.named_modules():
        if compiled(module) and (module in inside or any(m is model for m in module.modules())):
            raise UnsupportedModelError(
                f"{name or type(pl_module).__name__} is compiled, and hooks see nothing inside. "
                "Give the Trainer the plain module, prune, and compile the result."
            )
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise UnsupportedModelError(
            f"{type(pl_module).__name__} is compiled, and hooks see nothing inside. Give the "
            "Trainer the plain module, prune, and compile the result."
        )


def refuse_no_validation(trainer: Trainer, stage: str) -> None:
    """Refuse a run that validates nothing.

    Raises:
        CalibrationError: Says what is missing.
    """
    if not (trainer.limit_val_batches and (stage != "fit" or trainer.enable_validation)):
        raise CalibrationError(
            "pruning calibrates on the validation batches, and this run validates nothing: no "
            "validation loader, no validation_step, or limit_val_batches="
            f"{trainer.limit_val_batches}. Pass val_dataloaders."
        )


def refuse_loaders(trainer: Trainer, val_dataloader_idx: int | None) -> None:
    """Refuse validation loaders that have nothing to calibrate on.

    Raises:
        ConfigError: If the loader that was asked for does not exist.
        CalibrationError: If there is no batch.
    """
    counts = trainer.num_val_batches
    if val_dataloader_idx is not None and not 0 <= val_dataloader_idx < len(counts):
        raise ConfigError(
            f"val_dataloader_idx={val_dataloader_idx}, but there are {len(counts)} validation "
            "loaders, counted from 0."
        )
    if not (sum(counts) if val_dataloader_idx is None else counts[val_dataloader_idx]):
        which = "" if val_dataloader_idx is None else f" {val_dataloader_idx}"
        raise CalibrationError(
            f"validation loader{which} has 0 batches ({list(counts)}): nothing to calibrate on. Is "
            "its data set empty, or shorter than one batch with drop_last=True?"
        )


def refuse_stale_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse to train a model that was changed after its optimizers were made.

    Raises:
        PlanMismatchError: Names the first parameter that no optimizer knows.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    if stepped <= {id(parameter) for parameter in pl_module.parameters()}:
        return
    lost = [
        name
        for name, parameter in pl_module.named_parameters()
        if parameter.requires_grad and id(parameter) not in stepped
    ]
    if lost:  # else it is the optimizer's own: parameters that the module does not register
        raise PlanMismatchError(
            f"{lost[0]} ({len(lost)} parameters in all) is not in any optimizer, and the "
            "optimizers hold parameters that left the model: a plan was applied after they were "
            "made, and training would silently leave the new parameters alone. Apply plans before "
            "trainer.fit, or let EntropyPruningCallback prune when the fit ends."
        )


def load_validation(trainer: Trainer) -> None:
    """Load the validation loaders of a fit before its first step, however far off they are."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # once: later calls find them loaded
    trainer.training = True


def validate_within_fit(trainer: Trainer) -> None:
    """Run the validation loop of a fit once, as the training loop does."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def is_rehearsal(trainer: Trainer) -> bool:
    """Return whether this is a ``fast_dev_run``: all code runs once, nothing is meant."""
    return bool(getattr(trainer, "fast_dev_run", False))


def write_artifacts(
    trainer: Trainer,
    calibration: Calibration,
    plan: PruningPlan | None = None,
    report: PruningReport | None = None,
    compensation: Compensation | None = None,
) -> None:
    """Write what there is to ``pruning/`` in the run's folder; call it on every rank.

    A ``fast_dev_run`` or ``barebones`` Trainer leaves no files.
    """
    root = trainer.log_dir or trainer.default_root_dir  # Lightning broadcasts it: on every rank
    if is_rehearsal(trainer) or trainer.barebones or not trainer.is_global_zero:
        return
    folder = Path(root) / "pruning"
    folder.mkdir(parents=True, exist_ok=True)
    calibration.save(folder / "calibration.safetensors")
    if plan is not None:
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    if report is not None:
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    if compensation is not None:
        compensation.save(folder / "compensation.safetensors")


def forget_averages(trainer: Trainer) -> None:
    """Let averaging callbacks drop their copy, as if no fit had begun.

    It has dense shapes, it has been copied into the model when training ended, and a later
    ``trainer.validate`` or ``save_checkpoint`` would put it back.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
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
