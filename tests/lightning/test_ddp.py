"""F35, F36: two gloo processes train and prune together; one launch runs all (`two_ranks.py`)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_prune import PruningPlan, load_pruned
from tests.lightning.modules import pruner, trainer
from tests.lightning.two_ranks import ROADS, dense, run

pytestmark = pytest.mark.ddp
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes have left what they saw."""
    where = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = []
    for rank in (0, 1):
        env = {**os.environ, **names, "NODE_RANK": "0", "LOCAL_RANK": str(rank), "PYTHONPATH": path}
        with (where / f"{rank}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.lightning.two_ranks", str(where)]
            processes.append(
                subprocess.Popen(
                    command, cwd=TESTS.parent, env=env, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        codes = [process.wait(timeout=590) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n\n".join(
        (where / f"{rank}.log").read_text()[-5000:] for rank in (0, 1)
    )
    return where


@pytest.fixture(scope="module")
def ranks(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def of(ranks, scenario):
    return [found[scenario] for found in ranks]


def alone(folder, options, stage):
    """The same on one process."""
    when = "fit_end" if stage == "fit" else stage
    small = {"search_tokens": 400, "replay_batch_tokens": 128}
    callback = pruner(**{"when": when, **small, **options})
    run(trainer(folder, callback), dense(), stage)
    return callback


@pytest.mark.event(
    "Several processes",
    '`strategy="ddp"`, two processes',
    "share text and replay; the same plan as one process",
)
@pytest.mark.parametrize(("number", "road"), list(enumerate(ROADS)), ids=str)
def test_law_5_two_processes_give_the_plan_of_one(ranks, tmp_path, number, road):
    first, second = (found[number] for found in of(ranks, "roads"))
    one = alone(tmp_path, *road)
    assert {first["plan"], second["plan"]} == {one.plan_.digest}
    assert first["state"] == second["state"]
    assert first["report"] == second["report"]
    assert first["calibration"] == second["calibration"]
    # the odd sample that DistributedSampler repeats counts once; what two processes observed in
    # the loop is measured again
    assert first["calibration"] == one.report_.calibration | {"statistics_from": "replay"}
    for row in one.report_.rows:
        if row.unit != "seconds" and row.key != "peak_forward_bytes":
            # sums in another order, then a solver of an ill-conditioned covariance
            assert first["report"][row.key] == pytest.approx([row.before, row.after], rel=1e-6)
    assert set(one.report_.warnings) == set(first["warnings"])


@pytest.mark.event(
    "Several processes",
    "a rank whose validation loader is empty",
    "the same plan (where DDP itself can: see above)",
)
@pytest.mark.parametrize("scenario", ["empty_rank", "empty_rank_validate"])
def test_f35_rank_without_a_batch(ranks, tmp_path, scenario):
    first, second = of(ranks, scenario)
    stage = "validate" if scenario.endswith("validate") else "fit"
    assert first["plan"] == second["plan"] == of(ranks, "roads")[0][0]["plan"]
    assert first["state"] == second["state"]
    if stage == "fit":
        assert [first["validations"] > 0, second["validations"]] == [True, 0]


@pytest.mark.event("Several processes", "`max_calibration_tokens`", "holds for all ranks together")
def test_f35_cap_holds_for_all_ranks_together(ranks):
    first, second = of(ranks, "capped")
    assert first == second
    assert 400 <= first["tokens"] < 424
    assert any("max_calibration_tokens" in text for text in first["warnings"])


@pytest.mark.event(
    "Several processes", "an error on one rank", "all ranks end with it, models as they were"
)
@pytest.mark.parametrize(
    ("scenario", "kinds", "words"),
    [
        ("bad_sample", ["CalibrationError"] * 2, "200 tokens a sample"),
        ("poisoned", ["CalibrationError"] * 2, "down_proj are not finite"),
        ("too_little", ["CalibrationError"] * 2, "expected at least 10000"),
        ("nothing_to_validate", ["CalibrationError"] * 2, "0 batches"),
        ("surgery_on_1", ["RankError", "ZeroDivisionError"], "a cosmic ray"),
        ("planning_on_0", ["ZeroDivisionError", "RankError"], "a cosmic ray"),
        ("measuring_on_0", ["ZeroDivisionError", "RankError"], "a cosmic ray"),
        ("replay_on_1", ["RankError", "ZeroDivisionError"], "a cosmic ray"),
        ("other_cut_on_1", ["RankError"] * 2, "pruned models differ"),
        ("unwritable", ["ArtifactError"] * 2, "is no directory"),
    ],
)
def test_f35_error_on_one_rank_ends_all_with_it(ranks, scenario, kinds, words):
    found = of(ranks, scenario)
    assert [each["error"][0] for each in found] == kinds
    for rank, each in enumerate(found):
        assert words in each["error"][1]
        assert each["same"], rank
        assert not each["pruned"]
        assert each["hooks"] <= of(ranks, "plain")[rank]["hooks"]


@pytest.mark.parametrize(
    ("scenario", "failed"), [("bad_sample", 1), ("poisoned", 1), ("planning_on_0", 0)]
)
def test_f35_other_ranks_name_the_rank_that_failed(ranks, scenario, failed):
    found = of(ranks, scenario)
    assert f"rank {failed} failed, so all ranks stop: " in found[1 - failed]["error"][1]
    assert "ranks stop" not in found[failed]["error"][1]


@pytest.mark.event("Several processes", "ranks with different weights", "refused on all")
def test_f36_parameters_that_differ_before_are_refused(ranks):
    for found in of(ranks, "drifted"):
        assert found["error"][0] == "RankError"
        assert "parameters of the model differ" in found["error"][1]
        assert found["widths"] == [48] * 4
        assert not found["pruned"]


@pytest.mark.event("Several processes", "loggers and files", "once, by rank 0")
def test_metrics_and_files_once(ranks, folder):
    assert of(ranks, "logged")[0]["plan"] == of(ranks, "logged")[1]["plan"]
    assert len(list((folder / "logged" / "tb").rglob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(folder / "logged" / "tb" / "version_0")).Reload()
    ours = [tag for tag in events.Tags()["scalars"] if tag.startswith(("prune/", "cost/"))]
    assert ours
    assert {tag: len(events.Scalars(tag)) for tag in ours} == dict.fromkeys(ours, 1)
    plan = PruningPlan.load(folder / "logged" / "tb" / "version_0" / "pruning" / "plan.json")
    assert plan.digest == of(ranks, "logged")[0]["plan"]


@pytest.mark.event(
    "Several processes",
    "`fit` again on two processes",
    "every parameter is trained; ranks stay identical",
)
def test_recovery_trains_all_and_ranks_stay_identical(ranks, folder):
    first, second = of(ranks, "recovery")
    assert first["still"] == second["still"] == []
    assert first["state"] == second["state"]
    assert second["saved"] == []
    assert load_pruned(folder / "recovery" / "saved").pruning_record.plan.digest == first["plan"]


def test_dry_run_and_rehearsal_cut_nothing(ranks):
    for found in of(ranks, "dry"):
        assert found["dense"]
        assert found["plan"] == of(ranks, "roads")[0][0]["plan"]
    assert all("dense" in found for found in of(ranks, "rehearsal"))


def test_latency_budget_is_measured_once(ranks):
    first, second = of(ranks, "latency_budget")
    assert first == second


@pytest.mark.event(
    "Schedules", '`when="epoch_end"` on two processes', "the same; DDP is wrapped anew"
)
def test_stages_between_epochs(ranks):
    found = of(ranks, "staged")
    assert found[0]["state"] == found[1]["state"]
    for each in found:
        assert each["stages"] == pytest.approx([0.15, 0.3], abs=0.005)
        assert each["moved"]
        assert each["losses"][-1] < each["losses"][0]


@pytest.mark.event(
    "Several processes",
    '`weights="best"`, and `pruned.ckpt` resumed',
    "all ranks prune and resume the same",
)
def test_best_weights_are_pruned_and_what_was_pruned_resumes(ranks):
    found = of(ranks, "best")
    assert found[0]["state"] == found[1]["state"]
    assert found[0]["state_again"] == found[1]["state_again"]
    assert any("the best weights were pruned" in words for words in found[0]["warnings"])
    for each in found:
        assert each["resumed"] == each["pruned"]
        assert not each["again"]


@pytest.mark.event(
    "Several processes",
    "sharded parameters (FSDP2 by `ModelParallelStrategy`; FSDP and DeepSpeed were not run)",
    "a whole copy is pruned on rank 0 and can be saved; the module stays dense; the plan is "
    "applied in `configure_model` before `fully_shard`, and the recovery trains",
)
def test_f33_of_a_sharded_model_a_whole_copy_is_pruned(ranks, folder):
    one = alone(folder / "one", {"search_tokens": 8192, "replay_batch_tokens": 8192}, "fit")
    first, second = of(ranks, "sharded")
    assert {x["plan"] for x in (first, second, *of(ranks, "sharded_validate"))} == {
        one.plan_.digest
    }
    assert first["dense"] == first["first"]
    assert any("the module stays dense" in words for words in first["warnings"])
    loaded = load_pruned(folder / "sharded" / "saved")
    assert first["recovered"] == sum(p.numel() for p in loaded.parameters())
    for each in (first, second):
        assert each["losses"][-1] < each["losses"][0]
