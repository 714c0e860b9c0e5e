"""Many budgets from one calibration."""

import pytest
import torch

from lit_prune import Calibration, prune, sweep
from lit_prune.decoder import quiet
from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.metrics import perplexity_of
from lit_prune.views import trade_off
from tests.models import tiny_model
from tests.state import state_digest

RATIOS = [0.1, 0.3, 0.5]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 64, (4, 24))} for _ in range(16)]
    options = {"pruning_ratio": 0.3, "preset": "conditional", "dry_run": True}
    made = prune(model, batches, latency_prompt_tokens=0, **options).calibration
    path = tmp_path_factory.mktemp("sweep") / "calibration.safetensors"
    made.save(path)
    return Calibration.load(path)


def count_forwards(model):
    seen = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen, handle


def test_it_plans_every_ratio_from_a_saved_calibration_without_a_forward(model, calibration):
    before = state_digest(model)
    seen, handle = count_forwards(model)
    points = sweep(model, calibration, RATIOS, preset="conditional")
    handle.remove()
    assert not seen
    assert state_digest(model) == before
    assert [point.requested for point in points] == RATIOS
    for point in points:
        assert abs(point.achieved - point.requested) <= 0.005
        assert point.mean_nll is None
    damages = [point.predicted_damage for point in points]
    assert damages == sorted(damages)
    assert damages[0] < damages[-1]


def test_measuring_reads_the_choose_side_of_the_masked_model(model, calibration):
    before = state_digest(model)
    seen, handle = count_forwards(model)
    (point,) = sweep(model, calibration, [0.3], preset="conditional", measured=True)
    handle.remove()
    assert seen
    assert point.mean_nll > 0
    assert state_digest(model) == before


def test_a_ratio_out_of_reach_is_a_note(model, calibration):
    options = {"preset": "conditional", "granularities": ("kv_group",)}
    near, far = sweep(model, calibration, [0.165, 0.9], **options)
    assert far.plan is None
    assert "cannot be reached" in far.note
    assert near.note or near.plan


def test_another_presets_calibration_is_refused(model, calibration):
    with pytest.raises(CalibrationError, match="taylor"):
        sweep(model, calibration, [0.3], preset="llm_pruner")


def test_the_picture_shows_prediction_and_measurement(model, calibration):
    points = sweep(model, calibration, RATIOS, preset="conditional", measured=True)
    axes = trade_off(points).axes[0]
    predicted, measured = axes.lines
    assert list(predicted.get_ydata()) == [point.predicted_damage for point in points]
    assert list(measured.get_ydata()) == [point.mean_nll - point.dense_nll for point in points]


def test_nothing_to_draw_is_said():
    with pytest.raises(ConfigError, match="measured=True"):
        trade_off(())


def test_what_was_measured_stands_beside_what_the_dense_model_has(model, calibration):
    with quiet(model):
        wanted = perplexity_of(model, calibration.rows.batches("choose", 8192)).mean_nll
    near, far = sweep(model, calibration, [0.2, 0.99], measured=True)
    assert near.dense_nll == far.dense_nll == pytest.approx(wanted)
    assert near.excess_nll == near.mean_nll - near.dense_nll
    assert far.excess_nll is None
    (unmeasured,) = sweep(model, calibration, [0.2])
    assert unmeasured.dense_nll is None


@pytest.mark.parametrize("ratios", [0.3, "0.3", None])
def test_one_ratio_is_no_sweep(model, calibration, ratios):
    with pytest.raises(ConfigError, match="expected several fractions"):
        sweep(model, calibration, ratios)
