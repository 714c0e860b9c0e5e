"""F11-F18: whatever fails, wherever: the model as it was, no hook left, the run's samples kept."""

import errno
import tempfile

import lightning as L
import pytest
import torch

import lit_prune.pruner
import lit_prune.running.pruning
import lit_prune.running.seen
from lit_prune.calibration import Calibration, RecordedRun, TwoStreams
from lit_prune.errors import ArtifactError, BudgetError, CalibrationError, SurgeryError
from lit_prune.surgery.edits import StagedEdits
from tests.lightning.modules import (
    LM,
    ROWS,
    TRAIN,
    decoder_parameters,
    fit,
    hooks,
    interrupted,
    loader,
    pruner,
    state_digest,
    stop_at_call,
    trainer,
)

FIT = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
]


class OthersError(Exception):
    """Raised by code that is not ours."""


def raising(base, hook, error=OthersError):
    def act(self, *args, **kwargs):
        raise error

    return type("Raising", (base,), {hook: act})


def frozen(module):
    """A learning rate of 0: the model is bit-identical unless we touch it."""
    module.lr = 0.0
    return module


@pytest.mark.event(
    "Interruptions",
    "an exception in another callback",
    "the model is dense and whole, no hook is left",
)
@pytest.mark.parametrize("hook", FIT)
@pytest.mark.parametrize("order", [0, 1], ids=["before ours", "after ours"])
def test_exception_in_another_callback(tmp_path, hook, order):
    module, callbacks = frozen(LM()), [pruner(when="validate" if order else "fit_end")]
    before = state_digest(module)
    callbacks.insert(order, raising(L.Callback, hook)())
    with pytest.raises(OthersError):
        fit(tmp_path, module, *callbacks)
    assert state_digest(module) == before
    assert hooks(module) == 0


@pytest.mark.event(
    "Interruptions",
    "an exception in a hook of the module",
    "the model is dense and whole, no hook is left",
)
@pytest.mark.parametrize(
    "hook",
    [
        *(hook for hook in FIT[:-1] if "sanity" not in hook),
        "training_step",
        "validation_step",
        "configure_optimizers",
    ],
)
def test_exception_in_the_users_module(tmp_path, hook):
    module = frozen(raising(LM, hook)())
    before = state_digest(module)
    with pytest.raises(OthersError):
        fit(tmp_path, module, pruner())
    assert state_digest(module) == before
    assert hooks(module) == 0


@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end", "teardown"])
def test_exception_in_validate(tmp_path, hook):
    module = raising(LM, hook)()
    before = state_digest(module)
    with pytest.raises(OthersError):
        trainer(tmp_path, pruner()).validate(module, loader(), verbose=False)
    assert state_digest(module) == before
    assert hooks(module) == 0


@pytest.mark.event(
    "Interruptions", "an exception after the pruning", "the model is pruned and whole"
)
def test_exception_after_pruning_leaves_a_whole_pruned_model(tmp_path):
    callback, module = pruner(), raising(LM, "on_fit_end")()
    with pytest.raises(OthersError):
        fit(tmp_path, module, callback)
    assert module.lm.pruning_record.report is callback.report_
    batch = next(iter(loader()))
    assert torch.isfinite(module.lm(**batch).logits).all()
    assert hooks(module) == 0


