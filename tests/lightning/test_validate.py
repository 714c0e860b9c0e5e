"""`when="validate"`, and the order of several runs."""

import pytest

from lit_prune.errors import CalibrationError
from tests.lightning.modules import (
    LM,
    TRAIN,
    decoder_parameters,
    fit,
    hooks,
    loader,
    pruner,
    trainer,
)


@pytest.mark.event(
    "Runs",
    '`trainer.validate(...)` with `when="validate"`',
    "prunes when it ends; the model can be trained",
)
def test_validate_alone_prunes_and_leaves_the_model_trainable(tmp_path):
    """P27: parameters made in inference mode could never be trained."""
    callback, module = pruner(when="validate"), LM()
    dense = decoder_parameters(module.lm)
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert abs(1 - decoder_parameters(module.lm) / dense - 0.3) <= 0.005
    assert not any(p.is_inference() for p in module.parameters())
    assert hooks(module) == 0
    module.losses.clear()
    two = fit(tmp_path, module, callback, max_epochs=8)
    assert module.losses[-1] < module.losses[0]
    assert len(two.optimizers[0].state) == len(list(module.parameters()))
    assert callback.plan_.digest == callback.report_.plan_digest


@pytest.mark.event("Runs", "`validate`, `fit`, `validate` by default", "prunes once, after the fit")
def test_by_default_validate_fit_validate_prunes_once_after_the_fit(tmp_path):
    callback, module = pruner(), LM()
    one, sizes = trainer(tmp_path, callback), [decoder_parameters(module.lm)]
    one.validate(module, loader(), verbose=False)
    assert hasattr(callback, "calibration_")
    assert not hasattr(callback, "plan_")
    sizes.append(decoder_parameters(module.lm))
    one.fit(module, loader(TRAIN), loader())
    sizes.append(decoder_parameters(module.lm))
    plan = callback.plan_
    one.validate(module, loader(), verbose=False)
    sizes.append(decoder_parameters(module.lm))
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]
    assert callback.plan_ is plan


def test_validate_before_a_fit_without_sanity_check(tmp_path):
    """Lightning takes the loaders of `validate` for those of `fit` until its first validation."""
    callback, module = pruner(), LM()
    one = trainer(tmp_path, callback, num_sanity_val_steps=0)
    one.validate(module, loader(), verbose=False)
    one.fit(module, loader(TRAIN), loader())
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


def test_second_validate_does_not_prune_again(tmp_path):
    callback, module = pruner(when="validate"), LM()
    one = trainer(tmp_path, callback)
    one.validate(module, loader(), verbose=False)
    size = decoder_parameters(module.lm)
    one.validate(module, loader(), verbose=False)
    assert decoder_parameters(module.lm) == size


@pytest.mark.event(
    "Checkpoints",
    "`trainer.validate(ckpt_path=...)` of a pruned file",
    "measured, not pruned again",
)
def test_validate_of_a_pruned_file_does_not_prune_again(tmp_path):
    """Lightning restores the state of callbacks in a fit alone."""
    first, module = pruner(), LM()
    one = fit(tmp_path / "fit", module, first)
    one.save_checkpoint(tmp_path / "pruned.ckpt")
    pruned, other, callback = decoder_parameters(module.lm), LM(), pruner(when="validate")
    two = trainer(tmp_path / "validate", callback)
    two.validate(other, loader(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
    assert decoder_parameters(other.lm) == pruned
    assert not hasattr(callback, "plan_")
    assert other.lm.pruning_record.plan.digest == first.plan_.digest
    # a dense one with the same callback is
    two.validate(dense := LM(), loader(), verbose=False)
    assert decoder_parameters(dense.lm) < pruned * 1.02
    assert hasattr(callback, "plan_")


def test_fit_before_it_is_not_observed(tmp_path):
    callback, module = pruner(when="validate"), LM()
    one = fit(tmp_path, module, callback)
    assert not hasattr(callback, "calibration_")
    one.validate(module, loader(), verbose=False)
    assert callback.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


def test_statistics_of_an_earlier_run_do_not_count(tmp_path):
    """A fit that validates nothing does not prune by what a bare validate saw before it."""
    callback, module = pruner(), LM()
    one = trainer(tmp_path, callback, max_epochs=0, num_sanity_val_steps=0)
    one.validate(module, loader(), verbose=False)
    size = decoder_parameters(module.lm)
    with pytest.raises(CalibrationError, match="trained and validated nothing"):
        one.fit(module, loader(TRAIN), loader())
    assert decoder_parameters(module.lm) == size


@pytest.mark.event("Runs", "`test`, `predict`", "not observed")
def test_test_and_predict_are_not_observed(tmp_path):
    class Tested(LM):
        def test_step(self, batch, batch_idx):
            self.lm(**batch)

        def predict_step(self, batch, batch_idx):
            return self.lm(**batch).logits

    callback, module = pruner(), Tested()
    one = trainer(tmp_path, callback)
    one.test(module, loader(), verbose=False)
    one.predict(module, loader())
    assert not hasattr(callback, "calibration_")
