"""However a fit comes to its end, it has calibrated, and prunes once."""

import time

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_prune.errors import CalibrationError
from tests.lightning.modules import (
    LM,
    TRAIN,
    fit,
    hooks,
    loader,
    pruner,
    said,
    state_digest,
    trainer,
)


def steps_of(report):
    """How many optimizer steps the report says were taken after the last validation."""
    found = [w for w in report.warnings if "optimizer steps followed" in w]
    return int(found[0].split()[0]) if found else 0


@pytest.mark.event(
    "Runs",
    "`max_steps`, `limit_*_batches`, `val_check_interval`",
    "the last complete validation counts; steps after it stand in the report",
)
@pytest.mark.parametrize(
    ("options", "validations", "steps"),
    [
        ({"max_epochs": 2}, 2, 0),
        ({"max_steps": 3, "max_epochs": None}, 1, 0),  # 8 rows, 2 a step: within the first epoch
        ({"max_steps": 6, "max_epochs": None}, 1, 2),
        ({"val_check_interval": 3}, 1, 1),
        ({"val_check_interval": 0.5}, 2, 0),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 2}, 2, 2),
        ({"check_val_every_n_epoch": 3, "max_epochs": 4}, 1, 4),
        ({"check_val_every_n_epoch": 5, "max_epochs": 2}, 1, 0),
        ({"check_val_every_n_epoch": 5, "max_epochs": 2, "num_sanity_val_steps": 0}, 1, 0),
        ({"accumulate_grad_batches": 2, "val_check_interval": 3}, 1, 1),
        ({"overfit_batches": 2}, 1, 0),
        ({"limit_val_batches": 3}, 1, 0),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 2, 0),
    ],
)
def test_end_of_a_fit(tmp_path, options, validations, steps):
    callback, complete = pruner(min_calibration_tokens=64), []

    class Counting(LM):
        def on_validation_end(self):
            if not self.trainer.sanity_checking:
                complete.append(self.trainer.global_step)

    fit(tmp_path, Counting(), callback, train=loader(TRAIN, 2), **options)
    assert len(complete) == validations
    assert steps_of(callback.report_) == steps
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


class Slow(LM):
    def training_step(self, batch, batch_idx):
        time.sleep(0.3)
        return super().training_step(batch, batch_idx)


@pytest.mark.event(
    "Interruptions",
    "`max_time` or `max_steps` before the first validation",
    "validates once, then prunes",
)
def test_max_time_ends_before_the_first_validation(tmp_path):
    callback, module = pruner(), Slow()
    fit(
        tmp_path,
        module,
        callback,
        train=loader(TRAIN * 9, 1),
        max_epochs=-1,
        max_time={"seconds": 1},
        num_sanity_val_steps=0,
    )
    assert 0 < len(module.losses) < 72
    assert module.validations == 5  # the one validation that the callback ran: 40 rows, 8 a batch
    assert steps_of(callback.report_) == 0
    assert callback.plan_.digest == callback.report_.plan_digest


def test_validation_that_the_callback_runs_is_a_whole_one(tmp_path):
    """It logs, is checkpointed, and leaves the module in train mode for later hooks."""
    states, metrics = [], []

    class Watching(LM):
        def on_train_end(self):
            states.append((self.training, self.trainer.training, self.trainer.validating))
            metrics.append(float(self.trainer.callback_metrics["val_loss"]))

    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_last=True)
    one = fit(
        tmp_path,
        Watching(),
        pruner(),
        best,
        train=loader(TRAIN, 2),
        enable_checkpointing=True,
        val_check_interval=3,
        max_epochs=None,
        max_steps=2,
        num_sanity_val_steps=0,
    )
    assert states == [(True, True, False)]
    assert metrics == [float(best.best_model_score)]
    assert one.global_step == 2
    assert {path.name for path in (tmp_path / "best").iterdir()} >= {"last.ckpt"}


