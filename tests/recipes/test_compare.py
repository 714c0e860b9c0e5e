"""The harness runs, resumes, refuses to mix conditions, and its statistics are right."""

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import compare
import harness as harness_module
import tables
import texts
from cells import Found
from harness import Harness, parse_method

from lit_prune.surgery import weights_digest

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["flap", "shortgpt", "flap:allocator=uniform,compensation=least_squares"]
TEXT = (
    *("--train", *sorted((ROOT / "lit_prune" / "methods").glob("*.py"))),
    *("--test", *sorted((ROOT / "lit_prune" / "metrics").glob("*.py"))),
    *("--other", ROOT / "CHANGELOG.md"),
)
COSTS = (
    *("flops_per_token", "kv_cache_bytes_per_token", "decoder_parameters", "peak_forward_bytes"),
    *("prefill_seconds", "decode_seconds_per_token", "prefill_speed_up", "decode_speed_up"),
)
SMALL = ("--ratios", 0.3, 0.5, "--rows", 12, "--context", 32, "--score-tokens", 2000, *TEXT)


@pytest.fixture(scope="module")
def ran(run_recipe, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    arguments = ("--model", tiny_checkpoint, *SMALL, "--out", folder / "found.json")
    stdout = run_recipe("compare.py", *arguments, "--methods", *METHODS, cwd=folder)
    return folder, arguments, stdout


def test_every_cell_is_in_the_tables_the_csv_and_the_figure(ran):
    folder, _, stdout = ran
    stored = json.loads((folder / "found.json").read_text())
    cells = stored["cells"]
    uniform = METHODS[2]
    assert set(cells) == {
        "dense",
        *(f"{m}|{r}|0" for m in (METHODS[0], uniform) for r in ("0.3", "0.5")),
        *("shortgpt|0.25|0", "shortgpt|0.5|0", "flap|0.25|0"),
    }
    rows = [line for line in stdout.splitlines() if line.startswith("| `")]
    names = [row.split("`")[1] for row in rows]
    perplexities = ["flap", "flap", "shortgpt"]  # others, flap at the ratio of shortgpt too
    assert names == [*[uniform, *perplexities] * 2, *METHODS]
    with (folder / "found.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == sum("nll" in cell for cell in cells.values())
    for row in found:
        assert abs(float(row["achieved"]) - float(row["ratio"])) <= 0.005
        dense = next(float(x["mean_nll"]) for x in found if x["method"] == "dense")
        assert float(row["excess"]) == pytest.approx(float(row["mean_nll"]) - dense, abs=1e-9)
        assert float(row["excess_low"]) <= float(row["excess_high"])
        assert float(row["other_perplexity"]) > 1
        assert all(float(row[name]) > 0 for name in COSTS)
    assert (folder / "found.png").stat().st_size > 5000
    assert "better" in stdout or "worse" in stdout or "no difference" in stdout
    assert {(row["method"], row["text"]) for row in stored["summary"]} == {
        (method, text) for method in METHODS for text in ("main", "other")
    }


def test_a_depth_only_method_stands_at_the_ratio_it_reaches_beside_the_first_one(ran):
    folder, _, stdout = ran
    assert json.loads((folder / "found.json").read_text())["moved"] == {"shortgpt|0.3": 0.25}
    assert re.search(r"\| `shortgpt` \| [\d.]+[†‡]? @25.0% \| [\d.]+[†‡]? \|", stdout)
    assert re.search(r"\| `flap`, where others stand \| [\d.]+ @25.0% \|", stdout)
    pairs = [line for line in stdout.splitlines() if "ratio that it reaches, `shortgpt`" in line]
    assert [line.split(":")[0] for line in pairs] == ["- 25.0%"]


@pytest.mark.slow
def test_a_stored_file_is_shown_without_running(ran, run_recipe, tmp_path):
    folder, _, stdout = ran
    arguments = ("--model", tmp_path / "no such model", "--out", folder / "found.json")
    shown = run_recipe("compare.py", *arguments, "--table-only", cwd=tmp_path)
    assert stdout.endswith(shown)


@pytest.mark.slow
def test_text_of_a_trained_model_is_its_own(run_recipe, tiny_checkpoint, tmp_path):
    files = {split: [] for split in ("train", "choose", "score")}
    for split, found in files.items():
        for number in range(3):
            file = tmp_path / f"{split}{number}.txt"
            file.write_text(f"{split} {number} " * 300)
            found.append(str(file))
    record = {"corpus": {split: {"files": found} for split, found in files.items()}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    out = tmp_path / "found.json"
    small = ("--rows", 12, "--context", 32, "--score-tokens", 900, "--other-tokens", 0)
    arguments = ("--model", tiny_checkpoint, "--text-of", tmp_path, *small, "--out", out)
    run_recipe("compare.py", *arguments, "--methods", "flap", "--ratios", 0.5, cwd=tmp_path)
    conditions = json.loads(out.read_text())["conditions"]
    assert conditions["calibrated_on"] == f"training files of {tmp_path.name}"
    assert conditions["scored"]["text"] == f"score files of {tmp_path.name}"
    assert conditions["other"] is None


@pytest.mark.parametrize(
    ("cell", "shown"), [({"not_reached": "no such width"}, "×"), ({"error": "a bug"}, "failed")]
)
def test_what_was_run_in_vain_is_not_shown_as_not_run(ran, run_recipe, tmp_path, cell, shown):
    stored = json.loads((ran[0] / "found.json").read_text())
    stored["cells"]["flap|0.5|0"] = cell
    del stored["cells"]["shortgpt|0.5|0"]
    (tmp_path / "again.json").write_text(json.dumps(stored))
    stdout = run_recipe(
        "compare.py",
        *("--out", tmp_path / "again.json", "--table-only", "--methods", *METHODS),
        cwd=tmp_path,
    )
    assert re.search(rf"\| `flap` \| [\d.]+ \| {shown} \|", stdout)
    assert re.search(r"\| `shortgpt` \| .* \| – \|", stdout)
    assert f"- `flap` at 50%: {next(iter(cell.values()))}" in stdout


@pytest.mark.slow
def test_a_finished_run_is_not_run_again_and_other_conditions_are_refused(ran, run_recipe):
    folder, arguments, _ = ran
    before = json.loads((folder / "found.json").read_text())["cells"]
    stdout = run_recipe("compare.py", *arguments, "--methods", *METHODS, cwd=folder)
    assert "seed 0:" not in stdout
    assert json.loads((folder / "found.json").read_text())["cells"] == before
    with pytest.raises(AssertionError, match="other conditions"):
        run_recipe("compare.py", *arguments, "--rows", 8, "--methods", "flap", cwd=folder)
    elsewhere = (*arguments[:-1], folder / "elsewhere.json", "--also", folder / "found.json")
    stdout = run_recipe("compare.py", *elsewhere, "--methods", *METHODS, cwd=folder)
    assert "seed 0:" not in stdout
    assert json.loads((folder / "elsewhere.json").read_text())["cells"] == before


def test_cells_of_another_run_are_taken_over_unless_they_are_of_other_conditions(tmp_path):
    one, other = ({"flap|0.3|0": {"nll": [1.0]}}, {"flap|0.3|0": {"nll": [2.0]}, "owl|0.3|0": {}})
    Found({"model": "m"}, {}, {"sleb|0.3": 0.25}, other).store(tmp_path / "other.json")
    found = Found({"model": "m"}, {"methods": ["flap"]}, {}, one)
    found.take(tmp_path / "other.json")
    assert found.cells == {**other, **one}  # what is here already stays
    assert found.moved == {"sleb|0.3": 0.25}
    assert found.asked == {"methods": ["flap"]}
    with pytest.raises(SystemExit, match="other conditions"):
        Found({"model": "n"}, {}).take(tmp_path / "other.json")


def test_cells_know_the_weights_and_the_text_that_they_are_of(ran, tiny_checkpoint):
    conditions = json.loads((ran[0] / "found.json").read_text())["conditions"]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    assert conditions["weights"] == weights_digest(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert conditions["weights"] != weights_digest(model)
    window = torch.arange(6)
    assert texts.digest_of([window]) != texts.digest_of([window + 1])
    assert conditions["calibration_digest"] != conditions["scored"]["digest"]


def test_the_interval_is_paired():
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 200, size=60).tolist()
    hard = rng.normal(0, 50, size=60)  # documents differ far more than methods do
    one = {"nll": (4.0 * np.array(tokens) + hard).tolist(), "tokens": tokens}
    other = {"nll": (4.1 * np.array(tokens) + hard).tolist(), "tokens": tokens}
    low, high = tables.interval([one], [other])
    assert low == pytest.approx(-0.1)
    assert high == pytest.approx(-0.1)
    assert tables.interval([one], [one]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("flap", ("flap", {})),
        (
            "paper:num_clusters=4,cap_clusters=false",
            ("paper", {"num_clusters": 4, "cap_clusters": False}),
        ),
        ("x:granularities=kv_group+channel", ("x", {"granularities": ["kv_group", "channel"]})),
        ("x:granularities=block,damping=0.1", ("x", {"granularities": ["block"], "damping": 0.1})),
    ],
)  # fmt: skip
def test_methods_are_read_from_text(text, wanted):
    assert parse_method(text) == wanted


def test_few_documents_are_drawn_in_stretches_or_windows():
    tokenizer = SimpleNamespace(encode=lambda text, **_: list(text.encode()))

    def cut(*lengths):
        text = Dataset.from_dict({"text": ["a" * length for length in lengths]})
        return texts.scored_windows("text", text, tokenizer, 512, 10**6)

    few = cut(41_000, 100)
    assert [len(window) for window in few.windows] == [512] * 80  # tails of 40 and 100 are short
    assert few.owner == [window // 4 for window in range(80)]
    assert cut(5000, 100).owner == list(range(10))
    assert len(set(cut(*[5000] * 20).owner)) == 20


def test_a_large_corpus_is_shortened_in_every_document():
    text = Dataset.from_dict({"path": ["a", "b"], "text": ["abcd" * 100, "efgh" * 300]})
    kept = texts.shortened(text, 160)["text"][:]
    assert [len(document) for document in kept] == [40, 120]
    assert kept[0] in "abcd" * 100
    assert texts.shortened(text)["text"][:] == text["text"][:]


def test_what_is_measured_is_shared_by_methods_that_need_the_same(
    tiny_checkpoint, tmp_path, monkeypatch
):
    words = ("--model", tiny_checkpoint, *SMALL, "--rows", 24, "--out", tmp_path / "none.json")
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    harness = Harness(compare.parse_arguments("", ["flap_ls"], "score", "none.json"))
    measured = []
    real = harness_module.calibrate

    def counted(model, rows, config, **options):
        measured.append((config.preset, config.seed))
        return real(model, rows, config, **options)

    monkeypatch.setattr(harness_module, "calibrate", counted)
    for method, ratio, seed in (
        ("flap_ls", 0.3, 0), ("flap_ls", 0.5, 0), ("flap", 0.5, 0), ("wanda_ls", 0.5, 0),
        ("wanda_ls:damping=0.1", 0.5, 0), ("flap_ls", 0.3, 1),
    ):  # fmt: skip
        harness.calibrated(harness.config(method, ratio, seed))
    assert measured == [("flap_ls", 0), ("flap", 0), ("wanda_ls", 0), ("flap_ls", 1)]


@pytest.mark.slow
def test_every_variant_of_the_ablation_runs(run_recipe, tiny_checkpoint, tmp_path):
    arguments = ("--model", tiny_checkpoint, *SMALL, "--ratios", 0.5, "--out", tmp_path / "a.json")
    stdout = run_recipe("ablation.py", *arguments, cwd=tmp_path)
    cells = json.loads((tmp_path / "a.json").read_text())["cells"]
    assert not [cell for cell in cells.values() if "error" in cell]
    assert len(set(re.findall(r"^\| `(.+?)`", stdout, re.MULTILINE))) == len(cells) - 1
