"""Pruning in stages, one after each epoch: what each removes, and what all come to together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Self

from lightning.pytorch.utilities import rank_zero_info

from lit_prune.allocation import refuse_impossible
from lit_prune.checks import check_choice
from lit_prune.config import RATIO_TOLERANCE, PruningConfig
from lit_prune.decoder import spec_for, whole_of
from lit_prune.errors import ConfigError, UnsupportedModelError
from lit_prune.pruner import DryRun
from lit_prune.record import PruningRecord
from lit_prune.running.loops import is_a, is_rehearsal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer
    from torch import nn
    from transformers import PreTrainedModel

    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport

When = Literal["fit_end", "validate", "epoch_end"]
# Two stages must differ by more than both may miss their ratios.
_LEAST_STEP = 2 * RATIO_TOLERANCE


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cumulative ratios, of the decoder parameters that the dense model has.

    Attributes:
        ratios: One for each stage, ascending; a single one where all is done at once (None
            where the request has another target).
        stages: Whether they are stages, one after each epoch.
    """

    ratios: tuple[float, ...]
    stages: bool

    @classmethod
    def of(
        cls, pruning_ratio: float | Sequence[float] | None, when: When, *, dry_run: DryRun
    ) -> Self:
        """Read what was asked for.

        Raises:
            ConfigError: If the ratios and the time do not go together.
        """
        if when not in ("fit_end", "validate", "epoch_end"):
            raise ConfigError(f"when must be 'fit_end', 'validate' or 'epoch_end', got {when!r}.")
        check_choice("dry_run", dry_run, DryRun)
        several = isinstance(pruning_ratio, list | tuple)
        if several != (when == "epoch_end"):
            raise ConfigError(
                "when='epoch_end' prunes after each of the first epochs, by a list of ratios such "
                f"as [0.1, 0.2, 0.3], and only it does: got pruning_ratio={pruning_ratio!r} with "
                f"{when=}."
            )
        if not several:
            return cls((pruning_ratio,), stages=False)  # type: ignore[arg-type] # checked by `PruningConfig`
        ratios: tuple[float, ...] = tuple(pruning_ratio)  # type: ignore[arg-type]
        for ratio in ratios:
            PruningConfig(pruning_ratio=ratio)
        if not ratios or any(round(b - a, 9) < _LEAST_STEP for a, b in pairwise((0.0, *ratios))):
            raise ConfigError(
                "pruning_ratio must be cumulative, each ratio at least "
                f"{_LEAST_STEP:g} above the one before, as in [0.1, 0.2, 0.3]; got {list(ratios)}."
            )
        if dry_run:
            raise ConfigError(
                "dry_run changes nothing, and each stage of a list of pruning ratios starts from "
                "what the one before has left: give one ratio, and when='fit_end'."
            )
        return cls(ratios, stages=True)

    def refuse_budget(self, config: PruningConfig) -> None:
        """Refuse to count something other than parameters in stages.

        Raises:
            ConfigError: Names it.
        """
        if self.stages and config.budget != "parameters":
            raise ConfigError(
                f"a list of pruning ratios counts decoder parameters, got budget={config.budget!r}."
            )

    def refuse_trainer(self, trainer: Trainer) -> None:
        """Refuse a run in which no pruning is possible between epochs, or none for every stage.

        Raises:
            ConfigError: If there are fewer epochs than stages.
            UnsupportedModelError: If something holds on to the dense parameters.
        """
        if not self.stages:
            return
        epochs = trainer.max_epochs
        if epochs is not None and 0 <= epochs < len(self.ratios) and not is_rehearsal(trainer):
            raise ConfigError(
                f"pruning_ratio has {len(self.ratios)} stages, one after each epoch, and "
                f"max_epochs is {epochs}. Train for more epochs, or leave stages out."
            )
        if not is_a(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
            raise UnsupportedModelError(
                f"{type(trainer.strategy).__name__} wraps or shards the model while it trains, and "
                "would not see the new parameters. For when='epoch_end' train on one device or "
                "with strategy='ddp'."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if is_a(callback, "WeightAveraging", "StochasticWeightAveraging"):
                raise UnsupportedModelError(
                    f"{type(callback).__name__} averages weights over epochs, and between those of "
                    "when='epoch_end' their shapes change. Leave it out, or prune at 'fit_end'."
                )

    def refuse_ratios(self, model: PreTrainedModel, config: PruningConfig) -> None:
        """Refuse ratios that cannot be reached; each as if it were the only one.

        Raises:
            ConfigError: If a protected layer does not exist.
            BudgetError: If a ratio cannot be reached.
        """
        for ratio in () if self.done(model) else self.ratios:
            refuse_impossible(model, replace(config, pruning_ratio=ratio))

    def done(self, model: nn.Module) -> int:
        """Return how many stages a model has behind it; what travels on it says so."""
        return _done(self._record(model))

    def has_ended(
        self, module: nn.Module, pruned: nn.Module | None, restored: PruningPlan | None
    ) -> bool:
        """Return whether nothing is left to prune in a module; arguments as of `is_pruned`."""
        if self.stages:
            return any(self.done(part) == len(self.ratios) for part in module.modules())
        return is_pruned(module, pruned, restored)

    def say_ended(self) -> None:
        """Say that a fit prunes nothing, since every stage is behind the model."""
        if self.stages:
            rank_zero_info(
                f"lit_prune: the stages {list(self.ratios)} are behind this model: it is trained, "
                "and not pruned further."
            )

    def is_due(self, trainer: Trainer, model: nn.Module) -> bool:
        """Return whether the next stage follows the epochs that have ended."""
        return not self.stages or self.done(model) < min(trainer.current_epoch, len(self.ratios))

    def next(self, model: PreTrainedModel, config: PruningConfig) -> Stage:
        """Say what the next stage shall remove of what is left."""
        if not self.stages:
            return Stage(self, config, "", None, {}, 0, 0)
        spec, record = spec_for(model), self._record(model)
        before = record.plan.provenance["schedule"] if record else {}
        ratio = self.ratios[_done(record)]
        dense = before.get("decoder_parameters", spec.decoder_parameters)
        protected = config.protected_layers
        if record:  # layers have other places in what is left of the stack
            stack = record.plan.stack(len(spec.blocks))
            protected = tuple(stack.index(layer) for layer in protected)
        share = 1 - (1 - ratio) * dense / spec.decoder_parameters
        return Stage(
            self,
            replace(config, pruning_ratio=share, protected_layers=protected),
            f"epoch-{_done(record)}",
            record.plan if record else None,
            before,
            spec.decoder_parameters,
            spec.total_parameters,
        )

    def _record(self, model: nn.Module) -> PruningRecord | None:
        """Return what travels on a model that stages of this schedule have pruned."""
        record = getattr(model, "pruning_record", None)
        if not self.stages or not isinstance(record, PruningRecord):
            return None
        done = _done(record)
        mine = list(self.ratios[:done])
        return record if done and record.plan.provenance["schedule"]["ratios"] == mine else None


@dataclass(frozen=True, slots=True)
class Stage:
    """One pruning.

    Attributes:
        schedule: What it belongs to.
        config: The request, of the model as it is now.
        folder: Where its files go, named for the epoch that it follows; "" for the run's own.
        first: What earlier stages have kept; None before the first.
        before: What the plan of the earlier stages says about them.
        decoder_parameters: Of the decoder, before this stage.
        total_parameters: Of the whole model, before this stage.
    """

    schedule: Schedule
    config: PruningConfig
    folder: str
    first: PruningPlan | None
    before: dict[str, Any]
    decoder_parameters: int
    total_parameters: int

    def finish(
        self, model: PreTrainedModel, plan: PruningPlan, report: PruningReport, *, ended: bool
    ) -> tuple[PruningPlan, PruningReport]:
        """Say what all stages so far come to, in terms of the dense model; also on the model.

        Args:
            model: Pruned, but for a dry run.
            plan: This stage.
            report: This stage.
            ended: Whether the run has, so that no other stage will follow.
        """
        if not self.schedule.stages:
            return plan, report
        number = len(self.before.get("ratios", ())) + 1
        ratio = self.schedule.ratios[number - 1]
        decoder = self.before.get("decoder_parameters", self.decoder_parameters)
        total = self.before.get("total_parameters", self.total_parameters)
        achieved = 1 - self.decoder_parameters * (1 - report.achieved_ratio) / decoder
        stage = {
            "plan_digest": plan.digest,
            "requested_ratio": ratio,
            "achieved_ratio": achieved,
            "requested_of_what_was_left": report.requested_ratio,
            "achieved_of_what_was_left": report.achieved_ratio,
        }
        schedule = {
            "ratios": list(self.schedule.ratios[:number]),
            "decoder_parameters": decoder,
            "total_parameters": total,
            "stages": [*self.before.get("stages", ()), stage],
        }
        facts = {**plan.provenance, "achieved_ratio": achieved, "schedule": schedule}
        if (
            self.first is not None
        ):  # layers and sizes of this stage are not those of the dense model
            del facts["sizes"], facts["prices"]
            plan = plan.after(self.first)
            facts |= plan.provenance
        plan = replace(plan, provenance=facts)
        words = (
            f"stage {number} of {len(self.schedule.ratios)}: {report.achieved_ratio:.2%} of the "
            f"decoder parameters that were left (asked {report.requested_ratio:.2%}), which makes "
            f"{achieved:.2%} of the dense model's (asked {ratio:.2%}); the table compares with the "
            "model before this stage"
        )
        left = list(self.schedule.ratios[number:]) if ended else []
        unreached = [f"the run ended before the stages {left}"] if left else []
        report = replace(
            report,
            requested_ratio=ratio,
            achieved_ratio=achieved,
            total_ratio=1 - self.total_parameters * (1 - report.total_ratio) / total,
            plan_digest=plan.digest,
            warnings=(words, *unreached, *report.warnings),
        )
        if not report.dry_run:
            for part in {model, whole_of(model)}:
                part.pruning_record = PruningRecord(plan, report)  # type: ignore[assignment]
        return plan, report


def is_pruned(module: nn.Module, pruned: nn.Module | None, restored: PruningPlan | None) -> bool:
    """Return whether a callback has pruned what a module holds.

    Args:
        module: Of a run.
        pruned: The model that the callback has pruned.
        restored: What a checkpoint, written with the callback, says was pruned.
    """
    whole = None if pruned is None else whole_of(pruned)  # type: ignore[arg-type]
    for part in module.modules():
        record = getattr(part, "pruning_record", None)
        if part is whole or (record and restored and record.plan.digest == restored.digest):
            return True
    return False


def _done(record: PruningRecord | None) -> int:
    schedule = record.plan.provenance.get("schedule", {}) if record else {}
    return len(schedule.get("ratios", ()))
