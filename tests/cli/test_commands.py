"""What each command is for, on a tiny model, from the first to the last."""

import csv
import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune import apply_plan, load_pruned
from lit_prune.report import PruningReport
from lit_prune.views.page.figures import percent
from tests.cli.conftest import QUICK, UNVERIFIED
from tests.state import recount

CALIBRATED = ["--max_calibration_tokens", "4096", *QUICK]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def test_prune_saves_a_model_that_loads_and_says_what_it_cost(
    lit_prune, model_directory, text, folder
):
    given = ["--model", model_directory, "--text", text, *CALIBRATED]
    run = lit_prune("prune", *given, "--to", folder / "pruned", "--pruning-ratio", "0.3")
    assert (run.status, run.err) == (0, "")
    assert "parameters in decoder layers" in run.out
    assert f"saved: {folder / 'pruned'}" in run.out
    model = load_pruned(folder / "pruned")
    dense = AutoModelForCausalLM.from_pretrained(model_directory)
    left = recount(model)["decoder"] / recount(dense)["decoder"]
    assert left == pytest.approx(0.7, abs=0.005)
    assert (folder / "pruned" / "tokenizer.json").is_file()


def test_a_plan_is_applied_to_the_model_that_was_pruned_at_once(
    lit_prune, model_directory, text, folder
):
    given = ["--model", model_directory, "--text", text, *CALIBRATED]
    run = lit_prune("plan", *given, "--to", folder / "plan", "--pruning_ratio", "0.3")
    assert (run.status, run.err) == (0, "")
    assert re.search(r"would remove (29\.[5-9]|30\.[0-4])", run.out)
    planned = PruningReport.from_json((folder / "plan" / "report.json").read_text())
    assert planned.dry_run
    assert planned.row("perplexity").after > 0
    assert "What would it cost?" in (folder / "plan" / "report.html").read_text()
    run = lit_prune(
        "apply", "--model", model_directory, "--plan", folder / "plan", "--to", folder / "applied",
        *UNVERIFIED,
    )  # fmt: skip
    assert (run.status, run.err) == (0, "")
    applied, pruned = load_pruned(folder / "applied"), load_pruned(folder / "pruned")
    assert applied.pruning_record.plan.digest == pruned.pruning_record.plan.digest
    told = applied.pruning_record.report
    assert not told.dry_run
    assert told.row("perplexity").after == pruned.pruning_record.report.row("perplexity").after
    assert any("measured when the plan was made" in note for note in told.warnings)
    for (name, one), (_, other) in zip(
        applied.state_dict().items(), pruned.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)


def test_a_plan_without_its_compensation_is_applied_only_on_request(
    lit_prune, model_directory, folder, tmp_path
):
    for name in ("plan.json", "report.json"):
        (tmp_path / name).write_bytes((folder / "plan" / name).read_bytes())
    words = ["apply", "--model", model_directory, "--plan", tmp_path, "--to", tmp_path / "bare"]
    run = lit_prune(*words, *UNVERIFIED)
    assert run.status == 1
    assert "compensation.safetensors: there is no such file" in run.err
    assert "--without_compensation" in run.err
    assert not (tmp_path / "bare").exists()
    run = lit_prune(*words, *UNVERIFIED, "--without_compensation")
    assert (run.status, run.err) == (0, "")
    # nobody measured this one
    assert load_pruned(tmp_path / "bare").pruning_record.report is None


def test_a_plan_is_applied_in_the_dtype_that_it_was_made_in(
    lit_prune, model_directory, text, folder, tmp_path
):
    stored = tmp_path / "stored"
    half = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    half.save_pretrained(stored)
    AutoTokenizer.from_pretrained(model_directory).save_pretrained(stored)
    given = ["--model", stored, "--text", text, *CALIBRATED, "--dtype", "float32"]
    run = lit_prune("plan", *given, "--to", tmp_path / "plan", "--pruning_ratio", "0.3")
    assert run.status == 0
    printed = run.out.split("make it: lit-prune ")[1].split()
    assert printed[-2:] == ["--to", "pruned"]
    run = lit_prune(*printed[:-1], tmp_path / "applied", *UNVERIFIED)
    assert run.status == 0
    assert load_pruned(tmp_path / "applied").dtype == torch.float32
    assert "saved in torch.float32" in run.out
    assert "stored in torch.bfloat16" in run.out
    assert "lit-prune export --dtype bfloat16" in run.out
    to = ["--model", tmp_path / "applied", "--to", tmp_path / "rounded", *UNVERIFIED]
    assert lit_prune("export", *to, "--dtype", "bfloat16").status == 0
    assert load_pruned(tmp_path / "rounded").dtype == torch.bfloat16
    files = (tmp_path / "plan" / name for name in ("plan.json", "compensation.safetensors"))
    assert apply_plan(stored, *files).dtype == torch.float32
    other = lit_prune(*printed[:-1], tmp_path / "other", *UNVERIFIED, "--dtype", "bfloat16")
    assert other.status == 1
    assert "or for these in another dtype than torch.bfloat16" in other.err


