"""The checks of assumptions run, go on where they were, and their estimators are right."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import argparse as some_source
import inspect

import assumptions
import assumptions_shown

from lit_prune.allocation import make_budget
from lit_prune.config import PruningConfig
from lit_prune.decoder import all_kept, spec_for
from lit_prune.methods import preset
from tests.models import tiny_model

MEASURES = {"transfer_entropy", "kl", "nll", "frobenius"}


@pytest.fixture(scope="module")
def ran(run_recipe, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assumptions")
    lines = inspect.getsource(some_source).splitlines()
    files = {}
    for number, name in enumerate(("--train", "--test", "--source")):
        files[name] = folder / f"{name[2:]}.py"
        files[name].write_text("\n".join(lines[number * 700 : (number + 1) * 700]))
    arguments = (
        "--model", tiny_checkpoint, "--quick", "--rows", 24, "--context", 64, "--score-tokens", 500,
        "--out", folder / "found.json", *(part for pair in files.items() for part in pair),
    )  # fmt: skip
    return folder, arguments, run_recipe("assumptions.py", *arguments, cwd=folder)


@pytest.mark.slow
def test_every_question_is_answered(ran):
    folder, _, stdout = ran
    found = json.loads((folder / "found.json").read_text())
    assert len(found["gaussian"]) == 8
    for one in found["gaussian"]:
        assert -1 <= one["histogram"] <= 1
        low, median, high = one["excess_kurtosis"]
        assert low <= median <= high
    places = found["damage"]["sub_blocks"]
    assert len(places) == 8
    assert all(one["predicted"].keys() == MEASURES for one in places)
    groups = [one["group"] for one in found["damage"]["plans"]]
    assert [g for g in groups if g.startswith("chosen")] == [
        f"chosen at {n}%" for n in (10, 20, 30, 40, 50)
    ]
    assert groups.count("random") == groups.count("near the chosen") == 2
    cells = {key: value for key, value in found.items() if "|" in key}
    assert len(cells) == 2 * 2 * 2 * 2
    assert all(math.isfinite(value) for value in cells.values())
    assert stdout.count("| `") == 4
    assert (folder / "found.png").stat().st_size > 20_000


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_refuses_other_conditions(ran, run_recipe):
    folder, arguments, stdout = ran
    path = folder / "found.json"
    found = json.loads(path.read_text())
    gone = "paper|another source|8|0"
    path.write_text(json.dumps({key: value for key, value in found.items() if key != gone}))
    assert run_recipe("assumptions.py", *arguments, cwd=folder) == stdout
    again = json.loads(path.read_text())
    assert again[gone] == found[gone]
    assert again["damage"] == found["damage"]
    with pytest.raises(AssertionError, match="other conditions"):
        run_recipe("assumptions.py", *arguments, "--rows", 20, cwd=folder)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_histogram_entropy_of_known_distributions(scale):
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(0, scale, 40_000), rng.uniform(0, scale, 40_000)], 1)
    wanted = [0.5 * math.log(2 * math.pi * math.e * scale**2), math.log(scale)]
    assert assumptions.histogram_entropy(x) == pytest.approx(wanted, abs=0.02)


def test_predicted_damage_scales_a_curve_to_what_the_whole_sub_block_is_worth():
    leaves = torch.tensor([-1.0, 2, 0, 1])
    curve = torch.stack([leaves, torch.tensor([0.0, 1, 3, 4]), torch.tensor([0.0, 2, 6, 8])], 1)
    curves = {(0, "mlp"): curve, (1, "mlp"): 10 * curve}
    worth = {"kl": {(0, "mlp"): 0.5, (1, "mlp"): 2.0}, "nll": {(0, "mlp"): -1.0, (1, "mlp"): 1.0}}
    found = assumptions.predicted(curves, worth, {(0, "mlp"): 1, (1, "mlp"): 2})
    assert found["kl"] == pytest.approx(0.5 * 3 / 4 + 2.0 * 1 / 4)
    assert found["nll"] == pytest.approx(1 / 4)  # a gain by noise counts as nothing
    assert found["none"] == pytest.approx(3 + 10)
    whole = assumptions.predicted(curves, worth, {(0, "mlp"): 3, (1, "mlp"): 0})
    assert whole["kl"] == pytest.approx(2.0)


def test_drafts_meet_the_budget_and_differ():
    spec = spec_for(tiny_model(layers=4, intermediate_size=96))
    config = preset("conditional").resolve(PruningConfig(pruning_ratio=0.3))
    budget = make_budget(spec, config)
    found = assumptions.drafts(budget, all_kept(spec), 6)
    assert [group for group, _ in found] == ["near the chosen", "random"] * 3
    assert all(budget.met_by(counts) for _, counts in found)
    assert len({tuple(sorted(counts.items())) for _, counts in found}) == 6


def test_plans_of_other_ratios_do_not_enter_the_correlation():
    """Damage grows with the ratio: over several ratios every measure would look good."""

    def plan(group, predicted, measured):
        return {"group": group, "predicted": {"kl": predicted}, "measured": measured}

    plans = [plan("random", 1, 3), plan("random", 2, 2), plan("random", 3, 1)]
    plans += [plan(f"chosen at {n}0%", 10.0 * n, 10.0 * n) for n in range(1, 6)]
    found = assumptions_shown.correlations({"sub_blocks": plans[:3], "plans": plans})
    assert found["plans of one ratio"]["kl"] == pytest.approx(-1.0)
    assert found["of these, random"]["kl"] == pytest.approx(-1.0)