@pytest.mark.event("Neighbours", "`EarlyStopping` ends the fit", "prunes then")
def test_early_stopping_ends_the_fit(tmp_path):
    callback, module = pruner(), LM(lr=0.0)
    stop = EarlyStopping("val_loss", patience=1)
    fit(tmp_path, module, callback, stop, max_epochs=20)
    assert stop.stopped_epoch == 1
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


@pytest.mark.event("Runs", "the sanity check", "never observed")
def test_f34_sanity_check_is_never_observed(tmp_path):
    """Its rows would stay in the calibration if it were: here it is the only one to see them."""
    special, ordinary = TRAIN[:2], TRAIN[2:]
    turns = []

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader(TRAIN)

        def val_dataloader(self):
            turns.append(1)
            return loader(special if len(turns) == 1 else ordinary)

    callback = pruner(min_calibration_tokens=2)
    one = trainer(tmp_path, callback, reload_dataloaders_every_n_epochs=1, max_epochs=2)
    one.fit(LM(), datamodule=Data())
    assert len(turns) > 1
    assert len(callback.calibration_.rows.rows) == len(ordinary)


@pytest.mark.event(
    "Runs", "`fast_dev_run=True`", "a dry run: all code runs, nothing is cut or written"
)
def test_f34_fast_dev_run_is_a_dry_run(tmp_path):
    callback, module = pruner(), LM()
    one = fit(tmp_path, module, callback, fast_dev_run=True)
    assert callback.report_.dry_run
    assert not hasattr(module.lm, "pruning_record")
    assert len(one.optimizers[0].state) == len(list(module.parameters()))
    assert list(tmp_path.iterdir()) == []


def test_f34_fast_dev_run_on_one_short_sample_says_so(tmp_path):
    callback, module = pruner(), LM()
    with said() as text:
        fit(tmp_path, module, callback, val=loader(TRAIN, 1), fast_dev_run=True)
    assert "too short to plan a pruning: 24 real tokens in 1 samples" in text.getvalue()
    assert not hasattr(callback, "plan_")
    assert hooks(module) == 0


@pytest.mark.event(
    "Runs", "a fit that trains nothing (`max_epochs=0`)", "`CalibrationError` in words"
)
@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_f11_fit_that_runs_nothing_says_so(tmp_path, options):
    callback, module = pruner(), LM()
    before = state_digest(module)
    with pytest.raises(CalibrationError, match="trained and validated nothing"):
        fit(tmp_path, module, callback, **options)
    assert state_digest(module) == before
    assert hooks(module) == 0


def test_f34_setup_many_times_changes_nothing(tmp_path):
    callback, module = pruner(), LM()
    one = trainer(tmp_path, callback)
    one.fit_loop.epoch_loop.val_loop._data_source.instance = loader()
    one.strategy._lightning_module = module
    before = state_digest(module)
    for stage in ("fit", "validate", "fit", "test", "predict"):
        callback.setup(one, module, stage)
        callback.teardown(one, module, stage)
    assert state_digest(module) == before
    assert hooks(module) == 0
    one.fit(module, loader(TRAIN), loader())
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


@pytest.mark.event("Neighbours", "`barebones=True`", "prunes; writes no files")
def test_barebones(tmp_path):
    class Silent(LM):
        def validation_step(self, batch, batch_idx):
            self.lm(**batch)

    callback = pruner()
    one = L.Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[callback])
    one.fit(Silent(), loader(TRAIN), loader())
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


def test_progress_bar(tmp_path, capfd):
    fit(tmp_path, LM(), pruner(), enable_progress_bar=True)
    assert "Epoch 0" in "".join(capfd.readouterr())


@pytest.mark.event("Neighbours", "`accumulate_grad_batches`", "trains as without the callback")
def test_gradient_accumulation_trains_as_without(tmp_path):
    def losses(*callbacks):
        module = LM()
        fit(
            tmp_path,
            module,
            *callbacks,
            train=loader(TRAIN, 1),
            accumulate_grad_batches=3,
            val_check_interval=4,
        )
        return module.losses

    assert losses(pruner()) == losses()
