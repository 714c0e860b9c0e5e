"""`make demo`, small: everything that it promises is there afterwards."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_prune import load_pruned
from tests.recipes.conftest import ROOT, SHIPPED

sys.path.insert(0, str(ROOT / "recipes"))

from demo import before_after


@pytest.fixture(scope="module")
def demo(run_recipe, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    arguments = ("--checkpoint", tiny_checkpoint, "--steps", 4, "--output", folder)
    return run_recipe("demo.py", *arguments, cwd=folder.parent), folder


def losses(stdout):
    return [float(loss) for loss in re.findall(r"validation loss ([0-9.]+)", stdout)]


def test_prints_losses_table_and_text(demo):
    stdout, _ = demo
    assert len(losses(stdout)) == 3
    for words in ("parameters in decoder layers", "as shipped", "pruned, reloaded", "--logdir"):
        assert words in stdout


def test_of_long_numbers_in_a_narrow_terminal_none_is_cut_off():
    rows = [
        ("parameters in decoder layers", "4.06 M", "2.84 M", "0.701", ""),
        ("prefill, batch 8", "100.03 ktok/s", "100.83 ktok/s", "10.266", "inside the spread"),
    ]
    screen = io.StringIO()
    Console(file=screen, width=80).print(before_after(SimpleNamespace(table=lambda: rows)))
    printed = screen.getvalue()
    for word in (word for row in rows for cell in row for word in cell.split()):
        assert word in printed
    assert "…" not in printed


def test_saved_model_loads(demo):
    _, folder = demo
    report = load_pruned(folder / "pruned").pruning_record.report
    assert report.achieved_ratio == pytest.approx(0.3, abs=0.005)


def test_run_is_in_tensorboard(demo):
    _, folder = demo
    events = EventAccumulator(str(folder / "version_0"))
    events.Reload()
    assert {"validation/loss", "prune/achieved_ratio"} <= set(events.Tags()["scalars"])
    assert "prune/damage_curves" in events.Tags()["images"]


@pytest.mark.slow
def test_a_second_run_replaces_the_saved_model(demo, run_recipe, tiny_checkpoint, tmp_path):
    _, folder = demo
    first = load_pruned(folder / "pruned").pruning_record.plan.digest
    arguments = ("--checkpoint", tiny_checkpoint, "--steps", 2, "--ratio", 0.5, "--output", folder)
    run_recipe("demo.py", *arguments, cwd=tmp_path)
    assert load_pruned(folder / "pruned").pruning_record.plan.digest != first


@pytest.mark.slow
def test_shipped_model_learns_from_fine_tuning(run_recipe, tmp_path):
    stdout = run_recipe("demo.py", "--steps", 40, "--output", tmp_path / "demo", cwd=tmp_path)
    assert SHIPPED.exists()
    before, _, after = losses(stdout)
    assert after < before - 0.2