class Interrupted(LM):
    """Ctrl-C in the second validation, in its third batch."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.current_epoch == 1 and batch_idx == 2:
            raise KeyboardInterrupt


@pytest.mark.event("Interruptions", "Ctrl-C in a validation", "the last complete one stays on disk")
def test_f18_ctrl_c_in_validation_keeps_the_last_complete_one(tmp_path):
    callback, module = pruner(), frozen(Interrupted())
    before = state_digest(module)
    with interrupted():
        fit(tmp_path, module, callback, max_epochs=3)
    assert state_digest(module) == before
    assert hooks(module) == 0
    assert not hasattr(callback, "plan_")
    kept = Calibration.load(tmp_path / "pruning" / "calibration.safetensors")
    assert len(kept.rows.rows) == len(ROWS)
    assert kept.data_digest == callback.calibration_.data_digest


@pytest.mark.event("Interruptions", "the run after Ctrl-C", "makes the same plan")
def test_f18_run_after_ctrl_c_gives_the_same_plan(tmp_path):
    callback, module, other = pruner(), frozen(Interrupted()), pruner()
    with interrupted():
        fit(tmp_path, module, callback, max_epochs=3)
    module.train()  # Ctrl-C came in eval mode
    fit(tmp_path, module, callback)
    fit(tmp_path, frozen(LM()), other)
    assert callback.plan_.digest == other.plan_.digest


@pytest.mark.event(
    "Interruptions",
    "Ctrl-C while calibrating, planning, cutting, measuring",
    "the model is dense, bit-identical",
)
@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (lit_prune.running.seen, "calibrate", 1),
        (RecordedRun, "__init__", 1),
        (RecordedRun, "without", 5),
        (lit_prune.pruner, "make_plan", 1),
        (lit_prune.pruner, "measure", 1),
        (TwoStreams, "lead", 3),
        (TwoStreams, "enters", 5),
        (lit_prune.pruner, "applied", 1),
        (StagedEdits, "_assign", 1),
        (StagedEdits, "_assign", 9),
        (lit_prune.pruner, "measure", 2),  # after surgery: it is taken back
        (lit_prune.pruner, "make_report", 1),
    ],
)
def test_f18_ctrl_c_until_the_report_is_made_leaves_the_model_dense(
    tmp_path, monkeypatch, owner, name, number
):
    callback, module = pruner(), frozen(LM())
    before, use_cache = state_digest(module), module.lm.config.use_cache
    calls = stop_at_call(monkeypatch, owner, name, number)
    with interrupted():
        fit(tmp_path, module, callback)
    assert len(calls) == number
    assert state_digest(module) == before
    assert hooks(module) == 0
    assert not hasattr(callback, "plan_")
    assert not hasattr(callback, "report_")
    assert not hasattr(module.lm, "pruning_record")
    assert module.lm.config.use_cache == use_cache
    assert all(m.training for m in module.modules())
    assert (tmp_path / "pruning" / "calibration.safetensors").exists()


def test_f18_ctrl_c_after_the_report_leaves_the_model_pruned_and_recorded(tmp_path, monkeypatch):
    callback, module = pruner(), frozen(LM())
    stop_at_call(monkeypatch, lit_prune.running.pruning, "log_report", 1)
    dense = decoder_parameters(module.lm)
    with interrupted():
        fit(tmp_path, module, callback)
    assert abs(1 - decoder_parameters(module.lm) / dense - 0.3) <= 0.005
    assert module.lm.pruning_record.plan is callback.plan_
    assert hooks(module) == 0
    assert callback.state_dict()["plan"] == callback.plan_.to_json()
    assert callback.save_pruned(tmp_path / "pruned", verify=False).is_dir()


@pytest.mark.event("Interruptions", "surgery fails", "the model is dense, bit-identical")
@pytest.mark.parametrize("error", [SurgeryError("no"), RuntimeError("out of memory")])
def test_f26_failing_surgery_leaves_the_model(tmp_path, monkeypatch, error):
    callback, module = pruner(), frozen(LM())
    before = state_digest(module)
    stop_at_call(monkeypatch, StagedEdits, "commit", 1, error)
    with pytest.raises(type(error)):
        fit(tmp_path, module, callback)
    assert state_digest(module) == before
    assert hooks(module) == 0
    assert not hasattr(callback, "plan_")


class Poisoned(LM):
    """A NaN appears in the second batch of the second validation."""

    def validation_step(self, batch, batch_idx):
        embedding = self.lm.get_input_embeddings()
        handle = None
        if self.current_epoch == 1 and batch_idx == 1:
            place = torch.tensor([2])
            handle = embedding.register_forward_hook(
                lambda _module, _args, out: out.index_fill(1, place, float("nan"))
            )
        try:
            super().validation_step(batch, batch_idx)
        finally:
            if handle:
                handle.remove()


@pytest.mark.event(
    "Interruptions", "NaN in a validation batch", "`CalibrationError` that names the place"
)
def test_f16_nan_in_a_validation_batch(tmp_path):
    callback, module = pruner(), frozen(Poisoned())
    before = state_digest(module)
    match = r"activations at model.layers.0.self_attn.o_proj are not finite: .* in forward 1, first"
    with pytest.raises(CalibrationError, match=match):
        fit(tmp_path, module, callback, max_epochs=3)
    assert state_digest(module) == before
    assert hooks(module) == 0
    kept = Calibration.load(tmp_path / "pruning" / "calibration.safetensors")
    assert len(kept.rows.rows) == len(ROWS)


def test_f16_weights_that_training_broke_are_not_pruned(tmp_path):
    class Diverging(LM):
        def on_train_end(self):
            with torch.no_grad():
                self.lm.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")

    module = Diverging()
    size = decoder_parameters(module.lm)
    with pytest.raises(Exception, match=r"layers.1.mlp.down_proj") as caught:
        fit(tmp_path, module, pruner())
    assert isinstance(caught.value, lit_prune.LitPruneError)
    assert decoder_parameters(module.lm) == size
    assert hooks(module) == 0


def test_f11_budget_that_only_scores_can_refuse(tmp_path, monkeypatch):
    callback, module = pruner(), frozen(LM())
    before = state_digest(module)
    stop_at_call(monkeypatch, lit_prune.pruner, "make_plan", 1, BudgetError("not met"))
    with pytest.raises(BudgetError):
        fit(tmp_path, module, callback)
    assert state_digest(module) == before
    assert hooks(module) == 0


def test_trainer_is_usable_after_a_failure(tmp_path, monkeypatch):
    callback, module = pruner(), LM()
    stop_at_call(monkeypatch, lit_prune.pruner, "make_plan", 1, BudgetError("not met"))
    with pytest.raises(BudgetError):
        fit(tmp_path, module, callback)
    fit(tmp_path, module, callback, train=loader(TRAIN, 4))
    assert module.lm.pruning_record.report is callback.report_


# ---- F39: files that cannot be written ----


def test_f39_a_folder_that_cannot_be_written_to_is_refused_in_setup(tmp_path):
    (tmp_path / "pruning").write_text("in the way")
    callback, module = pruner(), frozen(LM())
    before = state_digest(module)
    with pytest.raises(ArtifactError, match=r"pruning is no directory\. Make it writable, or give"):
        fit(tmp_path, module, callback)
    assert module.losses == []
    assert state_digest(module) == before
    with pytest.raises(ArtifactError, match="pruning is no directory"):
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert module.validations == 0


def test_f39_a_read_only_folder_is_refused_in_setup(tmp_path, monkeypatch):
    made = tempfile.TemporaryDirectory

    def read_only(**options):  # root may write anywhere
        if options["dir"] == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
        return made(**options)

    monkeypatch.setattr("lit_prune.whole_file.TemporaryDirectory", read_only)
    with pytest.raises(ArtifactError, match=r"and .* cannot be written to\. Make it writable"):
        fit(tmp_path, LM(), pruner())
    assert list(tmp_path.iterdir()) == []
    fit(tmp_path, LM(), pruner(), fast_dev_run=True)  # leaves no files


@pytest.mark.parametrize(
    "name", ["calibration.safetensors", "plan.json", "compensation.safetensors"]
)
def test_f39_a_plan_that_cannot_be_written_leaves_the_model_dense(tmp_path, name):
    (tmp_path / "pruning" / name / "in the way").mkdir(parents=True)
    callback, module = pruner(), frozen(LM())
    before = state_digest(module)
    with pytest.raises(ArtifactError, match=rf"{name} could not be written: .* disk full\?"):
        fit(tmp_path, module, callback)
    assert state_digest(module) == before
    assert hooks(module) == 0
    assert not hasattr(callback, "plan_")
    assert len(callback.calibration_.rows.rows) == len(ROWS)  # what was measured is not lost
    assert not [path.name for path in (tmp_path / "pruning").iterdir() if ".tmp" in path.name]


def test_f39_a_report_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "pruning" / "report.json").mkdir(parents=True)
    callback, module = pruner(), LM()
    fit(tmp_path, module, callback)
    assert module.lm.pruning_record.report is callback.report_
    assert "report.json could not be written" in caplog.text


def test_f39_a_calibration_that_cannot_be_written_does_not_stop_the_training(tmp_path, caplog):
    (tmp_path / "pruning" / "calibration.safetensors").mkdir(parents=True)
    callback, module = pruner(), LM()
    with pytest.raises(ArtifactError, match=r"calibration\.safetensors could not be"):
        fit(tmp_path, module, callback, max_epochs=2)  # when it is over, and nothing is cut
    assert len(module.losses) == 2
    assert caplog.text.count("calibration.safetensors could not be written") == 2
