"""Which weights of a fit are pruned: the last, or the best that its checkpoints know."""

import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_prune.pruner
from lit_prune import prune
from lit_prune.errors import ArtifactError, ConfigError, UnsupportedModelError
from tests.lightning.modules import (
    LM,
    ROWS,
    TRAIN,
    fit,
    loader,
    pruner,
    state_digest,
    stop_at_call,
    trainer,
)
from tests.models import batches_of, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class Worse(LM):
    """Each epoch makes it worse: it learns one thing and is validated on another."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)
        self.log("epochs", float(self.current_epoch))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)]


def saver(folder, **options):
    return ModelCheckpoint(folder / "files", **{"monitor": "epochs", "mode": "min", **options})


def run(folder, module, callback, save, **options):
    options = {"max_epochs": 3, "train": loader(TRAIN, 4), **options}
    return fit(folder, module, callback, save, enable_checkpointing=True, **options)


@pytest.mark.event(
    "Checkpoints", '`weights="best"`', "the best checkpoint's weights and moments are pruned"
)
def test_the_best_weights_are_pruned_with_their_moments(tmp_path):
    callback, module, save = pruner(weights="best"), Worse(), saver(tmp_path)
    one = run(tmp_path, module, callback, save)
    best = torch.load(save.best_model_path, weights_only=True)
    assert best["global_step"] == 2
    fresh = tiny_model()
    fresh.load_state_dict(
        {k.removeprefix("lm."): v for k, v in best["state_dict"].items() if k.startswith("lm.")}
    )
    wanted = prune(
        fresh,
        batches_of(ROWS),
        pruning_ratio=0.3,
        progress=False,
        latency_prompt_tokens=0,
        channel_multiple=4,
    )
    assert callback.plan_.digest == wanted.plan.digest
    assert state_digest(module.lm) == state_digest(fresh)
    (words,) = [text for text in callback.report_.warnings if "best" in text]
    assert f"of step 2, not the last of step 6: {save.best_model_path} (epochs 0)" in words
    optimizer = one.optimizers[0]
    moments = best["optimizer_states"][0]["state"]
    assert torch.equal(
        optimizer.state[module.lm.model.embed_tokens.weight]["exp_avg"], moments[0]["exp_avg"]
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)  # the schedule goes on
    assert callback.report_.row("perplexity").before == pytest.approx(
        wanted.report.row("perplexity").before
    )


def test_the_pruned_best_resumes(tmp_path):
    run(tmp_path, Worse(), pruner(weights="best"), saver(tmp_path))
    module = Worse()
    one = trainer(tmp_path, pruner(weights="best"), saver(tmp_path), enable_checkpointing=True,
                  max_epochs=6)  # fmt: skip
    one.fit(module, loader(TRAIN, 4), loader(), ckpt_path=tmp_path / "files" / "pruned.ckpt")
    assert sum(module.losses[-2:]) < sum(module.losses[:2])


def test_without_optimizer_states_in_the_file_moments_start_anew(tmp_path):
    callback, module = pruner(weights="best"), Worse()
    one = run(tmp_path, module, callback, saver(tmp_path, save_weights_only=True))
    assert not one.optimizers[0].state
    assert any("it holds no optimizer states" in text for text in callback.report_.warnings)


def test_the_best_that_is_the_last_is_not_loaded(tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(LM, "load_state_dict", lambda *args, **kwargs: loads.append(1))
    callback = pruner(weights="best")
    run(tmp_path, Worse(), callback, saver(tmp_path, mode="max"))
    assert loads == []
    assert any("are the best by epochs" in text for text in callback.report_.warnings)


@pytest.mark.event(
    "Checkpoints", '`weights="last"`, and the best are others', "the report names the better file"
)
def test_last_weights_say_which_file_is_better(tmp_path):
    callback, module, save = pruner(), Worse(), saver(tmp_path)
    run(tmp_path, module, callback, save)
    (words,) = [text for text in callback.report_.warnings if "best" in text]
    assert f"the best by epochs are in {save.best_model_path} (epochs 0)" in words
    assert "weights='best' prunes those" in words


@pytest.mark.parametrize("last", [False, True])
def test_last_weights_that_are_the_best_say_nothing(tmp_path, last):
    callback = pruner()
    run(tmp_path, Worse(), callback, saver(tmp_path, mode="max", save_last=last))
    assert not any("best" in text for text in callback.report_.warnings)


@pytest.mark.event("Checkpoints", '`weights="best"` without a monitor', "`ConfigError` in `setup`")
def test_best_without_a_monitor_is_refused_at_once(tmp_path):
    for save in (ModelCheckpoint(tmp_path), None):
        module = LM()
        callbacks = [pruner(weights="best"), *([save] if save else [])]
        one = trainer(tmp_path, *callbacks, enable_checkpointing=save is not None)
        with pytest.raises(ConfigError, match=r"none with a monitor. Add ModelCheckpoint\(monitor"):
            one.fit(module, loader(TRAIN), loader())
        assert module.losses == []


def test_words_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="weights must be 'last' or 'best', got 'first'"):
        pruner(weights="first")
    with pytest.raises(ConfigError, match="validate the ckpt_path of the weights"):
        pruner(weights="best", when="validate")


class Spoil(L.Callback):
    """Does something to the best checkpoint when the training is over."""

    def __init__(self, save, spoil):
        self.save, self.spoil = save, spoil

    def on_train_end(self, trainer, pl_module):
        self.spoil(self.save.best_model_path)
        self.digest = state_digest(pl_module)
        optimizer = trainer.optimizers[0]
        self.moments = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(100)


def shard(path):
    import os

    os.unlink(path)
    os.mkdir(path)


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (cut, ArtifactError, r"with the best weights, cannot be read: .*weights='last'"),
        (shard, UnsupportedModelError, r"is a sharded checkpoint, .*Consolidate it"),
    ],
)
def test_a_file_that_cannot_be_read_leaves_the_last_weights(tmp_path, spoil, error, match):
    save, module = saver(tmp_path), Worse()
    spoiler = Spoil(save, spoil)
    one = trainer(
        tmp_path, pruner(weights="best"), save, spoiler, enable_checkpointing=True, max_epochs=3
    )
    with pytest.raises(error, match=match):
        one.fit(module, loader(TRAIN, 4), loader())
    assert state_digest(module) == spoiler.digest


@pytest.mark.parametrize("dry", [False, True])
def test_a_pruning_that_fails_or_is_dry_leaves_the_last_weights(tmp_path, monkeypatch, dry):
    error = RuntimeError("no memory to measure again")
    stop_at_call(monkeypatch, lit_prune.pruner, "measure", 2, error)
    save, module = saver(tmp_path), Worse()
    spoiler = Spoil(save, lambda path: None)
    callback = pruner(weights="best", dry_run=dry)
    one = trainer(tmp_path, callback, save, spoiler, enable_checkpointing=True, max_epochs=3)
    if dry:
        one.fit(module, loader(TRAIN, 4), loader())
        assert callback.report_.dry_run
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            one.fit(module, loader(TRAIN, 4), loader())
    assert state_digest(module) == spoiler.digest
    optimizer = one.optimizers[0]
    assert {id(p) for p in optimizer.state} == {id(p) for p in module.parameters()}
    for parameter, moment in spoiler.moments.items():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)


def test_a_run_that_wrote_no_best_prunes_the_last_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    callback = pruner(weights="best")
    run(tmp_path, LM(), callback, saver(tmp_path, save_top_k=0, monitor="val_loss"))
    assert any("no best checkpoint was written" in text for text in callback.report_.warnings)


def test_a_rehearsal_loads_nothing(tmp_path):
    fit(tmp_path, LM(), pruner(weights="best"), fast_dev_run=True)
