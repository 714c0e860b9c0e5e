"""The main road: fine-tune, prune when the fit ends, train again, save and load."""

import pytest
import torch

from lit_prune import Calibration, load_pruned
from lit_prune.errors import ConfigError
from lit_prune.saving.page import html_of_directory
from tests.lightning.modules import (
    LM,
    ROWS,
    TRAIN,
    decoder_parameters,
    fit,
    hooks,
    loader,
    pruner,
    steady_latency,
    trainer,
)
from tests.models import padded_batch, tiny_model


@pytest.fixture
def pruned(tmp_path):
    callback, module = pruner(), LM()
    dense = decoder_parameters(module.lm)
    one = fit(tmp_path, module, callback)
    return callback, module, one, dense


@pytest.mark.event(
    "Runs",
    "`trainer.fit(...)`",
    "prunes once, after the last optimizer step; plan, report and files are there",
)
def test_fit_prunes_at_its_end_and_reports(pruned, tmp_path):
    callback, module, _, dense = pruned
    removed = 1 - decoder_parameters(module.lm) / dense
    assert abs(removed - 0.3) <= 0.005
    assert callback.report_.achieved_ratio == pytest.approx(removed)
    assert callback.report_.plan_digest == callback.plan_.digest
    assert module.lm.pruning_record.report is callback.report_
    assert hooks(module) == 0
    assert sorted(path.name for path in (tmp_path / "pruning").iterdir()) == [
        "calibration.safetensors",
        "compensation.safetensors",
        "plan.json",
        "report.html",
        "report.json",
    ]
    page = html_of_directory(tmp_path / "pruning")  # plan and report tell as much
    assert (tmp_path / "pruning" / "report.html").read_text() == page.replace(
        "<title>pruning, pruned", "<title>A model, pruned"
    ).replace("<h1>pruning, pruned", "<h1>A model, pruned")


def test_every_validation_is_observed_and_the_last_counts(tmp_path):
    seen = []

    class Watching(LM):
        def on_validation_epoch_end(self):
            seen.append(hooks(self))

    callback = pruner()
    fit(tmp_path, Watching(), callback, max_epochs=3, num_sanity_val_steps=2)
    assert seen[0] == 0  # the sanity check
    assert [bool(number) for number in seen[1:]] == [True] * 3
    assert len(callback.calibration_.rows.rows) == len(ROWS)


def test_results_are_absent_before_they_exist(tmp_path):
    callback = pruner()
    absent = []

    class Watching(LM):
        def on_train_end(self):
            absent.extend(n for n in ("plan_", "report_") if not hasattr(callback, n))

    names = ("plan_", "report_", "calibration_")
    assert not any(hasattr(callback, name) for name in names)
    with pytest.raises(ConfigError, match="nothing has been pruned"):
        callback.save_pruned(tmp_path / "pruned")
    fit(tmp_path, Watching(), callback)
    assert absent == ["plan_", "report_"]
    assert all(hasattr(callback, name) for name in names)


def is_trainable(module, one, before):
    """Every parameter was in the optimizer and moved, and the loss fell."""
    stepped = {id(p) for o in one.optimizers for g in o.param_groups for p in g["params"]}
    assert {id(p) for p in module.parameters()} == stepped
    assert len(one.optimizers[0].state) == len(stepped)
    assert module.losses[-1] < before
    return True


@pytest.mark.event(
    "Runs",
    "`fit` again, same Trainer",
    "recovery fine-tuning: every parameter is trained; it is not pruned again",
)
def test_same_trainer_trains_the_pruned_model_and_does_not_prune_again(pruned):
    callback, module, one, _ = pruned
    digest, size = callback.plan_.digest, decoder_parameters(module.lm)
    module.losses.clear()
    one.fit_loop.max_epochs = 9
    one.fit(module, loader(TRAIN), loader())
    assert is_trainable(module, one, module.losses[0])
    assert (callback.plan_.digest, decoder_parameters(module.lm)) == (digest, size)