def test_report_shows_again_what_was_pruned_and_what_is_planned(lit_prune, folder, tmp_path):
    page = tmp_path / "page.html"
    run = lit_prune("report", "--of", folder / "pruned", "--to", page)
    assert (run.status, run.err) == (0, "")
    assert "parameters in decoder layers" in run.out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    again = lit_prune("report", "--of", folder / "pruned", "--to", page)
    assert again.status == 1
    assert f"{page} exists" in again.err
    assert lit_prune("report", "--of", folder / "plan").status == 0
    nothing = lit_prune("report", "--of", tmp_path)
    assert nothing.status == 1
    assert "has no plan.json and no report.json" in nothing.err


def test_sweep_goes_by_the_calibration_of_a_plan(lit_prune, model_directory, folder, tmp_path):
    run = lit_prune(
        "sweep",
        *("--model", model_directory, "--ratios", "0.1", "0.3", "0.99", *QUICK),
        *("--calibration", folder / "plan" / "calibration.safetensors", "--to", folder / "sweep"),
    )
    assert (run.status, run.err) == (0, "")
    rows = list(csv.DictReader((folder / "sweep" / "sweep.csv").open()))
    assert [float(row["requested"]) for row in rows] == [0.1, 0.3, 0.99]
    plan = json.loads((folder / "plan" / "plan.json").read_text())
    assert float(rows[1]["achieved"]) == plan["provenance"]["achieved_ratio"]
    assert "cannot be reached" in rows[2]["note"]
    assert "tokens of the choose side" in run.out
    assert {"sweep.json", "trade_off.png"} < {x.name for x in (folder / "sweep").iterdir()}
    page = folder / "with-curve.html"
    shown = lit_prune(
        "report", "--of", folder / "pruned", "--sweep", folder / "sweep", "--to", page
    )
    assert (shown.status, shown.err) == (0, "")
    words = page.read_text(encoding="utf-8")
    assert "The trade-off" in words
    for row in rows[:2]:
        assert percent(float(row["achieved"])) in words
    none = lit_prune("report", "--of", folder / "pruned", "--sweep", folder)
    assert none.status == 1
    assert "there is no such file. `lit-prune sweep --to` writes it" in none.err
    (tmp_path / "sweep.json").write_text("[]")
    other = lit_prune("report", "--of", folder / "pruned", "--sweep", tmp_path)
    assert other.status == 1
    assert "is not what `lit-prune sweep` writes" in other.err


def test_evaluate_lays_two_models_side_by_side(lit_prune, model_directory, text, folder):
    file = folder / "evaluation.json"
    words = ["--against", model_directory, "--text", text, "--to", file]
    latency = ["--latency_prompt_tokens", "8", "--latency_new_tokens", "2"]
    run = lit_prune("evaluate", "--model", folder / "pruned", *words, *latency)
    assert (run.status, run.err) == (0, "")
    assert "decode, per token" in run.out
    rows = {row["key"]: row for row in json.loads(file.read_text())["rows"]}
    row = rows["decoder_parameters"]
    assert row["after"] / row["before"] == pytest.approx(0.7, abs=0.005)
    run = lit_prune("evaluate", "--model", model_directory, "--text", text, *QUICK)
    assert run.status == 0
    assert "prefill" not in run.out


def test_dtypes_that_cannot_be_compared_are_refused_before_anything_is_measured(
    lit_prune, model_directory, text, folder, tmp_path
):
    half = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    words = ["evaluate", "--model", folder / "pruned", "--against", tmp_path, "--text", text]
    run = lit_prune(*words)
    assert run.status == 2
    assert "--dtype float32" in run.err
    assert lit_prune(*words, *QUICK).status == 0


def test_export_writes_another_format(lit_prune, folder):
    run = lit_prune(
        "export", "--model", folder / "pruned", "--to", folder / "padded", "--format", "padded",
        *UNVERIFIED,
    )  # fmt: skip
    assert (run.status, run.err) == (0, "")
    assert "model.safetensors" in run.out
    config = json.loads((folder / "padded" / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_compare_lays_methods_side_by_side(lit_prune, model_directory, text, folder):
    run = lit_prune(
        *("compare", "--model", model_directory, "--text", text, "--to", folder / "compared"),
        *("--presets", "flap", "random", "shortgpt", "--max_calibration_tokens", "2048"),
    )
    assert (run.status, run.err) == (0, "")
    found = json.loads((folder / "compared" / "compare.json").read_text())["presets"]
    by_name = {row["preset"]: row for row in found}
    assert by_name["flap"]["perplexity"] > 0
    assert "cannot be reached" in by_name["shortgpt"]["note"]


def test_options_stand_in_a_file_and_overwrite_replaces(lit_prune, model_directory, text, folder):
    words = [
        "--model",
        model_directory,
        "--text",
        text,
        "--to",
        folder / "flap",
        *CALIBRATED,
        *UNVERIFIED,
    ]
    run = lit_prune(
        "prune", *words, "--preset", "flap", "--target_parameters", "0.27M", "--print_config"
    )
    assert run.status == 0
    whole = yaml.safe_load(run.out)
    assert (whole["preset"], whole["target_parameters"]) == ("flap", "0.27M")
    whole["target_parameters"] = "0.28M"
    file = folder / "request.yaml"
    file.write_text(yaml.safe_dump(whole))
    assert lit_prune("prune", "--config", file).status == 0
    report = load_pruned(folder / "flap").pruning_record.report
    assert report.row("total_parameters").after <= 280_000
    assert report.target["name"] == "target_parameters"
    assert lit_prune("prune", "--config", file).status == 1
    assert lit_prune("prune", "--config", file, "--overwrite", "--seed", "1").status == 0
