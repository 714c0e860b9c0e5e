"""One pruning inside a run: the right weights, calibrated, cut, and told of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.pruner import carry_out
from lit_prune.running.checkpoint_files import chosen_weights
from lit_prune.running.loops import on_device
from lit_prune.running.optimizers import carried_over
from lit_prune.running.seen import calibrate_on, shows_progress
from lit_prune.views import log_report, report_scalars

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.config import PruningConfig
    from lit_prune.planning import Planned
    from lit_prune.report import PruningReport
    from lit_prune.running.artifacts import Artifacts
    from lit_prune.running.checkpoint_files import Weights
    from lit_prune.running.seen import Seen


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one pruning has left."""

    calibration: Calibration
    planned: Planned
    report: PruningReport


def prune_within(
    trainer: Trainer,
    pl_module: LightningModule,
    model: PreTrainedModel,
    seen: Seen,
    config: PruningConfig,
    artifacts: Artifacts,
    *,
    weights: Weights | None,
    dry_run: bool,
) -> Pruned | None:
    """Prune the model of a run in place, and let its optimizers go on with what stays.

    Args:
        trainer: Of the run, in which no step is being made.
        pl_module: Holds the model.
        model: In its last weights.
        seen: The last validation.
        config: The resolved request.
        artifacts: Where its files go.
        weights: Which weights to prune, where a fit has ended.
        dry_run: Leave everything as it is.

    Returns:
        None in a ``fast_dev_run`` that is too short to plan a pruning.
    """
    with (
        chosen_weights(trainer, pl_module, seen, weights, keep=not dry_run) as said,
        on_device(model, trainer.strategy.root_device),
    ):
        calibration = calibrate_on(trainer, model, seen, config)
        if calibration is None:
            return None
        planned, report = carry_out(
            model,
            calibration,
            config,
            dry_run=dry_run,
            warnings=said,
            keep=partial(artifacts.plan, calibration),
            carry=partial(carried_over, trainer.optimizers, model),
            progress=shows_progress(trainer),
        )
    return Pruned(calibration, planned, report)


def tell(trainer: Trainer, planned: Planned, report: PruningReport) -> None:
    """Say the headline, and give the loggers everything.

    What loggers get as scalars is in ``trainer.callback_metrics`` too, where a search over
    hyperparameters reads what a run came to.
    """
    rank_zero_info(f"lit_prune: {report.headline()}")
    scalars = {name: torch.tensor(value) for name, value in report_scalars(report).items()}
    trainer.callback_metrics.update(scalars)
    if trainer.is_global_zero:
        log_report(
            trainer.loggers,
            spec=planned.budget.spec,
            plan=planned.plan,
            report=report,
            entropies=planned.scores.units,
            transfer={(unit.layer, unit.kind): te for unit, te in planned.scores.transfer.items()},
            damage=planned.damage,
            step=trainer.global_step,
        )
