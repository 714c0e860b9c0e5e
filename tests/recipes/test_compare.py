"""The harness runs, resumes, refuses to mix conditions, and its statistics are right."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import compare

METHODS = ["flap", "shortgpt", "flap:allocator=uniform,compensation=least_squares"]
SMALL = ("--ratios", 0.3, 0.5, "--rows", 12, "--context", 32, "--score-tokens", 2000)


@pytest.fixture(scope="module")
def ran(run_recipe, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    arguments = ("--model", tiny_checkpoint, *SMALL, "--out", folder / "found.json")
    stdout = run_recipe("compare.py", *arguments, "--methods", *METHODS, cwd=folder)
    return folder, arguments, stdout


def test_every_cell_is_in_the_table_the_csv_and_the_figure(ran):
    folder, _, stdout = ran
    cells = json.loads((folder / "found.json").read_text())["cells"]
    assert set(cells) == {"dense"} | {f"{m}|{r}|0" for m in METHODS for r in ("0.3", "0.5")}
    rows = [line for line in stdout.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == METHODS
    with (folder / "found.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == sum("nll" in cell for cell in cells.values())
    for row in found:
        if row["method"] != "dense":
            assert abs(float(row["achieved"]) - float(row["ratio"])) <= 0.005
    assert (folder / "found.png").stat().st_size > 5000
    assert "better" in stdout or "worse" in stdout or "no difference" in stdout


def test_a_finished_run_is_not_run_again_and_other_conditions_are_refused(ran, run_recipe):
    folder, arguments, _ = ran
    before = json.loads((folder / "found.json").read_text())["cells"]
    stdout = run_recipe("compare.py", *arguments, "--methods", *METHODS, cwd=folder)
    assert "seed 0:" not in stdout
    assert json.loads((folder / "found.json").read_text())["cells"] == before
    with pytest.raises(AssertionError, match="other conditions"):
        run_recipe("compare.py", *arguments, "--rows", 8, "--methods", "flap", cwd=folder)


def test_the_interval_is_paired():
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 200, size=60).tolist()
    hard = rng.normal(0, 50, size=60)  # documents differ far more than methods do
    one = {"nll": (4.0 * np.array(tokens) + hard).tolist(), "tokens": tokens}
    other = {"nll": (4.1 * np.array(tokens) + hard).tolist(), "tokens": tokens}
    low, high = compare.interval([one], [other])
    assert low == pytest.approx(-0.1)
    assert high == pytest.approx(-0.1)
    assert compare.interval([one], [one]) == (0.0, 0.0)


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
    assert compare.parse_method(text) == wanted


@pytest.mark.slow
def test_every_variant_of_the_ablation_runs(run_recipe, tiny_checkpoint, tmp_path):
    arguments = ("--model", tiny_checkpoint, *SMALL, "--ratios", 0.5, "--out", tmp_path / "a.json")
    stdout = run_recipe("ablation.py", *arguments, cwd=tmp_path)
    cells = json.loads((tmp_path / "a.json").read_text())["cells"]
    assert not [cell for cell in cells.values() if "error" in cell]
    assert stdout.count("| `") == len(cells) - 1
