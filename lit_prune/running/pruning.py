"""One pruning inside a run: the right weights, calibrated, cut, and told of."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.decoder import whole_of
from lit_prune.plan import PruningPlan
from lit_prune.pruner import DryRun, carry_out
from lit_prune.ranks import ALONE
from lit_prune.report import PruningReport
from lit_prune.running.checkpoint_files import chosen_weights
from lit_prune.running.loops import on_device
from lit_prune.running.optimizers import carried_over
from lit_prune.running.seen import calibrate_on, shows_progress
from lit_prune.running.sharded import STAYS_DENSE, whole_copy
from lit_prune.views import log_report, report_scalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.config import PruningConfig
    from lit_prune.planning import Planned
    from lit_prune.ranks import Ranks
    from lit_prune.running.artifacts import Artifacts
    from lit_prune.running.checkpoint_files import Weights
    from lit_prune.running.seen import Seen


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one pruning has left.

    Attributes:
        plan: What stays.
        report: Before and after.
        model: The pruned one; None where another rank has it.
        calibration: What it rests on; None there, too.
        planned: What was decided; None there, too.
    """

    plan: PruningPlan
    report: PruningReport
    model: PreTrainedModel | None = None
    calibration: Calibration | None = None
    planned: Planned | None = None


def prune_within(
    trainer: Trainer,
    pl_module: LightningModule,
    model: PreTrainedModel,
    seen: Seen,
    config: PruningConfig,
    artifacts: Artifacts,
    *,
    weights: Weights | None,
    dry_run: DryRun,
    ranks: Ranks = ALONE,
    said: Sequence[str] = (),
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
        dry_run: Leave everything as it is; ``measured``: but tell what it would cost.
        ranks: All must call this.
        said: What the report shall say besides.

    Returns:
        None in a ``fast_dev_run`` that is too short to plan a pruning.
    """
    with ExitStack() as stack:
        with ranks.together():  # one rank may not find the file
            chosen = chosen_weights(trainer, pl_module, seen, weights, keep=not dry_run)
            words = stack.enter_context(chosen)
        stack.enter_context(on_device(model, trainer.strategy.root_device))
        calibration = calibrate_on(trainer, model, seen, config, ranks)
        if calibration is None:
            return None
        planned, report = carry_out(
            model,
            calibration,
            config,
            dry_run=dry_run,
            warnings=(*said, *words),
            keep=partial(artifacts.plan, calibration),
            carry=partial(carried_over, trainer.optimizers, whole_of(model)),
            progress=shows_progress(trainer),
            ranks=ranks,
        )
    return Pruned(planned.plan, report, model, calibration, planned)


def prune_copy(
    trainer: Trainer,
    pl_module: LightningModule,
    model: PreTrainedModel,
    seen: Seen,
    config: PruningConfig,
    artifacts: Artifacts,
    *,
    ranks: Ranks,
    **options: Any,
) -> Pruned | None:
    """Do what `prune_within` does to a whole copy of a sharded model, on rank 0; see there."""
    whole = whole_copy(model, ranks)

    def on_copy() -> Pruned | None:
        assert whole is not None  # noqa: S101 - only rank 0 is asked
        return prune_within(
            trainer, pl_module, whole, seen, config, artifacts, said=(STAYS_DENSE,), **options
        )

    return ranks.decide(on_copy, _written, _read)


def _written(done: Pruned | None) -> str:
    return json.dumps(done and [done.plan.to_json(), done.report.to_json()])


def _read(text: str) -> Pruned | None:
    found = json.loads(text)
    if found is None:
        return None
    return Pruned(PruningPlan.from_json(found[0]), PruningReport.from_json(found[1]))


def tell(trainer: Trainer, planned: Planned | None, report: PruningReport) -> None:
    """Say the headline, and give the loggers everything.

    What loggers get as scalars is in ``trainer.callback_metrics`` too, where a search over
    hyperparameters reads what a run came to.
    """
    rank_zero_info(f"lit_prune: {report.headline()}")
    scalars = {name: torch.tensor(value) for name, value in report_scalars(report).items()}
    trainer.callback_metrics.update(scalars)
    if trainer.is_global_zero and planned is not None:
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
