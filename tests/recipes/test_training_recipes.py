"""Recipes that train: each promise on its last lines, small."""

import re

import pytest
import yaml

from lit_prune import load_pruned
from tests.recipes.conftest import ROOT

SMALL = ("--context_length", 64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return file


def saved(stdout):
    return load_pruned(re.search(r"saved: (\S+)", stdout)[1])


@pytest.mark.slow
def test_fine_tune_then_prune_from_yaml(run_recipe, tiny_checkpoint, text, tmp_path):
    config = yaml.safe_load((ROOT / "recipes" / "fine_tune_then_prune.yaml").read_text())
    assert config["trainer"]["callbacks"][0]["init_args"] == {"pruning_ratio": 0.3}
    stdout = run_recipe(
        *("train.py", "fit", "--config", ROOT / "recipes" / "fine_tune_then_prune.yaml"),
        *("--trainer.max_steps", 4, "--trainer.default_root_dir", tmp_path),
        *("--model.model", tiny_checkpoint, "--data.tokenizer", tiny_checkpoint),
        *("--data.train", text, "--data.context_length", 64),
        cwd=tmp_path,
    )
    assert saved(stdout).pruning_record.report.achieved_ratio == pytest.approx(0.3, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--lora_rank", 4), ("--distillation", 0)])
def test_recovery_brings_perplexity_back(run_recipe, tiny_checkpoint, text, tmp_path, how):
    stdout = run_recipe(
        "recover.py",
        *("--model", tiny_checkpoint, "--text", text, *SMALL, "--learning_rate", 3e-3),
        *("--output", tmp_path / "out", *how),
        cwd=tmp_path,
    )
    found = dict(re.findall(r"(dense|pruned|recovered): ([0-9.]+)", stdout))
    assert float(found["recovered"]) < float(found["pruned"])
    assert saved(stdout).pruning_record.plan is not None


@pytest.mark.slow
def test_stages_follow_the_epochs(run_recipe, tiny_checkpoint, text, tmp_path):
    stdout = run_recipe(
        "iterative.py",
        *("--model", tiny_checkpoint, "--text", text, *SMALL, "--ratios", 0.1, 0.3),
        *("--epochs", 3, "--output", tmp_path / "out"),
        cwd=tmp_path,
    )
    assert len(re.findall(r"perplexity [0-9.]+ -> [0-9.]+", stdout)) == 2
    assert saved(stdout).pruning_record.report.achieved_ratio == pytest.approx(0.3, abs=0.005)


@pytest.mark.slow
def test_a_pruned_model_is_deployed(run_recipe, tiny_checkpoint, text, tmp_path):
    folder = tmp_path / "recovered"
    run_recipe(
        "recover.py",
        *("--model", tiny_checkpoint, "--text", text, *SMALL, "--output", folder),
        cwd=tmp_path,
    )
    stdout = run_recipe("deploy.py", "--model", folder, "--output", tmp_path / "d", cwd=tmp_path)
    assert "transformers (" in stdout
    assert (tmp_path / "d" / "gguf" / "model.gguf").is_file()
