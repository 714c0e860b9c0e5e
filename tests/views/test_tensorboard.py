"""What lands in a logger: event files written by Lightning's loggers and read back."""

import io
import json
import logging
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lit_prune.plan import PruningPlan
from lit_prune.views import log_report, log_request, log_unit_entropy, tensorboard
from lit_prune.views.hparams import METRICS
from tests.views.conftest import is_drawn, row


def read(logger):
    logger.finalize("success")
    events = EventAccumulator(
        logger.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0}
    )
    return events.Reload()


def text_of(events, tag):
    return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def images_of(events):
    whole = {tag: events.Images(tag)[0].encoded_image_string for tag in events.Tags()["images"]}
    return {
        tag: np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")) for tag, raw in whole.items()
    }


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# What only asks about scalars, texts or hparams draws two pictures instead of five.
FEW = {"entropies": {}, "transfer": {}, "damage": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def written(unchanged_views, folder):
    logger = TensorBoardLogger(folder)
    log_unit_entropy([logger], unchanged_views.entropies, step=3)
    log_report([logger], **unchanged_views.inputs(), step=7)
    return read(logger)


def test_every_documented_scalar_is_there_and_right(written, views):
    expected = {
        "prune/requested_ratio": 0.3,
        "prune/achieved_ratio": 0.302,
        "prune/total_ratio": 0.2,
        "cost/total_parameters/ratio": 0.8,
        "cost/prefill_seconds/ratio": 1.05,
        "quality/perplexity/before": 10,
        "quality/perplexity/after": 31,
        "quality/mean_nll/ratio": 3.434 / 2.302,
    }
    for tag, value in expected.items():
        (event,) = written.Scalars(tag)
        assert event.step == 7
        assert event.value == pytest.approx(value, rel=1e-6)  # event files hold float32
    values = torch.cat([v for (_, kind), v in views.entropies.items() if kind == "mlp"])
    (mean,) = written.Scalars("prune/entropy/channel/mean")
    assert (mean.step, mean.value) == (3, pytest.approx(float(values.mean()), rel=1e-6))
    (least,) = written.Scalars("prune/entropy/kv_group/min")
    groups = torch.cat([v for (_, kind), v in views.entropies.items() if kind == "attention"])
    assert least.value == pytest.approx(float(groups.min()), rel=1e-6)


def test_the_tags_are_those_of_the_table_and_no_others(written):
    scalars = set(written.Tags()["scalars"])
    assert set(tensorboard.RATIOS) | set(tensorboard.ENTROPIES) <= scalars
    rest = scalars - set(tensorboard.RATIOS) - set(tensorboard.ENTROPIES)
    costs = {tag for tag in rest if tag.startswith("cost/")}
    sides = ("before", "after", "ratio")
    few = ("total_parameters", "prefill_seconds")  # no tokens per second beside the seconds
    assert costs == {f"cost/{key}/{side}" for key in few for side in sides}
    assert rest - costs == {f"quality/{k}/{s}" for k in ("perplexity", "mean_nll") for s in sides}
    assert set(written.Tags()["images"]) == set(tensorboard.IMAGES)
    texts = {tag for tag in written.Tags()["tensors"] if tag.endswith("/text_summary")}
    assert texts == {f"{tag}/text_summary" for tag in tensorboard.TEXTS}
    table = tensorboard.__doc__.replace("{mean,min}", "mean")
    for tag in (*tensorboard.RATIOS, *tensorboard.IMAGES, *tensorboard.TEXTS):
        assert f"| ``{tag}`` |" in table
    for tag in tensorboard.ENTROPIES[::2]:
        assert f"| ``{tag}`` |" in table


def test_images_decode_are_not_blank_and_change_with_the_plan(written, views, tmp_path, caplog):
    first = images_of(written)
    for tag, image in first.items():
        assert is_drawn(image), tag
    other = views.planned({0: ((1,), tuple(range(8))), 1: ((0, 1), ())})
    views.report = replace(views.report, plan_digest=other.digest)
    logger = TensorBoardLogger(tmp_path / "other")
    log_report([logger], **views.inputs(plan=other), step=7)
    assert not warnings_in(caplog)
    for tag, image in images_of(read(logger)).items():
        assert not np.array_equal(image, first[tag]), tag


def test_texts_hold_the_table_and_the_whole_plan(written, views):
    assert text_of(written, "before_after/table") == views.report.to_markdown()
    text = text_of(written, "plan/json").removeprefix("```json\n").removesuffix("\n```")
    assert PruningPlan.from_json(text) == views.plan
    assert json.loads(text)["digest"] == views.plan.digest
    assert text.count("\n") < 20  # one line for each layer, not for each unit


def test_hparams_are_in_the_run_itself(written, folder):
    plugin = written.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["prune/pruning_ratio"].number_value == 0.3
    assert start.hparams["prune/preset"].string_value == "conditional"
    assert (
        start.hparams["prune/granularities"].string_value
        == "block, sub_block, kv_group, channel, expert"
    )
    experiment = metadata.parse_experiment_plugin_data(plugin[metadata.EXPERIMENT_TAG])
    assert tuple(m.name.tag for m in experiment.metric_infos) == METRICS
    first = {info.name for info in experiment.hparam_infos if info.differs}
    assert first == {"prune/pruning_ratio", "prune/preset", "prune/budget"}
    runs = {path.parent for path in folder.rglob("events.out.tfevents*")}
    assert len(runs) == 1  # `add_hparams` would have opened a second one


def test_hparams_asked_for_in_setup_stand_beside_those_of_the_module(views, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    log_request([logger, CSVLogger(tmp_path), DummyLogger()], views.report.config, {"lr": 0.1})
    logger.log_hyperparams({"lr": 0.1})  # what Lightning does after `setup`
    log_report([logger], **views.inputs(**FEW), step=7)
    plugin = read(logger).PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["lr"].number_value == 0.1
    assert start.hparams["prune/pruning_ratio"].number_value == 0.3


def test_values_that_are_not_finite_are_left_out_with_a_notice(views, tmp_path, caplog):
    rows = (row("perplexity", "perplexity", 10.0, math.inf), row("mean_nll", "nats", math.nan, 2.0))
    views.report = replace(views.report, rows=rows)
    views.entropies[0, "mlp"][0] = math.nan
    logger = TensorBoardLogger(tmp_path)
    with caplog.at_level(logging.INFO):
        log_unit_entropy([logger], views.entropies, step=1)
        log_report([logger], **views.inputs(**FEW), step=7)
    assert not warnings_in(caplog)
    assert "quality/perplexity/after" in caplog.text
    events = read(logger)
    tags = events.Tags()["scalars"]
    assert all(math.isfinite(e.value) for tag in tags for e in events.Scalars(tag))
    assert "quality/perplexity/before" in tags
    assert "quality/perplexity/ratio" not in tags


def test_scores_that_were_not_measured_have_no_picture(views, tmp_path, caplog):
    logger = TensorBoardLogger(tmp_path)
    log_report([logger], **views.inputs(**FEW), step=7)
    assert set(read(logger).Tags()["images"]) == {"prune/kept", "before_after/picture"}
    assert not warnings_in(caplog)


def test_a_dry_run_is_shown(views, tmp_path, caplog):
    rows = tuple(replace(r, after=None) for r in views.report.rows)
    views.report = replace(views.report, rows=rows, dry_run=True)
    logger = TensorBoardLogger(tmp_path)
    log_report([logger], **views.inputs(**FEW), step=0)
    events = read(logger)
    assert not warnings_in(caplog)
    assert "quality/perplexity/before" in events.Tags()["scalars"]
    assert "quality/perplexity/after" not in events.Tags()["scalars"]


def test_f34_a_csv_logger_gets_the_scalars_and_one_notice(views, tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO):
        log_unit_entropy([logger], views.entropies, step=3)
        log_report([logger], **views.inputs(), step=7)
    logger.save()
    assert [r.getMessage() for r in caplog.records] == [
        "CSVLogger shows scalars only; pictures and texts need TensorBoard"
    ]
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "quality/perplexity/after" in text
    assert "prune/entropy/channel/mean" in text


class Plain:
    def __init__(self):
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics


def test_f34_a_logger_without_experiment_gets_the_scalars(views):
    logger = Plain()
    log_report([logger], **views.inputs(), step=7)
    assert logger.metrics["prune/achieved_ratio"] == 0.302
    sides = ("before", "after", "ratio")
    rows = ("total_parameters", "prefill_seconds", "decode_tokens_per_second")
    assert {f"cost/{key}/{side}" for key in rows for side in sides} <= set(logger.metrics)


def test_f34_no_logger_is_one_notice(views, caplog):
    with caplog.at_level(logging.INFO):
        log_report([], **views.inputs(), step=7)
        log_unit_entropy([], views.entropies, step=7)
    assert len(caplog.records) == 1


def test_f34_the_placeholder_of_a_fast_dev_run(views, caplog):
    log_report([DummyLogger()], **views.inputs(**FEW), step=7)
    log_unit_entropy([DummyLogger()], views.entropies, step=7)
    assert not warnings_in(caplog)


def test_f34_a_logger_that_fails_is_a_warning_and_the_others_go_on(views, caplog):
    class Broken(Plain):
        def log_metrics(self, metrics, step=None):
            raise OSError("disk full")

    good = Plain()
    log_report([Broken(), good], **views.inputs(), step=7)
    assert good.metrics
    assert warnings_in(caplog) == ["Broken could not record the pruning: OSError('disk full')"]


def test_f34_without_matplotlib_only_the_pictures_are_missing(views, tmp_path, caplog, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = TensorBoardLogger(tmp_path)
    with caplog.at_level(logging.INFO):
        log_report([logger], **views.inputs(), step=7)
    events = read(logger)
    assert events.Tags()["images"] == []
    assert "plan/json/text_summary" in events.Tags()["tensors"]
    assert "quality/perplexity/after" in events.Tags()["scalars"]
    assert not warnings_in(caplog)
    assert caplog.text.count("no pictures") == 1
