"""What people run beside the callback: callbacks, loggers, adapters, the other import root."""

import os
import signal

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from peft import LoraConfig, get_peft_model
from pytorch_lightning.callbacks import EMAWeightAveraging
from transformers import AutoModelForCausalLM

from lit_prune.errors import UnsupportedModelError
from tests.lightning.modules import (
    LM,
    ROWS,
    TRAIN,
    decoder_parameters,
    fit,
    hooks,
    labels_of,
    loader,
    pruner,
    state_digest,
    trainer,
)
from tests.models import padded_batch, tiny_model


@pytest.mark.event(
    "Neighbours",
    "a search over hyperparameters reads `trainer.callback_metrics`",
    "`prune/achieved_ratio`, `quality/perplexity/after` and the rest are there",
)
def test_what_a_run_came_to_is_in_callback_metrics(tmp_path):
    """Where Optuna and its like read it."""
    callback = pruner()
    one = fit(tmp_path, LM(), callback)
    found = one.callback_metrics
    assert found["prune/achieved_ratio"] == pytest.approx(callback.report_.achieved_ratio)
    after = callback.report_.row("perplexity").after
    assert found["quality/perplexity/after"] == pytest.approx(after)
    assert "val_loss" in found


@pytest.mark.event(
    "Neighbours",
    "`ModelCheckpoint`, `EarlyStopping` in the recovery",
    "monitor and keep the pruned model",
)
def test_checkpoints_and_early_stopping_watch_the_pruned_model_in_the_recovery(tmp_path):
    callback, module = pruner(), LM()
    fit(tmp_path, module, callback)
    kept = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_top_k=1)
    stopping = EarlyStopping("val_loss", min_delta=100.0, patience=1)
    one = fit(tmp_path, module, callback, kept, stopping, enable_checkpointing=True, max_epochs=9)
    assert one.current_epoch == 2  # 100 nats better: never
    saved = torch.load(kept.best_model_path, weights_only=True)["state_dict"]
    shapes = {name: x.shape for name, x in module.state_dict().items()}
    assert {name: x.shape for name, x in saved.items()} == shapes


@pytest.mark.event("Neighbours", "several loggers", "each shows what it can")
def test_several_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    fit(tmp_path, LM(), pruner(), logger=loggers, log_every_n_steps=1)
    assert (
        "prune/achieved_ratio"
        in (tmp_path / "csv" / "lightning_logs").joinpath("version_0", "metrics.csv").read_text()
    )
    assert [*(tmp_path / "tb").rglob("events.out.tfevents.*")]


@pytest.mark.event(
    "Neighbours", "`RichProgressBar`, `TQDMProgressBar`, `ModelSummary`", "work as ever"
)
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_and_summary(tmp_path, bar):
    callback = pruner()
    fit(
        tmp_path, LM(), callback, bar(), ModelSummary(max_depth=2),
        enable_progress_bar=True, enable_model_summary=True,
    )  # fmt: skip
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


@pytest.mark.event("Neighbours", "`overfit_batches`", "calibrates on those batches")
def test_overfit_batches(tmp_path):
    """The training batches are what it validates on, and what is calibrated on."""
    callback = pruner(min_calibration_tokens=16)
    fit(tmp_path, LM(), callback, train=loader(), overfit_batches=2)
    assert len(callback.calibration_.rows.rows) == 16


@pytest.mark.event(
    "Interruptions",
    "SIGTERM",
    "the model is dense and whole, the last calibration on disk; a new run makes the same plan",
)
def test_sigterm_leaves_a_dense_whole_model_and_the_last_calibration(tmp_path):
    """F18: a preempted job; Lightning raises at the next batch."""

    class Preempted(LM):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    callback, module = pruner(), Preempted(lr=0.0)
    before, handler = state_digest(module), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SIGTERMException):
            fit(tmp_path, module, callback, max_epochs=3)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert state_digest(module) == before
    assert hooks(module) == 0
    assert (tmp_path / "pruning" / "calibration.safetensors").exists()
    other = pruner()
    fit(tmp_path, LM(lr=0.0), other)
    fit(tmp_path, module := LM(lr=0.0), callback)
    assert callback.plan_.digest == other.plan_.digest
    assert module.lm.pruning_record.plan is callback.plan_


