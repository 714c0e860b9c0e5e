"""What a run is refused for, before it starts or before it would go wrong."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from lit_prune.calibration import LEFT_OUT, NOTHING_LEFT
from lit_prune.decoder import whole_of
from lit_prune.errors import (
    CalibrationError,
    ConfigError,
    PlanMismatchError,
    UnsupportedModelError,
)
from lit_prune.ranks import ALONE
from lit_prune.running.loops import is_a
from lit_prune.running.sharded import is_sharded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet
    from lit_prune.ranks import Ranks


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse a strategy under which parameters cannot be replaced in place.

    Raises:
        UnsupportedModelError: Names the strategy and what to use.
    """
    strategy = trainer.strategy
    start = getattr(strategy.launcher, "_start_method", None)
    if start in ("fork", "spawn", "forkserver"):
        # the parent process reloads the trained weights into its own, dense module
        raise UnsupportedModelError(
            f"strategy with start method {start!r}: the trained weights come back into a dense "
            "module. Train on one device, or with strategy='ddp'."
        )
    if trainer.world_size > 1 and not (is_a(strategy, "DDPStrategy") or is_sharded(trainer)):
        raise UnsupportedModelError(
            f"{type(strategy).__name__} on {trainer.world_size} processes: known are DDP, which "
            "holds the whole model in each, and FSDP, ModelParallel and DeepSpeed, which shard it. "
            "Train with one of them or on one device."
        )


def refuse_compiled(pl_module: LightningModule, model: PreTrainedModel) -> None:
    """Refuse a language model that runs compiled: hooks inside it would see nothing.

    Raises:
        UnsupportedModelError: Names the compiled module.
    """
    inside, whole = set(model.modules()), whole_of(model)

    def compiled(module: nn.Module) -> bool:
        wrapped = isinstance(module, torch._dynamo.OptimizedModule)
        return wrapped or module._compiled_call_impl is not None

    for name, module in pl_module.named_modules():
        if compiled(module) and (module in inside or any(m is whole for m in module.modules())):
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


def refuse_loaders(trainer: Trainer, val_dataloader_idx: int | None, ranks: Ranks = ALONE) -> None:
    """Refuse validation loaders that have nothing to calibrate on, on any of the ranks.

    Raises:
        ConfigError: If the loader that was asked for does not exist.
        CalibrationError: If there is no batch.
    """
    shares = ranks.gather(list(trainer.num_val_batches))
    counts = [sum(loader) for loader in zip_longest(*shares, fillvalue=0)]
    if val_dataloader_idx is not None and not 0 <= val_dataloader_idx < len(counts):
        raise ConfigError(
            f"val_dataloader_idx={val_dataloader_idx}, but there are {len(counts)} validation "
            "loaders, counted from 0."
        )
    if not (sum(counts) if val_dataloader_idx is None else counts[val_dataloader_idx]):
        which = "" if val_dataloader_idx is None else f" {val_dataloader_idx}"
        raise CalibrationError(
            f"validation loader{which} has 0 batches ({counts}): nothing to calibrate on. Is "
            "its data set empty, or shorter than one batch with drop_last=True?"
        )


def refuse_stale_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse to train a model that was changed after its optimizers were made.

    Raises:
        PlanMismatchError: Names the first parameter that no optimizer knows.
    """
    if is_sharded(trainer):  # shards and whole parameters take turns in the module
        return
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


def refuse_nothing_seen(trainer: Trainer, rows: RowSet, notes: Sequence[str] = ()) -> None:
    """Refuse a validation in which the language model saw no text.

    Raises:
        CalibrationError: Says how much was validated.
    """
    if rows.rows:
        return
    if any(LEFT_OUT in note for note in notes):
        raise CalibrationError(f"{NOTHING_LEFT}.")
    batches = sum(trainer.num_val_batches)
    length = "all" if math.isinf(batches) else f"{batches}"  # an iterable data set does not know
    raise CalibrationError(
        f"the validation ended after {length} batches of its loader, and the language model itself "
        "saw no real token. Is the loader empty? Is the model called in validation_step, and not "
        "only its base model, or with a KV cache, or in generate?"
    )