@pytest.mark.event(
    "Runs", "`fit` again, a new Trainer, with the callback", "trains on; not pruned again"
)
def test_new_trainer_trains_the_pruned_model(pruned, tmp_path):
    callback, module, _, _ = pruned
    size = decoder_parameters(module.lm)
    module.losses.clear()
    # recovery needs no validation: the callback has nothing left to calibrate
    two = fit(tmp_path, module, callback, max_epochs=8, limit_val_batches=0)
    assert is_trainable(module, two, module.losses[0])
    assert decoder_parameters(module.lm) == size


def test_pruned_model_is_saved_and_loads_with_equal_logits(pruned, tmp_path):
    callback, module, _, _ = pruned
    folder = callback.save_pruned(tmp_path / "pruned", verify=False)
    batch = padded_batch(ROWS[:3])
    loaded = load_pruned(folder)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, module.lm.eval()(**batch).logits)
    assert loaded.pruning_record.plan.digest == callback.plan_.digest
    assert loaded.pruning_record.report == callback.report_


@pytest.mark.event(
    "Runs", "the training before the pruning", "bit-identical losses with and without the callback"
)
def test_f14_training_goes_as_without_the_callback(tmp_path):
    """Losses are equal to the bit, dropout and shuffling included."""

    def losses(*callbacks):
        torch.manual_seed(3)
        module = LM(tiny_model(attention_dropout=0.2))
        module.lm.config.use_cache = True
        shuffled = torch.utils.data.DataLoader(TRAIN, 2, shuffle=True, collate_fn=padded_batch)
        fit(tmp_path, module, *callbacks, train=shuffled, max_epochs=3, val_check_interval=0.5)
        modes = {m.training for m in module.modules()}
        return module.losses, modes, module.lm.config.use_cache, torch.get_rng_state()

    alone, beside = losses(), losses(pruner())
    assert beside[0] == alone[0]
    assert beside[1:3] == alone[1:3] == ({True}, True)
    assert torch.equal(beside[3], alone[3])


@pytest.mark.event(
    "Runs", "`dry_run=True`", 'plans and reports; `"measured"`: what it would cost, too'
)
@pytest.mark.parametrize("dry_run", [True, "measured"])
def test_dry_run_plans_and_leaves_the_model(tmp_path, dry_run):
    callback, module = pruner(dry_run=dry_run), LM()
    size = decoder_parameters(module.lm)
    trainer = fit(tmp_path, module, callback)
    assert decoder_parameters(module.lm) == size
    parameters = {id(parameter) for parameter in module.parameters()}
    assert {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]} <= parameters
    assert callback.report_.dry_run
    assert abs(callback.report_.achieved_ratio - 0.3) <= 0.005
    assert (callback.report_.row("perplexity").after is None) == (dry_run is True)
    assert not hasattr(module.lm, "pruning_record")
    with pytest.raises(ConfigError, match="nothing has been pruned"):
        callback.save_pruned(tmp_path / "pruned")


def test_second_model_is_pruned_on_its_own_validation(tmp_path):
    callback, first, second = pruner(), LM(), LM(tiny_model(seed=5))
    fit(tmp_path, first, callback)
    plan = callback.plan_
    fit(tmp_path, second, callback)
    assert callback.plan_ != plan
    assert second.lm.pruning_record.plan == callback.plan_


@pytest.mark.event("Runs", "`fit` again without the callback", "trains the pruned model on")
def test_trainer_without_callback_goes_on_after_pruning(pruned, tmp_path):
    _, module, _, _ = pruned
    metrics = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert metrics[0]["val_loss"] > 0


def test_latency_budget_leaves_its_table_in_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_prune.latency_table.measure_sub_blocks", steady_latency)
    callback = pruner(budget="latency", latency_prompt_tokens=8, latency_new_tokens=2)
    fit(tmp_path, LM(), callback)
    kept = Calibration.load(tmp_path / "pruning" / "calibration.safetensors")
    assert kept.latency.keys() == callback.calibration_.latency.keys()