def lora_module():
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return LM(get_peft_model(tiny_model(), config))


@pytest.mark.event("Numbers", "LoRA adapters in the model", "refused in `setup`, with what to do")
def test_a_lora_model_is_refused_with_what_to_do(tmp_path):
    module = lora_module()
    with pytest.raises(UnsupportedModelError, match=r"adapter.*merge_and_unload.*when='validate'"):
        fit(tmp_path, module, pruner())


@pytest.mark.event("Numbers", "LoRA merged after the fit, then `validate`", "pruned, saved, loads")
def test_a_lora_model_is_pruned_as_the_refusal_says(tmp_path):
    module, callback = lora_module(), pruner(when="validate")
    fit(tmp_path, module, max_epochs=3)
    assert module.losses[-1] < module.losses[0]
    module.lm = module.lm.merge_and_unload()
    dense = decoder_parameters(module.lm)
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert abs(1 - decoder_parameters(module.lm) / dense - 0.3) <= 0.005
    saved = AutoModelForCausalLM.from_pretrained(
        callback.save_pruned(tmp_path / "pruned", format="padded")
    ).eval()
    batch = padded_batch(ROWS[:4])
    with torch.no_grad():
        torch.testing.assert_close(saved(**batch).logits, module.lm.eval()(**batch).logits)


class OtherRoot(pytorch_lightning.LightningModule):
    """A module of the other root: its classes are not those of `lightning.pytorch`."""

    def __init__(self):
        super().__init__()
        self.lm = tiny_model().train()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.lm(**batch, labels=labels_of(batch)).loss
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.lm(**batch, labels=labels_of(batch)).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def other_trainer(folder, *callbacks, **options):
    return pytorch_lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, **{"max_epochs": 1, **options},
    )  # fmt: skip


@pytest.mark.event("Neighbours", "`import pytorch_lightning`", "works as `lightning.pytorch` does")
def test_the_import_root_pytorch_lightning_works_as_lightning_does(tmp_path):
    callback, module, wanted = pruner(), OtherRoot(), pruner()
    one = other_trainer(tmp_path, callback)
    one.fit(module, loader(TRAIN), loader())
    fit(tmp_path, LM(), wanted)
    assert callback.plan_.digest == wanted.plan_.digest
    assert one.callback_metrics["prune/achieved_ratio"] == pytest.approx(0.3, abs=0.005)
    size = decoder_parameters(module.lm)
    one = other_trainer(tmp_path, callback, max_epochs=2)
    one.fit(module, loader(TRAIN), loader())
    one.save_checkpoint(tmp_path / "recovered.ckpt")
    again, fresh = OtherRoot(), pruner()
    other_trainer(tmp_path, fresh, max_epochs=3).fit(
        again, loader(TRAIN), loader(), ckpt_path=tmp_path / "recovered.ckpt"
    )
    assert decoder_parameters(again.lm) == size
    assert not hasattr(fresh, "report_")


def test_averaging_of_the_other_root_does_not_bring_the_dense_model_back(tmp_path):
    callback, module = pruner(), OtherRoot()
    one = other_trainer(tmp_path, callback, EMAWeightAveraging(decay=0.5))
    one.fit(module, loader(TRAIN), loader())
    size = decoder_parameters(module.lm)
    one.validate(module, loader(), verbose=False)
    assert decoder_parameters(module.lm) == size


def test_an_impossible_request_is_refused_in_setup_of_the_other_root(tmp_path):
    module = OtherRoot()
    module.lm.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    started = []
    module.on_fit_start = lambda: started.append(True)
    with pytest.raises(UnsupportedModelError, match="NaN or infinite"):
        other_trainer(tmp_path, pruner()).fit(module, loader(TRAIN), loader())
    assert not started


def test_lightning_modules_of_both_roots_differ():
    """Else the tests above would show nothing."""
    assert pytorch_lightning.LightningModule is not L.LightningModule
