"""`EntropyPruningCallback`: *when* things happen and on which rank; everything else is the library's."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lit_prune.allocation import make_budget
from lit_prune.calibration import Observer, RowSet
from lit_prune.config import PruningConfig, refuse_unknown
from lit_prune.decoder import find_causal_lm, spec_for
from lit_prune.errors import CalibrationError, ConfigError, PlanMismatchError, UnsupportedModelError
from lit_prune.measurement import measure
from lit_prune.methods import entropy_scores, preset
from lit_prune.pruner import calibrate, make_plan, make_report, refuse_non_finite_weights
from lit_prune.record import PruningRecord
from lit_prune.saving import save_pruned
from lit_prune.surgery import apply_plan
from lit_prune.views import log_report, log_unit_entropy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport

_log = logging.getLogger(__name__)

# Sharded parameters cannot be cut where they are; forked launchers reload dense shapes in the parent.
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class EntropyPruningCallback(Callback):
    """Observe the validation batches; prune once, when fine-tuning (or a plain ``trainer.validate``) is over.

    During each validation, hooks on the language model keep the token ids that pass and the moments of the unit
    activations; the last complete validation counts. When the fit ends (after the last optimizer step, after
    averaged weights are copied back), the kept ids are replayed to measure transfer entropy, the model is planned,
    measured, pruned in place and measured again on the same samples and prompts. Loggers receive the result.

    Args:
        pruning_ratio: Fraction of *decoder-layer parameters* to remove, in [0, 1).
        when: ``fit_end`` prunes after ``trainer.fit`` (a bare ``trainer.validate`` then only observes); ``validate``
            prunes after ``trainer.validate``.
        dry_run: Plan and report, but leave the model as it is.
        val_dataloader_idx: Which validation loader to observe where there are several; None observes all.
        **options: The other fields of `PruningConfig`.

    Attributes:
        calibration_: Statistics and samples; absent before the first complete validation.
        plan_: What was kept; absent before pruning.
        report_: Before and after; absent before pruning.

    Raises:
        ConfigError: At construction, if an option cannot be meant; in ``setup``, if validation is switched off.
        UnsupportedModelError: In ``setup``, if model or strategy cannot be pruned.
        BudgetError: In ``setup``, if the ratio cannot be reached.
        CalibrationError: If the validation text is unusable.

    Example::

        pruner = EntropyPruningCallback(pruning_ratio=0.3)
        trainer = Trainer(max_epochs=1, callbacks=[pruner])
        trainer.fit(module, datamodule)
        print(pruner.report_)
        pruner.save_pruned("pruned/")
    """

    calibration_: Calibration
    plan_: PruningPlan
    report_: PruningReport

    def __init__(
        self,
        *,
        pruning_ratio: float,
        when: Literal["fit_end", "validate"] = "fit_end",
        dry_run: bool = False,
        val_dataloader_idx: int | None = None,
        **options: Any,  # noqa: ANN401 - the fields of PruningConfig, checked there
    ) -> None:
        super().__init__()
        refuse_unknown(options)
        self.config = PruningConfig(pruning_ratio=pruning_ratio, **options)
        preset(self.config.preset)
        if when not in ("fit_end", "validate"):
            raise ConfigError(f"when must be 'fit_end' or 'validate', got {when!r}.")
        self.when = when
        self.dry_run = dry_run
        self.val_dataloader_idx = val_dataloader_idx
        self._observer: Observer | None = None
        self._seen: tuple[Observer, int] | None = None  # last complete validation, and the step it was at
        self._model: PreTrainedModel | None = None  # the model that was pruned
        self._checked = False

    # ------------------------------------------------------------------------------------------- before the run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._checked = False
        if stage == self._stage:
            _refuse_strategy(trainer)
            if trainer.limit_val_batches == 0 or (stage == "fit" and not trainer.enable_validation):
                raise CalibrationError(
                    "pruning calibrates on the validation batches, and this run validates nothing (no validation "
                    f"loader or validation_step, or limit_val_batches={trainer.limit_val_batches}). Pass val_dataloaders."
                )
            try:
                model = find_causal_lm(pl_module, self.config.language_model)
            except (UnsupportedModelError, ConfigError):
                if not _makes_model_later(pl_module):
                    raise
                return  # configure_model runs after setup; checked when the run starts
            self._check_request(model)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_end" and not self._checked:
            self._check_request(find_causal_lm(pl_module, self.config.language_model))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_end" and not self._is_done(pl_module) and not sum(_counts(trainer.num_val_batches)):
            raise CalibrationError("the validation loader has 0 batches: nothing to calibrate on after training.")

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int  # noqa: ANN401
    ) -> None:
        if batch_idx == 0:
            _refuse_stale_optimizers(trainer, pl_module)

    # --------------------------------------------------------------------------------------------- observing

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self._is_done(pl_module) or not self._observes(trainer):
            return
        model = find_causal_lm(pl_module, self.config.language_model)
        if not self._checked:
            self._check_request(model)
        self._release()
        self._observer = Observer(model, max_tokens=self.config.max_calibration_tokens)
        self._observer.open()

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._observer is not None and self.val_dataloader_idx is not None:
            self._observer.paused = dataloader_idx != self.val_dataloader_idx

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observer is None:
            return
        observer, self._observer = self._observer, None
        observer.close()
        if not observer.rows:
            raise CalibrationError(
                f"the validation ended and the language model saw no real token (val_dataloader_idx="
                f"{self.val_dataloader_idx}). Is the loader empty, or is the model called with a KV cache only?"
            )
        self._seen = (observer, trainer.global_step)
        self.calibration_ = observer.calibration()
        if trainer.is_global_zero and (folder := _artifact_folder(trainer)):
            self.calibration_.save(folder / "calibration.safetensors")
            if self.calibration_.units:
                entropies = entropy_scores(spec_for(observer.model), self.calibration_, self.config).units
                log_unit_entropy(trainer.loggers, entropies, trainer.global_step)

    # --------------------------------------------------------------------------------------- the end of the run

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_end" and not self._is_done(pl_module) and self._seen is None:
            # max_steps or max_time ended the run before its first validation: run the loop once
            rank_zero_info("lit_prune: no validation was completed in this run; running one to calibrate on.")
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here no optimizer step, checkpoint or copy of averaged weights follows, and DDP is unwrapped
        if self.when == "fit_end" and not self._is_done(pl_module):
            self._prune(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "validate" == self.when and not self._is_done(pl_module) and self._seen is not None:
            # outside of inference mode: parameters made inside it could never be trained
            self._prune(trainer, pl_module)
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()  # Lightning does not call `teardown` after an exception or Ctrl-C

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._seen is None:
            raise CalibrationError("no validation was completed in this run: there is nothing to calibrate on.")
        observer, step = self._seen
        model = find_causal_lm(pl_module, self.config.language_model)
        moved = trainer.global_step - step if trainer.state.fn == TrainerFn.FITTING else 0
        warnings = []
        if moved:
            warnings.append(f"{moved} optimizer steps followed the last validation: its samples were replayed")
        dry_run = self.dry_run or bool(trainer.fast_dev_run)
        bar = trainer.progress_bar_callback
        with _on_device(model, trainer.strategy.root_device):
            rows = RowSet.of(observer.rows.values())
            try:
                self.calibration_ = calibrate(
                    model,
                    rows,
                    self.config,
                    units=None if moved else (observer.unit_moments() or None),
                    notes=observer.notes,
                    progress=bar is not None and bar.is_enabled and trainer.is_global_zero,
                )
            except CalibrationError as error:
                if not trainer.fast_dev_run:
                    raise
                rank_zero_warn(f"lit_prune: fast_dev_run is too short to plan a pruning: {error}")
                return
            planned = make_plan(model, self.calibration_, self.config)
            before = measure(model, rows, self.config)
            after = None
            if not dry_run:
                apply_plan(model, planned.plan, planned.compensation)
                self._model = model
                after = measure(model, rows, self.config)
        self.plan_ = planned.plan
        self.report_ = make_report(planned, self.calibration_, self.config, before, after, warnings)
        if not dry_run:
            model.pruning_record = PruningRecord(self.plan_, self.report_)
        rank_zero_info(f"lit_prune: {self.report_.headline()}")
        if trainer.is_global_zero:
            if folder := _artifact_folder(trainer):
                self.calibration_.save(folder / "calibration.safetensors")
                (folder / "plan.json").write_text(self.plan_.to_json())
                (folder / "report.json").write_text(self.report_.to_json())
                if planned.compensation is not None:
                    planned.compensation.save(folder / "compensation.safetensors")
            log_report(
                trainer.loggers,
                spec=planned.budget.spec,
                plan=self.plan_,
                report=self.report_,
                entropies=planned.scores.units,
                transfer={(unit.layer, unit.kind): value for unit, value in planned.scores.transfer.items()},
                step=trainer.global_step,
            )

    # --------------------------------------------------------------------------------------------- for the user

    def save_pruned(self, directory: str | Path, **options: Any) -> Path:  # noqa: ANN401 - those of save_pruned
        """Save the pruned model with its plan and report; see `lit_prune.save_pruned`.

        Raises:
            ConfigError: If nothing has been pruned yet.
        """
        if self._model is None:
            raise ConfigError(
                "nothing has been pruned yet: call trainer.fit (or trainer.validate with when='validate') first"
                + ("; dry_run=True leaves the model dense." if self.dry_run else ".")
            )
        return save_pruned(self._model, directory, **options)

    @override
    def state_dict(self) -> dict[str, str]:
        # text only: it loads with weights_only=True
        return {"plan": self.plan_.to_json() if self._model is not None else ""}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if _stale_optimizer_parameters(trainer, pl_module):
            # the moments have dense shapes: resuming with them would fail in the first step
            checkpoint["optimizer_states"] = []
            checkpoint["lit_prune_stale_optimizer"] = True

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("lit_prune_stale_optimizer") and trainer.state.fn == TrainerFn.FITTING:
            raise PlanMismatchError(
                "this checkpoint was written right after pruning: it has pruned weights and no optimizer state that fits "
                "them. Start a new fit from these weights (no ckpt_path) for recovery fine-tuning."
            )

    # ------------------------------------------------------------------------------------------------- helpers

    @property
    def _stage(self) -> str:
        return "fit" if self.when == "fit_end" else "validate"

    def _observes(self, trainer: Trainer) -> bool:
        return trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING)

    def _is_done(self, pl_module: LightningModule) -> bool:
        """Whether this callback has pruned this very model already."""
        return self._model is not None and any(module is self._model for module in pl_module.modules())

    def _check_request(self, model: PreTrainedModel) -> None:
        if self._model is not model:
            make_budget(spec_for(model), self.config)
            refuse_non_finite_weights(model)
        self._checked = True

    def _release(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._observer = None


def _refuse_strategy(trainer: Trainer) -> None:
    name = type(trainer.strategy).__name__
    if name in _SHARDED:
        raise UnsupportedModelError(
            f"{name} shards the parameters, and sharded parameters are not cut in place. Save a consolidated checkpoint and "
            "prune that with lit_prune.prune(...), or train with strategy='ddp' or on one device."
        )
    launcher = getattr(trainer.strategy.launcher, "_start_method", None)
    if launcher in ("fork", "spawn", "forkserver"):
        raise UnsupportedModelError(
            f"a {launcher}ed launcher reloads the weights into the dense module of the parent process. Use strategy='ddp'."
        )
    if trainer.world_size > 1:
        raise UnsupportedModelError(
            f"pruning on {trainer.world_size} processes is not supported yet. Train on as many as you like, then prune the "
            "checkpoint on one: EntropyPruningCallback(when='validate') with Trainer(devices=1).validate(...)."
        )


def _makes_model_later(pl_module: LightningModule) -> bool:
    return type(pl_module).configure_model is not LightningModule.configure_model


def _counts(batches: object) -> list[int | float]:
    return list(batches) if isinstance(batches, (list, tuple)) else [batches]  # type: ignore[list-item]


def _stale_optimizer_parameters(trainer: Trainer, pl_module: LightningModule) -> int:
    owned = {id(parameter) for parameter in pl_module.parameters()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return sum(id(parameter) not in owned for group in groups for parameter in group["params"])


def _refuse_stale_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    if stale := _stale_optimizer_parameters(trainer, pl_module):
        raise PlanMismatchError(
            f"{stale} parameters of the optimizers are no longer part of the model: it was changed (a plan applied?) after "
            "the optimizers were made, and training would silently leave the new parameters alone. Change the model before "
            "trainer.fit, or let this callback prune when the fit ends."
        )


def _artifact_folder(trainer: Trainer) -> Path | None:
    """Where calibration, plan and report of this run lie: ``lit_prune/`` in the run's folder."""
    if trainer.fast_dev_run or getattr(trainer, "barebones", False):
        return None
    folder = Path(trainer.log_dir or trainer.default_root_dir) / "lit_prune"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _on_device(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Work where the model was trained: Lightning has moved it to the CPU by the time that a fit ends."""
    home = next(model.parameters()).device
    if home == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
