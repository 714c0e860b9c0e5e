"""Checkpoints around the pruning, and copies of the weights that others keep."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from lit_prune import PruningPlan, apply_plan, load_pruned, prune, spec_for
from lit_prune.errors import PlanMismatchError
from lit_prune.plan import LayerPlan
from tests.lightning.modules import (
    LM,
    ROWS,
    TRAIN,
    decoder_parameters,
    fit,
    hooks,
    loader,
    pruner,
    state_digest,
    trainer,
)
from tests.models import batches_of, tiny_model


def narrow_plan(lm):
    """Keep the first KV group and half the channels of every layer."""
    blocks = spec_for(lm).blocks
    return PruningPlan(
        spec_for(lm).fingerprint,
        tuple(LayerPlan(block.index, (0,), tuple(range(24))) for block in blocks),
    )


class ByHand(L.Callback):
    """A user who prunes in some hook of a fit."""

    def __init__(self, hook):
        setattr(self, hook, self.act)
        self.done = False

    def act(self, trainer, pl_module, *_args, **_kwargs):
        if not self.done and not trainer.sanity_checking:
            self.done = True
            apply_plan(pl_module.lm, narrow_plan(pl_module.lm))


@pytest.mark.event(
    "Checkpoints",
    "a plan applied by hand while optimizers step",
    "`PlanMismatchError` that names the parameters",
)
@pytest.mark.parametrize(
    ("hook", "steps"), [("on_train_start", 0), ("on_fit_start", 0), ("on_validation_end", 2)]
)
def test_f31_plan_applied_while_optimizers_step_is_refused(tmp_path, hook, steps):
    module = LM()
    match = r"lm.model.layers.0.self_attn.q_proj.weight \(\d+ parameters in all\) is not in any opt"
    with pytest.raises(PlanMismatchError, match=match):
        fit(
            tmp_path,
            module,
            pruner(),
            ByHand(hook),
            train=loader(TRAIN, 2),
            val_check_interval=2,
        )
    assert len(module.losses) == steps
    assert hooks(module) == 0


def test_f31_plan_applied_before_the_fit_is_fine(tmp_path):
    callback, module = pruner(), LM()
    apply_plan(module.lm, narrow_plan(module.lm))
    size = decoder_parameters(module.lm)
    fit(tmp_path, module, callback)
    assert abs(1 - decoder_parameters(module.lm) / size - 0.3) <= 0.005


def test_f31_optimizer_of_parameters_outside_the_module_is_fine(tmp_path):
    class Outside(LM):
        def configure_optimizers(self):
            self.other = [torch.nn.Parameter(torch.ones(3))]
            return torch.optim.AdamW([*self.lm.parameters(), *self.other], lr=1e-3)

    callback, module = pruner(), Outside()
    fit(tmp_path, module, callback)
    fit(tmp_path, module, callback)
    assert len(module.losses) == 2


@pytest.mark.event(
    "Checkpoints", "`fit(ckpt_path=...)` of a recovery run", "goes on; not pruned again"
)
def test_f31_checkpoint_of_the_recovery_resumes(tmp_path):
    callback, module = pruner(), LM()
    fit(tmp_path, module, callback)
    two = fit(tmp_path, module, callback, max_epochs=2)
    two.save_checkpoint(tmp_path / "recovery.ckpt")
    saved = torch.load(tmp_path / "recovery.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["state"]) == len(list(module.parameters()))
    digest = state_digest(module)
    three = trainer(tmp_path, callback, max_epochs=4)
    three.fit(module, loader(TRAIN), loader(), ckpt_path=tmp_path / "recovery.ckpt")
    assert three.current_epoch == 4
    assert state_digest(module) != digest
    assert module.lm.pruning_record.report is callback.report_


@pytest.mark.event(
    "Checkpoints", "the same in a new process, by the callback alone", "goes on; not pruned again"
)
def test_f31_recovery_resumes_in_a_fresh_process_and_is_not_pruned_again(tmp_path):
    """A new callback learns from the checkpoint that this model is the pruned one."""
    callback, module = pruner(), LM()
    fit(tmp_path, module, callback)
    folder = callback.save_pruned(tmp_path / "pruned", verify=False)
    fit(tmp_path, module, callback).save_checkpoint(tmp_path / "recovery.ckpt")
    fresh, reloaded = pruner(), LM(load_pruned(folder))
    size = decoder_parameters(reloaded.lm)
    one = trainer(tmp_path, fresh, max_epochs=3)
    one.fit(reloaded, loader(TRAIN), loader(), ckpt_path=tmp_path / "recovery.ckpt")
    assert decoder_parameters(reloaded.lm) == size
    assert not hasattr(fresh, "plan_")
    assert fresh.state_dict() == callback.state_dict()


@pytest.mark.event(
    "Checkpoints",
    "`fit(ckpt_path=...)` of a checkpoint from before the pruning",
    "trains on and prunes once",
)
def test_f31_checkpoint_before_pruning_resumes_and_prunes_once(tmp_path):
    """An interrupted fine-tuning goes on as if nothing had happened."""
    save = ModelCheckpoint(tmp_path / "first", save_last=True)
    fit(tmp_path, LM(), pruner(), save, enable_checkpointing=True)
    callback, module = pruner(), LM()
    again = ModelCheckpoint(tmp_path / "first", save_last=True)
    one = trainer(tmp_path, callback, again, enable_checkpointing=True, max_epochs=2)
    one.fit(module, loader(TRAIN), loader(), ckpt_path=save.last_model_path)
    assert len(module.losses) == 1
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


@pytest.mark.event(
    "Checkpoints",
    "checkpoints that the run itself wrote",
    "hold the dense model that was validated",
)
def test_checkpoints_of_the_run_hold_the_dense_model(tmp_path):
    callback, module = pruner(), LM()
    dense = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    save = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_last=True)
    fit(tmp_path, module, callback, save, max_epochs=2, enable_checkpointing=True)
    for path in (save.best_model_path, save.last_model_path):
        saved = torch.load(path, weights_only=True)
        assert {name: tuple(x.shape) for name, x in saved["state_dict"].items()} == dense
        assert saved["callbacks"]["EntropyPruningCallback"] == {"plan": ""}
        assert len(saved["optimizer_states"][0]["state"]) == len(dense)


def test_best_weights_loaded_back_at_the_end_are_what_is_pruned(tmp_path):
    """The statistics are of the weights that the fit ends with, not of those last validated."""

    class Back(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.first = {name: x.clone() for name, x in pl_module.state_dict().items()}

        def on_train_end(self, trainer, pl_module):
            pl_module.load_state_dict(self.first)

    for allocator, kv in (("joint", 2), ("uniform_widths", 4)):
        options = {"allocator": allocator, "channel_multiple": 4, "latency_prompt_tokens": 0}
        callback, module = pruner(**options), LM(tiny_model(kv_heads=kv), lr=0.1)
        fit(tmp_path, module, Back(), callback, max_epochs=3)
        fresh = tiny_model(kv_heads=kv)
        wanted = prune(fresh, batches_of(ROWS), pruning_ratio=0.3, progress=False, **options)
        assert callback.plan_.digest == wanted.plan.digest
        assert state_digest(module.lm) == state_digest(fresh)


@pytest.mark.event(
    "Neighbours",
    "`WeightAveraging`, EMA, in either order",
    "the averaged weights are pruned; the dense copy never comes back",
)
@pytest.mark.parametrize("first", [True, False], ids=["average first", "pruner first"])
@pytest.mark.parametrize("options", [{}, {"max_steps": 2, "max_epochs": None}])
def test_averaged_weights_are_what_is_pruned(tmp_path, first, options):
    """P28: the average is copied back when training ends; pruning comes after it."""
    kept = {}

    class Keeping(LM):
        def on_train_end(self):
            kept.update({name: x.clone() for name, x in self.lm.state_dict().items()})

    callback, module = pruner(), Keeping(lr=0.1)
    average = EMAWeightAveraging(decay=0.5)
    callbacks = [average, callback] if first else [callback, average]
    one = fit(tmp_path, module, *callbacks, train=loader(TRAIN, 2), **options)
    dense = tiny_model()
    dense.load_state_dict(kept)
    wanted = prune(
        dense,
        batches_of(ROWS),
        pruning_ratio=0.3,
        channel_multiple=4,
        latency_prompt_tokens=0,
        progress=False,
    )
    assert callback.plan_.digest == wanted.plan.digest
    assert state_digest(module.lm) == state_digest(dense)
    # its dense copy is gone: neither a validation nor a checkpoint brings it back
    one.validate(module, loader(), verbose=False)
    one.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    shapes = {name: x.shape for name, x in module.state_dict().items()}
    assert {name: x.shape for name, x in saved.items()} == shapes
    assert state_digest(module.lm) == state_digest(dense)


def test_averaging_starts_anew_in_the_recovery(tmp_path):
    callback, module, average = pruner(), LM(), EMAWeightAveraging(decay=0.5)
    fit(tmp_path, module, callback, average)
    size = decoder_parameters(module.lm)
    fit(tmp_path, module, callback, EMAWeightAveraging(decay=0.5), max_epochs=2)
    assert decoder_parameters(module.lm) == size


@pytest.mark.event("Neighbours", "`StochasticWeightAveraging`", "its weights are pruned")
def test_stochastic_weight_averaging(tmp_path):
    callback, module = pruner(), LM()
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    fit(tmp_path, module, swa, callback, max_epochs=3)
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)
