"""LightningCLI reads every option, typed; the callback is copied, pickled and restored."""

import copy
import json
import pickle

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lit_prune import EntropyPruningCallback, PruningConfig
from lit_prune.errors import ConfigError
from tests.lightning.modules import LM, fit, hooks, loader, pruner, state_digest

QUIET = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}


@pytest.fixture(autouse=True)
def _command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])  # pytest's own would make LightningCLI warn


def cli(folder, options, *more, **trainer):
    path = folder / "config.yaml"
    entry = {"class_path": "lit_prune.EntropyPruningCallback", "init_args": options}
    path.write_text(yaml.safe_dump({"trainer": {**QUIET, **trainer, "callbacks": [entry]}}))
    arguments = ["--config", str(path), *more]
    return LightningCLI(LM, args=arguments, run=False, save_config_callback=None)


def callback_of(cli):
    return next(c for c in cli.trainer.callbacks if isinstance(c, EntropyPruningCallback))


def test_every_option_is_read_from_yaml_with_its_type(tmp_path):
    defaults = PruningConfig(pruning_ratio=0.25).to_dict()
    options = {
        **defaults,
        "preset": "paper",
        "allocator": "greedy",
        "compensation": "mean",
        "unit_score": "activation",
        "sensitivity": "frobenius",
        "granularities": ["kv_group", "channel"],
        "protected_layers": [0, 3],
        "channel_multiple": 8,
        "num_clusters": 4,
        "entropy_floor": 1e-5,
        "cap_clusters": False,
        "seed": 3,
    }
    run = {"when": "validate", "dry_run": True, "val_dataloader_idx": 1}
    callback = callback_of(cli(tmp_path, {**options, **run}))
    assert callback.config.to_dict() == options
    assert isinstance(callback.config.protected_layers, tuple)
    assert (callback.when, callback.dry_run, callback.val_dataloader_idx) == ("validate", True, 1)


def test_a_list_of_ratios_and_the_weights_are_read_from_yaml(tmp_path):
    callback = callback_of(cli(tmp_path, {"pruning_ratio": [0.1, 0.3], "when": "epoch_end"}))
    assert (callback.config.pruning_ratio, callback.when) == (0.3, "epoch_end")
    callback = callback_of(cli(tmp_path, {"pruning_ratio": 0.3, "weights": "best"}))
    assert callback.weights == "best"


def test_config_of_the_cli_goes_round(tmp_path):
    one = cli(tmp_path, {"pruning_ratio": 0.3, "protected_layers": [1]})
    dumped = one.parser.dump(one.config, skip_none=False)
    again = tmp_path / "again.yaml"
    again.write_text(dumped)
    two = LightningCLI(LM, args=["--config", str(again)], run=False, save_config_callback=None)
    assert callback_of(two).config == callback_of(one).config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 0.3, "pruning_ration": 0.3}, "pruning_ration"),
        ({"pruning_ratio": 0.3, "allocator": "unifrom"}, "depth_first', 'greedy', 'uniform'"),
        ({"pruning_ratio": 0.3, "channel_multiple": "many"}, "Expected a <class 'int'>"),
        ({"pruning_ratio": "much"}, "Expected a <class 'float'>"),
    ],
)
def test_wrong_yaml_is_refused_by_name(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        cli(tmp_path, options)
    assert message in capsys.readouterr().err


def test_ratio_out_of_range_is_refused_in_our_words(tmp_path):
    with pytest.raises(ValueError, match=r"pruning_ratio must be a number in \[0, 1\), got 30"):
        cli(tmp_path, {"pruning_ratio": 30.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ration": 0.3}, "did you mean 'pruning_ratio'"),
        ({"alocator": "uniform"}, "unknown option 'alocator'; did you mean 'allocator'"),
        (
            {"when": "fit_start"},
            "when must be 'fit_end', 'validate' or 'epoch_end', got 'fit_start'",
        ),
        ({"preset": "papper"}, "did you mean 'paper'"),
        ({"pruning_ratio": 1.5}, "pruning_ratio must be a number in"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        EntropyPruningCallback(**{"pruning_ratio": 0.3, **options})


def test_ratio_is_required():
    with pytest.raises(ConfigError, match="pruning_ratio is missing"):
        EntropyPruningCallback()


def test_other_targets_are_read_from_yaml(tmp_path):
    callback = callback_of(cli(tmp_path, {"target_parameters": "20k"}))
    assert (callback.config.target, callback.config.target_parameters) == (
        "target_parameters",
        "20k",
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_callback_is_copied_and_pickled(tmp_path, copied):
    callback, module = pruner(protected_layers=[1]), LM()
    fresh = copied(callback)
    assert fresh.config == callback.config
    fit(tmp_path, module, callback)
    done = copied(callback)
    assert done.plan_ == callback.plan_
    assert done.state_dict() == callback.state_dict()
    fit(tmp_path, LM(), fresh)  # a copy prunes on its own
    assert fresh.plan_.digest == callback.plan_.digest


def test_copy_of_a_model_while_it_is_observed_works(tmp_path):
    """Averaging callbacks copy the module; the copy must not feed our statistics."""

    class Copying(LM):
        def on_validation_epoch_start(self):
            self.copied = [copy.deepcopy(self.lm)]

        def validation_step(self, batch, batch_idx):
            self.copied[0](**batch)
            super().validation_step(batch, batch_idx)

    callback, other = pruner(), pruner()
    fit(tmp_path, Copying(), callback)
    fit(tmp_path, LM(), other)
    assert callback.plan_.digest == other.plan_.digest


def test_state_is_text_and_loads_with_weights_only(tmp_path):
    callback, module = pruner(), LM()
    assert callback.state_dict() == {"plan": ""}
    fit(tmp_path, module, callback)
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(state["plan"])["schema_version"] == 1
    other = pruner()
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert not hasattr(other, "plan_")
    before = state_digest(module)
    other.load_state_dict({"plan": ""})
    assert state_digest(module) == before
    assert hooks(module) == 0


@pytest.mark.event("Neighbours", "`LightningCLI`, the callback in YAML", "runs and prunes")
def test_cli_runs_and_prunes(tmp_path):
    one = cli(
        tmp_path,
        {"pruning_ratio": 0.3, "latency_prompt_tokens": 0, "channel_multiple": 4},
        max_epochs=1,
        default_root_dir=str(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    one.trainer.fit(one.model, loader(), loader())
    assert callback_of(one).report_.achieved_ratio == pytest.approx(0.3, abs=0.005)
