import math

import pytest
import torch

from lit_prune.methods.saap import noise_variances, score, stability
from tests.methods.cases import KV_HEADS, calibrated, case_of, check_ratio, model_of, plan

NAME = "saap"


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_ratio_is_met(kv_heads, ratio):
    check_ratio(NAME, kv_heads, ratio)


def taylor_of_channels(kv_heads, layer):
    """Coarse and fine importance of the channels of one MLP, by autograd, one by one."""
    model, calibration = model_of(kv_heads), calibrated(NAME, kv_heads)
    mlp = model.model.layers[layer].mlp
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    samples = [row.ids for row in calibration.rows.side("calibrate")][:10]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for ids in samples:
        loss = model(input_ids=ids[None], labels=ids[None]).loss
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            first[i] += gradient / len(samples)
            second[i] += gradient**2 / len(samples)
    terms = [g * w - w**2 * h / 2 for g, w, h in zip(first, weights, second, strict=True)]
    lines = [terms[0], terms[1], terms[2].T]
    coarse = sum(line.sum(1).abs() for line in lines)
    fine = sum(line.abs().sum(1) for line in lines)
    return coarse.detach().double(), fine.detach().double()


def test_scores_follow_the_formula():
    case = case_of(NAME, 2)
    coarse, fine = taylor_of_channels(2, 1)
    sigma = noise_variances(case)
    expected = sum(
        importance / (2 * variance) + 0.5 * math.log(variance)
        for importance, variance in zip((coarse, fine), sigma, strict=True)
    )
    # gradients are summed in another order
    torch.testing.assert_close(score(case)[1, "mlp"], expected, rtol=1e-4, atol=1e-6)


def test_noise_is_what_minimises_the_fused_sum():
    case = case_of(NAME, 2)
    taylor = torch.cat(list(calibrated(NAME, 2).taylor.values()))
    for column, variance in zip((2, 3), noise_variances(case), strict=True):

        def fused(v, column=column):
            return (taylor[:, column] / (2 * v) + 0.5 * math.log(v)).sum()

        assert fused(variance) < min(fused(0.99 * variance), fused(1.01 * variance))


def test_stability_is_relative_deviation():
    case = case_of(NAME, 2)
    sigma = noise_variances(case)
    taylor = calibrated(NAME, 2).taylor[2, "mlp"]
    fused = taylor[:, 2] / (2 * sigma[0]) + taylor[:, 3] / (2 * sigma[1])
    mean = fused.mean()
    expected = ((fused - mean).square().mean().sqrt() / mean).item()
    assert stability(case)[2, "mlp"] == pytest.approx(expected)


def test_unstable_layers_lose_more():
    trace = plan(NAME, 4, 0.3).provenance["method"]
    indicator, ratios = trace["stability"], trace["layer_ratios"]
    order = sorted(range(4), key=indicator.__getitem__)
    assert order == sorted(range(4), key=ratios.__getitem__)
    # ranks from 1 - s to 1 + s of the mean: three to one at s = 0.5
    assert max(ratios) / min(ratios) == pytest.approx(3)
    even = plan(NAME, 4, 0.3, ratio_strength=0.0).provenance["method"]["layer_ratios"]
    assert max(even) == pytest.approx(min(even))


def test_protected_layers_and_nothing_asked():
    found = check_ratio(NAME, 2, 0.25, protected_layers=(3,))
    assert len(found.layers[3].channels) == 96
    nothing = plan(NAME, 2, 0.0)
    assert all(len(layer.channels) == 96 for layer in nothing.layers)
