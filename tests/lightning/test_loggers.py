"""What a run shows and leaves behind, with every logger or none."""

import csv
import json

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_prune import PruningPlan, PruningReport
from lit_prune.calibration import Calibration
from lit_prune.views.hparams import METRICS
from lit_prune.views.tensorboard import ENTROPIES, IMAGES, RATIOS, TEXTS
from tests.lightning.modules import LM, fit, hooks, loader, pruner, said, trainer


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    found.Reload()
    return found


# What a preset does not measure has no picture.
ABSENT = {"conditional": "prune/transfer_entropy", "paper": "prune/damage_curves"}


@pytest.mark.event("Neighbours", "`TensorBoardLogger`", "scalars, pictures, table and plan")
@pytest.mark.parametrize("preset", ABSENT)
def test_tensorboard_has_every_documented_tag(tmp_path, preset):
    callback, logger = pruner(preset=preset), TensorBoardLogger(tmp_path)
    one = fit(tmp_path, LM(), callback, logger=logger, max_epochs=2, log_every_n_steps=1)
    found = events(logger.log_dir)
    tags = found.Tags()
    rows = {row.key: row.unit in ("nats", "perplexity") for row in callback.report_.rows}
    assert {"mean_nll", "perplexity", "decoder_parameters", "flops_per_token"} <= set(rows)
    wanted = {
        f"quality/{key}/{side}"
        for key, quality in rows.items()
        for side in ("before", "after", "ratio")
        if quality
    }
    shown = {key for key in rows if f"cost/{key}/ratio" in METRICS}
    costs = {f"cost/{key}/{side}" for key in shown for side in ("before", "after", "ratio")}
    assert set(tags["scalars"]) >= {*RATIOS, *ENTROPIES, *wanted}
    assert {tag for tag in tags["scalars"] if tag.startswith("cost/")} == costs
    assert set(tags["images"]) == {*IMAGES} - {ABSENT[preset]}
    assert {tag.removesuffix("/text_summary") for tag in tags["tensors"]} >= set(TEXTS)
    [achieved] = found.Scalars("prune/achieved_ratio")
    assert achieved.value == pytest.approx(callback.report_.achieved_ratio, abs=1e-6)
    assert achieved.step == one.global_step == 2
    assert [e.step for e in found.Scalars("prune/entropy/channel/mean")] == [1, 2]


def test_tensorboard_after_validate(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callback = pruner(when="validate")
    trainer(tmp_path, callback, logger=logger).validate(LM(), loader(), verbose=False)
    tags = events(logger.log_dir).Tags()
    assert set(tags["scalars"]) >= {*RATIOS, *ENTROPIES}
    assert set(tags["images"]) == {*IMAGES} - {ABSENT["conditional"]}


@pytest.mark.event("Neighbours", "another logger (`CSVLogger`)", "gets the scalars")
def test_csv_logger_has_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, LM(), pruner(), logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {key for row in rows for key, value in row.items() if value} >= {*RATIOS, *ENTROPIES}


def test_artifacts_of_a_run_are_read_back(tmp_path):
    callback, logger = pruner(), CSVLogger(tmp_path)
    fit(tmp_path, LM(), callback, logger=logger, log_every_n_steps=1)
    folder = tmp_path / "lightning_logs" / "version_0" / "pruning"
    assert PruningPlan.from_json((folder / "plan.json").read_text()) == callback.plan_
    assert PruningReport.from_json((folder / "report.json").read_text()) == callback.report_
    assert json.loads((folder / "report.json").read_text())["config"]["pruning_ratio"] == 0.3
    loaded = Calibration.load(folder / "calibration.safetensors")
    assert loaded.data_digest == callback.calibration_.data_digest
    assert loaded.model_fingerprint == callback.plan_.model_fingerprint


class Broken(Logger):
    name, version = "broken", 0

    def log_metrics(self, metrics, step=None):
        if any(tag.startswith("prune/") for tag in metrics):
            raise OSError("disk full")

    def log_hyperparams(self, params):
        pass


@pytest.mark.event("Neighbours", "a logger that fails", "a warning; the model is pruned")
def test_logger_that_fails_does_not_cost_the_pruned_model(tmp_path, caplog):
    callback, module = pruner(), LM()
    fit(tmp_path, module, callback, logger=[Broken(), CSVLogger(tmp_path)], log_every_n_steps=1)
    assert module.lm.pruning_record.report is callback.report_
    assert "Broken could not record the pruning" in caplog.text


def test_run_says_in_one_line_what_was_removed(tmp_path):
    callback, module = pruner(), LM()
    with said() as text:
        fit(tmp_path, module, callback)
    lines = [line for line in text.getvalue().splitlines() if line.startswith("lit_prune: ")]
    assert lines == [f"lit_prune: {callback.report_.headline()}"]
    assert hooks(module) == 0
