"""`EntropyPruningCallback`: *when* things happen and on which rank; all else is the library's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lit_prune.allocation import refuse_impossible
from lit_prune.calibration import Observer
from lit_prune.checkpoints import follow_checkpoints, remember_plan
from lit_prune.config import PruningConfig, refuse_unknown
from lit_prune.decoder import find_causal_lm
from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.methods import preset
from lit_prune.plan import PruningPlan
from lit_prune.pruner import carry_out, refuse_non_finite_weights
from lit_prune.ranks import ALONE, Ranks
from lit_prune.running import (
    STALE,
    Artifacts,
    Seen,
    calibrate_on,
    forget_averages,
    is_rehearsal,
    judge,
    load_validation,
    on_device,
    refuse_compiled,
    refuse_loaders,
    refuse_no_validation,
    refuse_stale_checkpoint,
    refuse_stale_optimizers,
    refuse_strategy,
    seen_by_all,
    shows_progress,
    steps_since,
    tell,
    validate_within_fit,
)
from lit_prune.saving import save_pruned
from lit_prune.views import log_request

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.report import PruningReport


class EntropyPruningCallback(Callback):
    """Observe the validation batches; prune once, when fine-tuning (or a bare validate) is over.

    During each validation, hooks on the language model keep the token ids that pass and the moments
    of the unit activations; the last complete validation counts. When the fit ends (after the last
    optimizer step, after averaged weights are copied back), the kept ids are replayed to measure
    transfer entropy, the model is planned, measured, pruned in place and measured again on the same
    samples and prompts. Loggers receive the result.

    Under ``strategy="ddp"`` the processes share the validation text and the replay; a sample that
    several of them saw counts once. Rank 0 decides, measures, writes files and logs; all prune, and
    check that they hold the same model. An error on one ends all of them, models as they were.

    Args:
        pruning_ratio: Fraction of *decoder-layer parameters* to remove, in [0, 1).
        when: ``fit_end`` prunes after ``trainer.fit`` (a bare ``trainer.validate`` then only
            observes); ``validate`` prunes after ``trainer.validate``.
        dry_run: Plan and report, but leave the model as it is.
        val_dataloader_idx: Which validation loader to observe where there are several; None
            observes all.
        **options: The other fields of `PruningConfig`.

    Attributes:
        calibration_: Statistics and samples; absent before the first complete validation. Of
            several processes, rank 0 has all of it once it has pruned; the others have samples,
            means and variances.
        plan_: What was kept; absent before pruning.
        report_: Before and after; absent before pruning.

    Raises:
        ConfigError: At construction, if an option cannot be meant; later, if the validation loader
            or the language model that it names does not exist.
        UnsupportedModelError: In ``setup``, if model or strategy cannot be pruned.
        BudgetError: In ``setup``, if the ratio cannot be reached.
        RankError: If another process failed, or holds other parameters.
        CalibrationError: If the validation text is missing (in ``setup``) or unusable.
        ArtifactError: If the run's folder cannot be written to (in ``setup``, or before the model
            is changed).

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
        **options: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(options)
        config = PruningConfig(pruning_ratio=pruning_ratio, **options)
        self.config = preset(config.preset).resolve(config)
        if when not in ("fit_end", "validate"):
            raise ConfigError(f"when must be 'fit_end' or 'validate', got {when!r}.")
        self.when = when
        self.dry_run = dry_run
        self.val_dataloader_idx = val_dataloader_idx
        self._observer: Observer | None = None  # open while a validation runs
        self._following: RemovableHandle | None = None  # while a checkpoint may be loaded
        self._seen: Seen | None = None  # the last complete validation
        self._artifacts = Artifacts(None)  # where this run's files go
        self._checked: PreTrainedModel | None = None  # the model that the request was checked on
        self._model: PreTrainedModel | None = None  # the model that was pruned
        self._restored: PruningPlan | None = None  # of a resumed checkpoint
        self._ranks = ALONE  # the processes that train together, from `setup` on
        self._stale_moments = False  # the optimizers hold dense moments of a pruned model

    # ------------------------------------------------------------------------- before the run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        self._checked = self._seen = None
        self._following = follow_checkpoints(pl_module, self.config.language_model)
        self._stale_moments &= stage != "fit"  # a fit makes new optimizers
        if not self._observes(stage, pl_module):
            return
        refuse_strategy(trainer)
        self._ranks = Ranks.of_training()
        with self._ranks.together():  # only rank 0 has a folder that may not be writable
            self._artifacts = Artifacts.of(trainer)
            if stage == self._stage:
                refuse_no_validation(trainer, stage)
            # `configure_model` runs after `setup`: what it makes is checked when the run starts
            if type(pl_module).configure_model is LightningModule.configure_model:
                self._check_request(pl_module)
        if trainer.is_global_zero:
            # TensorBoard shows the first hyperparameters of a run: with the module's, not after
            log_request(trainer.loggers, self.config.to_dict(), dict(pl_module.hparams))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observes("fit", pl_module):
            self._check_request(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observes("fit", pl_module):
            load_validation(trainer)
            refuse_loaders(trainer, self.val_dataloader_idx, self._ranks)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        refuse_stale_optimizers(trainer, pl_module)

    # ------------------------------------------------------------------------------ observing

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._observes(trainer.state.fn, pl_module):
            return
        several = self._ranks.size > 1
        if not several:  # a rank whose loader is empty does not come here: nothing may wait for it
            refuse_loaders(trainer, self.val_dataloader_idx)
        self._release()
        model, most = self._check_request(pl_module), self.config.max_calibration_tokens
        self._observer = Observer(model, max_tokens=most, keeps_error=several)
        self._observer.open()

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
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
        seen = Seen.by(observer, trainer.global_step)
        if self._ranks.size == 1:  # else where all ranks meet
            self.calibration_ = judge(trainer, observer.model, seen, self.config, self._artifacts)
        self._seen = seen

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ranks.size > 1 and self._observes("fit", pl_module):
            self._meet(trainer, pl_module)

    # ------------------------------------------------------------------------- the end of the run

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observes("fit", pl_module) and not any(self._ranks.gather(self._seen is not None)):
            # max_steps or max_time ended the run before its first validation
            rank_zero_info("lit_prune: this run has not validated yet; validating to calibrate.")
            validate_within_fit(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # no optimizer step, checkpoint or copy of averaged weights follows, and DDP is unwrapped
        if self._observes("fit", pl_module):
            self._prune(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        if stage == "validate" == self._stage and self._observes(stage, pl_module):
            refuse_loaders(trainer, self.val_dataloader_idx, self._ranks)
            if any(self._ranks.gather(self._seen is not None)):
                # not in `on_validation_end`: parameters made in inference mode cannot be trained
                self._prune(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()  # Lightning does not call `teardown` after an exception or Ctrl-C

    def _meet(self, trainer: Trainer, pl_module: LightningModule) -> Seen | None:
        """Return what all ranks have seen, None where nobody has validated; call on all ranks."""
        seen = seen_by_all(self._seen, self._ranks, self.config.max_calibration_tokens)
        if seen is not None and self._ranks.size > 1:
            model = self._check_request(pl_module)
            self.calibration_ = judge(trainer, model, seen, self.config, self._artifacts)
        return seen

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seen = self._meet(trainer, pl_module)
        if seen is None:
            raise CalibrationError("this run trained and validated nothing: nothing to prune by.")
        model, dry = self._check_request(pl_module), self.dry_run or is_rehearsal(trainer)
        with on_device(model, trainer.strategy.root_device):
            calibration = calibrate_on(trainer, model, seen, self.config, self._ranks)
            if calibration is None:
                return
            self.calibration_ = calibration
            planned, self.report_ = carry_out(
                model, calibration, self.config, dry_run=dry,
                warnings=steps_since(trainer, seen), ranks=self._ranks,
                keep=partial(self._artifacts.plan, calibration), progress=shows_progress(trainer),
            )  # fmt: skip
            self.plan_ = planned.plan
            if not dry:
                self._model = model
                self._stale_moments = trainer.state.fn == TrainerFn.FITTING
                forget_averages(trainer)
        self._artifacts.report(self.report_)
        tell(trainer, planned, self.report_)

    def save_pruned(self, directory: str | Path, **options: Any) -> Path:
        """Save the pruned model with its plan and report; see `lit_prune.save_pruned`.

        Raises:
            ConfigError: If nothing has been pruned yet.
        """
        if self._model is None:
            raise ConfigError(
                f"nothing has been pruned: trainer.{self._stage}(...) prunes when it ends, unless "
                "it is a dry_run or fast_dev_run."
            )
        return save_pruned(self._model, directory, **options)

    @override
    def state_dict(self) -> dict[str, str]:
        # text only: it loads with weights_only=True
        plan = self._restored if self._model is None else self.plan_
        return {"plan": "" if plan is None else plan.to_json()}

    @override
    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        text = state_dict.get("plan")
        self._restored = PruningPlan.from_json(text) if text else None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._stale_moments:
            checkpoint |= {"optimizer_states": [], STALE: True}

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        refuse_stale_checkpoint(trainer, checkpoint)
        remember_plan(pl_module, self.config.language_model, checkpoint, self.state_key)

    @property
    def _stage(self) -> str:
        """The stage that ends with the pruning."""
        return "fit" if self.when == "fit_end" else "validate"

    def _observes(self, stage: str | None, pl_module: LightningModule) -> bool:
        """Whether this stage is of interest: not once this very model has been pruned."""
        restored = self._restored and self._restored.digest
        for module in pl_module.modules():
            record = getattr(module, "pruning_record", None)
            if module is self._model or (record and record.plan.digest == restored):
                return False
        return stage in ("validate", self._stage)  # a bare validate is observed in any case

    def _check_request(self, pl_module: LightningModule) -> PreTrainedModel:
        model = find_causal_lm(pl_module, self.config.language_model)
        if self._checked is not model:
            refuse_compiled(pl_module, model)
            refuse_impossible(model, self.config)
            refuse_non_finite_weights(model)
            self._checked = model
        return model

    def _release(self) -> None:
        if self._following is not None:
            self._following.remove()
            self._following = None
        if self._observer is not None:
            self._observer.close()
            self._observer = None
