"""``pruned.ckpt``: a run that prunes leaves a checkpoint that resumes, beside its others."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from tests.lightning.modules import (
    LM,
    TRAIN,
    decoder_parameters,
    fit,
    loader,
    pruner,
    said,
    state_digest,
    trainer,
)
from tests.lightning.test_pruned_checkpoints import Following

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`"
)


class Start(L.Callback):
    """What a resumed training begins with."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        self.moments = len(trainer.optimizers[0].state)


def run(folder, module, *callbacks, **options):
    """A run that makes checkpoints; two steps an epoch."""
    save = ModelCheckpoint(folder / "files", monitor="val_loss", save_last=True)
    options = {"train": loader(TRAIN, 4), "enable_checkpointing": True, "max_epochs": 2, **options}
    return fit(folder, module, *callbacks, save, **options)


def resume(path, module, *callbacks, epochs=6):
    start = Start()
    one = trainer(Path(path).parent, *callbacks, start, max_epochs=epochs)
    one.fit(module, loader(TRAIN, 4), loader(), ckpt_path=path)
    assert start.moments > 0
    assert [n for n, p in module.named_parameters() if torch.equal(p, start.weights[n])] == []
    assert sum(module.losses[-2:]) < sum(module.losses[:2])
    return one


@pytest.mark.event(
    "Checkpoints",
    "after the pruning",
    "`pruned.ckpt` lies beside the run's checkpoints and resumes",
)
def test_the_pruned_run_resumes_from_its_file_with_the_callback(tmp_path):
    callback, module = pruner(), LM()
    with said() as text:
        run(tmp_path, module, callback)
    path = tmp_path / "files" / "pruned.ckpt"
    assert f"the pruned run is in {path}" in text.getvalue()
    saved = torch.load(path, weights_only=True)
    shapes = {name: x.shape for name, x in module.state_dict().items()}
    assert {name: x.shape for name, x in saved["state_dict"].items()} == shapes
    fresh, dense = pruner(), LM()
    resume(path, dense, fresh)
    assert decoder_parameters(dense.lm) == decoder_parameters(module.lm)
    assert not hasattr(fresh, "plan_")
    assert dense.lm.pruning_record.plan == callback.plan_
    assert len(dense.losses) == 2 * (6 - 2)


@pytest.mark.event(
    "Checkpoints", "`pruned.ckpt` in a new process, with and without the callback", "resumes"
)
@pytest.mark.parametrize("callback", ["pruner()", pytest.param("", marks=pytest.mark.slow)])
def test_the_pruned_run_resumes_in_a_fresh_process(callback, tmp_path):
    module = LM()
    run(tmp_path, module, pruner())
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from tests.lightning.test_pruned_file import *\n"
        f"module = {'LM()' if callback else 'Following()'}\n"
        f"resume(sys.argv[1], module, {callback})\n"
        "assert decoder_parameters(module.lm) == int(sys.argv[2])\n"
    )
    root = Path(__file__).resolve().parents[2]
    path, size = tmp_path / "files" / "pruned.ckpt", decoder_parameters(module.lm)
    command = [sys.executable, "-c", script, str(path), str(size)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


def test_a_second_pruning_in_the_folder_gets_a_version(tmp_path):
    for expected in ("pruned.ckpt", "pruned-v1.ckpt", "pruned-v2.ckpt"):
        run(tmp_path, LM(), pruner())
        assert (tmp_path / "files" / expected).exists()
        assert len(list((tmp_path / "files").glob("pruned*"))) == 1 + int(
            expected.removeprefix("pruned").removesuffix(".ckpt").removeprefix("-v") or 0
        )


def test_it_is_written_with_the_checkpoints_that_a_trainer_makes_by_itself(tmp_path):
    fit(tmp_path, LM(), pruner(), enable_checkpointing=True)
    assert [path.name for path in tmp_path.rglob("pruned*.ckpt")] == ["pruned.ckpt"]


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        ({"dry_run": True}, {}),
        ({}, {"fast_dev_run": True}),
        ({}, {"enable_checkpointing": False}),
    ],
)
def test_no_file_where_nothing_is_meant(tmp_path, ours, options):
    fit(tmp_path, LM(), pruner(**ours), **{"enable_checkpointing": True, **options})
    assert list(tmp_path.rglob("pruned*.ckpt")) == []


def test_no_file_after_a_bare_validate(tmp_path):
    module = LM()
    one = trainer(tmp_path, pruner(when="validate"), enable_checkpointing=True)
    one.validate(module, loader(), verbose=False)
    assert hasattr(module.lm, "pruning_record")
    assert list(tmp_path.rglob("pruned*.ckpt")) == []


def test_weights_only_where_the_run_saves_weights_only(tmp_path):
    save = ModelCheckpoint(tmp_path / "files", save_weights_only=True)
    module = Following()
    fit(tmp_path, module, pruner(), save, enable_checkpointing=True)
    path = tmp_path / "files" / "pruned.ckpt"
    assert "optimizer_states" not in torch.load(path, weights_only=True)
    loaded = Following.load_from_checkpoint(path, weights_only=True)
    assert state_digest(loaded) == state_digest(module)


@pytest.mark.event(
    "Checkpoints", "`pruned.ckpt` cannot be written", "a warning; the model is pruned"
)
def test_a_full_disk_is_a_warning(tmp_path, monkeypatch, caplog):
    save_checkpoint = L.Trainer.save_checkpoint

    def full(self, path, *args, **options):
        if "pruned" in str(path):
            raise OSError(28, "No space left on device")
        save_checkpoint(self, path, *args, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    callback, module = pruner(), LM()
    run(tmp_path, module, callback)
    assert "pruned.ckpt could not be written: [Errno 28] No space left" in caplog.text
    assert module.lm.pruning_record.plan == callback.plan_
    assert list(tmp_path.rglob("pruned*.ckpt")) == []


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
@pytest.mark.parametrize("module", [LM, Following])
def test_averaged_weights_resume(module, tmp_path):
    """The average starts anew with the pruned shapes."""
    run(tmp_path, LM(), EMAWeightAveraging(decay=0.5), pruner())
    callbacks = [pruner(), EMAWeightAveraging(decay=0.5)]
    resume(tmp_path / "files" / "pruned.ckpt", module(), *callbacks)
