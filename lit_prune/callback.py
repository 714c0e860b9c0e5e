"""`EntropyPruningCallback`: *when* things happen and on which rank; all else is the library's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_prune import running
from lit_prune.checkpoints import remember_plan
from lit_prune.checks import refuse_unknown
from lit_prune.config import PruningConfig
from lit_prune.decoder import find_causal_lm
from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.methods import preset
from lit_prune.plan import PruningPlan
from lit_prune.pruner import DryRun, refuse_non_finite_weights
from lit_prune.ranks import ALONE, Ranks
from lit_prune.saving import save_pruned
from lit_prune.views import log_request

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.report import PruningReport


class EntropyPruningCallback(Callback):
    """Observe the validation batches; prune when fine-tuning (or a bare validate) is over.

    During each validation, hooks on the language model keep the token ids that pass and the moments
    of the unit activations; the last complete validation counts. When the fit ends (after the last
    optimizer step, after averaged weights are copied back), the kept ids are replayed to measure
    transfer entropy, the model is planned, measured, pruned in place and measured again on the same
    samples and prompts. Loggers receive the result. The optimizers keep the states of what stays,
    so that ``pruned.ckpt``, saved beside the checkpoints of the run, resumes:
    ``trainer.fit(ckpt_path=...)`` with more epochs trains the pruned model on.

    Under ``strategy="ddp"`` the processes share the validation text and the replay; a sample that
    several of them saw counts once. Rank 0 decides, measures, writes files and logs; all prune, and
    check that they hold the same model. An error on one ends all of them, models as they were.
    Where parameters are sharded (FSDP, ModelParallel, DeepSpeed), a whole copy on rank 0 is pruned,
    and the module stays dense.

    Args:
        pruning_ratio: Fraction of *decoder-layer parameters* to remove, in [0, 1); under
            ``epoch_end`` a list of them, each of what the dense model has, ascending. Or give
            another target of `PruningConfig` in its place, ``target_parameters`` for one.
        when: ``fit_end`` prunes after ``trainer.fit`` (a bare ``trainer.validate`` then only
            observes); ``validate`` prunes after ``trainer.validate``; ``epoch_end`` prunes in
            stages, after the first epochs of a fit, while the training goes on: each at the start
            of the epoch that follows, so that checkpoints hold what was validated, or at the end.
        dry_run: Leave the model as it is: True plans and reports, ``"measured"`` tells the cost.
        weights: Which weights of a fit to prune: the ``last``, or the ``best`` by the first
            ModelCheckpoint that has a monitor, with the optimizer states of its file.
        val_dataloader_idx: Which validation loader to observe where there are several; None
            observes all.
        **options: The other fields of `PruningConfig`.

    Attributes:
        calibration_: Statistics and samples; absent before the first complete validation. Of
            several processes rank 0 has all of it; the others have samples, means and variances.
        plan_: What was kept, in units of the dense model; absent before pruning.
        report_: Before and after; absent before pruning.
        reports_: Those of all stages.

    Raises:
        ConfigError: At construction, if an option cannot be meant; later, if the validation loader
            or the language model that it names does not exist.
        UnsupportedModelError: In ``setup``, if model or strategy cannot be pruned.
        BudgetError: In ``setup``, if the target cannot be reached (latency and perplexity: later).
        CalibrationError: If the validation text is missing (in ``setup``) or unusable.
        ArtifactError: In ``setup`` or before the surgery, if the run's folder is not writable.

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
        pruning_ratio: float | list[float] | None = None,
        when: running.When = "fit_end",
        dry_run: DryRun = False,
        weights: running.Weights = "last",
        val_dataloader_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(options, PruningConfig)
        self._schedule = running.Schedule.of(pruning_ratio, when, dry_run=dry_run)
        config = PruningConfig(pruning_ratio=self._schedule.ratios[-1], **options)
        self.config = preset(config.preset).resolve(config)
        self._schedule.refuse_budget(self.config)
        running.refuse_weights(weights, when)
        self.when = when
        self.weights = weights
        self.dry_run = dry_run
        self.val_dataloader_idx = val_dataloader_idx
        self._hooks = running.Hooks()  # on the module, while a run goes on
        self._seen: running.Seen | None = None  # the last complete validation
        self._artifacts = running.Artifacts(None)  # where this run's files go
        self._checked: PreTrainedModel | None = None  # the model that the request was checked on
        self._ranks = ALONE  # the processes that train together, from `setup` on
        self._model: PreTrainedModel | None = None  # the model that was pruned
        self._copy: PreTrainedModel | None = None  # what was pruned in place of a sharded one
        self._restored: PruningPlan | None = None  # of a resumed checkpoint
        self.reports_: list[PruningReport] = []

    # ------------------------------------------------------------------------- before the run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hooks.remove()
        self._checked = self._seen = None
        if stage == "fit" and not running.is_pruned(pl_module, self._model, self._restored):
            self._model = self._restored = None  # what was pruned is another one
            self.reports_ = []
        self._hooks.follow(pl_module, self.config.language_model)
        if not self._observes(stage, pl_module):
            return
        running.refuse_strategy(trainer)
        self._schedule.refuse_trainer(trainer)
        self._ranks = Ranks.of_training() if trainer.world_size > 1 else ALONE
        with self._ranks.together():  # only rank 0 has a folder that may not be writable
            self._artifacts = running.Artifacts.of(trainer)
            if stage == self._stage:
                running.refuse_no_validation(trainer, stage)
                if self.weights == "best":
                    running.refuse_no_best(trainer)
            # `configure_model` runs after `setup`: what it makes is checked when the run starts
            if not running.makes_its_model(pl_module):
                self._check_request(pl_module)
        if trainer.is_global_zero:
            # TensorBoard shows the first hyperparameters of a run: with the module's, not after
            log_request(trainer.loggers, self.config.to_dict(), dict(pl_module.hparams))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observes("fit", pl_module):
            self._check_request(pl_module)
        else:
            self._schedule.say_ended()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observes("fit", pl_module):
            running.load_validation(trainer)
            running.refuse_loaders(trainer, self.val_dataloader_idx, self._ranks)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not when the epoch before ends: its checkpoints hold the weights that were validated
        if self._schedule.stages and self._is_due(trainer, pl_module):
            self._validate_if_unseen(trainer)
            if self._prune(trainer, pl_module):
                running.rewrap(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        running.refuse_stale_optimizers(trainer, pl_module)

    # ------------------------------------------------------------------------------ observing

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._observes(trainer.state.fn, pl_module):
            return
        alone = self._ranks.size == 1
        if alone:  # else where all ranks meet: one that has no batch does not come here
            running.refuse_loaders(trainer, self.val_dataloader_idx)
        model, probes = self._check_request(pl_module), not running.is_sharded(trainer)
        most = self.config.max_calibration_tokens
        self._hooks.observe(model, most, alone=alone, probes=probes)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wanted = self.val_dataloader_idx
        self._hooks.pause(paused=wanted is not None and dataloader_idx != wanted)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        observer = self._hooks.observed()
        if observer is None:
            return
        self._seen = seen = running.Seen.by(observer, trainer.global_step)
        if self._ranks.size == 1:  # else where all ranks meet
            self.calibration_ = running.judge(
                trainer, observer.model, seen, self.config, self._artifacts
            )
        if running.is_sharded(trainer) and trainer.state.fn == "validate" == self._stage:
            self._prune(trainer, pl_module)  # before the shards leave their devices; all are here

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ranks.size > 1 and self._observes("fit", pl_module):
            self._meet(trainer, pl_module)

    # ------------------------------------------------------------------------- the end of the run

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer, pl_module):
            self._validate_if_unseen(trainer)
            if running.is_sharded(trainer):  # while the shards are on their devices
                self._prune(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # no optimizer step, checkpoint or copy of averaged weights follows, and DDP is unwrapped
        due = self._is_due(trainer, pl_module) and not running.is_sharded(trainer)
        if due and self._prune(trainer, pl_module, ended=True):
            running.save_pruned_checkpoint(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hooks.remove()
        ends = stage == "validate" == self._stage and not running.is_sharded(trainer)
        if ends and self._observes(stage, pl_module):
            running.refuse_loaders(trainer, self.val_dataloader_idx, self._ranks)
            if any(self._ranks.gather(self._seen is not None)):
                # not in `on_validation_end`: parameters made in inference mode cannot be trained
                self._prune(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._hooks.remove()  # Lightning does not call `teardown` after an exception or Ctrl-C

    def _is_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether this fit prunes when nothing more is trained, or before the next epoch."""
        if not self._observes("fit", pl_module):
            return False
        return self._schedule.is_due(trainer, find_causal_lm(pl_module, self.config.language_model))

    def _validate_if_unseen(self, trainer: Trainer) -> None:
        # since the run began or resumed, or since the last pruning
        if not any(self._ranks.gather(self._seen is not None)):
            running.validate_within_fit(trainer)

    def _meet(self, trainer: Trainer, pl_module: LightningModule) -> running.Seen | None:
        """Return what all ranks have seen, None where nobody has validated; call on all ranks."""
        seen = running.seen_by_all(self._seen, self._ranks, self.config.max_calibration_tokens)
        if seen is not None and self._ranks.size > 1:
            model = self._check_request(pl_module)
            self.calibration_ = running.judge(trainer, model, seen, self.config, self._artifacts)
        return seen

    def _prune(self, trainer: Trainer, pl_module: LightningModule, *, ended: bool = False) -> bool:
        """Prune; return whether the model is another now."""
        seen = self._meet(trainer, pl_module)
        if seen is None:
            raise CalibrationError("this run trained and validated nothing: nothing to prune by.")
        model, dry = self._check_request(pl_module), self.dry_run or running.is_rehearsal(trainer)
        stage = self._schedule.next(model, self.config)
        files, sharded = self._artifacts.inside(stage.folder), running.is_sharded(trainer)
        done = (running.prune_copy if sharded else running.prune_within)(
            trainer, pl_module, model, seen, stage.config, files, dry_run=dry, ranks=self._ranks,
            weights=self.weights if self.when == "fit_end" else None,
        )  # fmt: skip
        if done is None:
            return False
        self.calibration_ = done.calibration or self.calibration_
        self.plan_, self.report_ = stage.finish(model, done.plan, done.report, ended=ended)
        self.reports_.append(self.report_)
        if sharded and not dry:
            self._copy = done.model
        elif not dry:
            self._model, self._seen = model, None
            running.forget_averages(trainer)
        if stage.folder:
            files.report(self.report_, self.plan_)
            self._artifacts.whole_plan(self.plan_)
        self._artifacts.report(self.report_, self.plan_)
        running.tell(trainer, done.planned, self.report_)
        return not dry

    def save_pruned(self, directory: str | Path, **options: Any) -> Path:
        """Save the pruned model with its plan and report; see `lit_prune.save_pruned`.

        Raises:
            ConfigError: If nothing has been pruned yet.
        """
        model = self._model or self._copy
        if model is None:
            raise ConfigError(
                f"nothing has been pruned: trainer.{self._stage}(...) prunes when it ends, unless "
                "it is a dry_run or fast_dev_run; of a sharded model rank 0 has the pruned copy."
            )
        return save_pruned(model, directory, **options)

    @override
    def state_dict(self) -> dict[str, str]:  # text only: it loads with weights_only=True
        plan = self._restored if self._model is None else self.plan_
        return {"plan": "" if plan is None else plan.to_json()}

    @override
    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        text = state_dict.get("plan")
        self._restored = PruningPlan.from_json(text) if text else None

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        language_model = self.config.language_model
        self._restored = remember_plan(pl_module, language_model, checkpoint, self.state_key)

    @property
    def _stage(self) -> str:
        """The stage that ends with the pruning."""
        return "validate" if self.when == "validate" else "fit"

    def _observes(self, stage: str | None, pl_module: LightningModule) -> bool:
        """Whether this stage is of interest: not once this very model has been pruned."""
        ended = self._schedule.has_ended(pl_module, self._model, self._restored)
        # a bare validate is observed in any case
        return stage in ("validate", self._stage) and not ended

    def _check_request(self, pl_module: LightningModule) -> PreTrainedModel:
        model = find_causal_lm(pl_module, self.config.language_model)
        if self._checked is not model:
            running.refuse_compiled(pl_module, model)
            self._schedule.refuse_ratios(model, self.config)
            refuse_non_finite_weights(model)
            self._checked = model
        return model
