"""The benchmark runs, prints its goals, and its arithmetic is right."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import benchmark


@pytest.mark.slow
def test_quick_benchmark_prints_every_ratio(run_recipe, tiny_checkpoint, tmp_path):
    file = tmp_path / "found.json"
    arguments = ("--quick", "--threads", 1, "--checkpoint", tiny_checkpoint, "--json", file)
    stdout = run_recipe("benchmark.py", *arguments, cwd=tmp_path)
    found = json.loads(file.read_text())
    assert found["surroundings"]["threads"] == 1
    names = [result["name"] for result in found["results"]]
    for part in ("validation", "bypass", "surgery", "peak RSS", "30% pruned", "50% pruned"):
        assert any(part in name for name in names), part
    assert all(result["ratio"] > 0 for result in found["results"])
    assert all(name in stdout for name in names)


@pytest.mark.parametrize(
    ("ratio", "goal", "verdict"),
    [(1.1, "<= 1.15", "met"), (1.2, "<= 1.15", "MISSED"), (0.8, ">= 0.85", "MISSED"), (9, "", "")],
)
def test_verdict(ratio, goal, verdict):
    assert benchmark.Result(name="", ratio=ratio, goal=goal, detail="").verdict == verdict


def test_functions_take_turns():
    calls = []
    benchmark.alternate(2, lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3


@pytest.mark.slow
def test_the_cost_of_the_default_preset_is_measured(run_recipe, tmp_path):
    stdout = run_recipe("benchmark_conditional.py", "--quick", cwd=tmp_path)
    found = dict(line.split(": ", 1) for line in stdout.splitlines() if ": " in line)
    for name in ("pruning / forward", "covariances / products", "peak rise / weights"):
        assert float(found[name]) > 0
