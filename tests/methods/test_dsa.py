import math

import pytest
import torch

from lit_prune.methods.dsa import importance, layer_ratios
from tests.methods.cases import KV_HEADS, calibrated, check_ratio, model_of, plan

NAME = "dsa"


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_ratio_is_met(kv_heads, ratio):
    check_ratio(NAME, kv_heads, ratio)


def test_variances_are_of_all_weights_of_a_layer():
    calibration, layer = calibrated(NAME, 2), model_of(2).model.layers[1]
    attention, mlp, values = layer.self_attn, layer.mlp, []
    for kind, inputs, output in (
        ("attention", [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj),
        ("mlp", [mlp.gate_proj, mlp.up_proj], mlp.down_proj),
    ):
        mean, variance = calibration.units[1, kind]
        squares = [(linear, calibration.inputs[1, kind]) for linear in inputs]
        for linear, square in [*squares, (output, variance + mean**2)]:
            for row in linear.weight.detach():
                values += (row.abs().double() * square.sqrt()).log().tolist()
    expected = torch.tensor(values, dtype=torch.float64).var().item()
    found = plan(NAME, 2, 0.3).provenance["method"]["log_variances"][1]
    assert found == pytest.approx(expected, rel=1e-4)  # float32


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_ratios_are_those_of_its_code(ratio):
    """Step by step: scaled, turned round, scaled again, centred on the fraction that stays."""
    found = [importance(variance) for variance in (0.5, 1.2, 0.9, 1.4)]
    assert found == [math.asin(math.atan(v)) for v in (0.5, 1.2, 0.9, 1.4)]
    stays = [1 - (value - min(found)) / (max(found) - min(found)) for value in found]
    stays = [(v - min(stays)) / (max(stays) - min(stays)) * 0.08 * 2 for v in stays]
    mean = sum(stays) / 4
    expected = [1 - (value - mean + 1 - ratio) for value in stays]
    assert layer_ratios(found, ratio) == pytest.approx(expected)


def test_undefined_layers_count_as_least_and_are_named():
    assert importance(math.tan(1) + 1e-6) == 0
    assert importance(math.tan(1) - 1e-6) == pytest.approx(math.pi / 2, abs=0.01)
    trace = plan(NAME, 2, 0.3).provenance["method"]
    above = [i for i, variance in enumerate(trace["log_variances"]) if variance > math.tan(1)]
    assert trace["undefined"] == above


def test_equal_layers_lose_alike():
    assert layer_ratios([0.0, 0.0, 0.0], 0.3) == pytest.approx([0.3] * 3)
