"""Refitting a projection to a target, against ridge regression on samples."""

import pytest
import torch

from lit_prune.errors import ScoreError
from lit_prune.importance import affine_refit, damped
from tests.importance.gaussians import covariance_of

KEPT, OUT = 6, 4


@pytest.fixture
def samples():
    """Inputs, and a target that they tell in part; two texts with other means."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(KEPT, KEPT, generator=generator, dtype=torch.float64)
    truth = torch.randn(OUT, KEPT, generator=generator, dtype=torch.float64)
    texts = []
    for shift in (0.0, 0.3):
        x = torch.randn(400, KEPT, generator=generator, dtype=torch.float64) @ mixing + shift
        noise = torch.randn(400, OUT, generator=generator, dtype=torch.float64)
        texts.append((x, x @ truth.T + noise + 2.0))
    return texts


def moments(text, means=None):
    both = torch.cat(text, 1)
    centred = both - (both.mean(0) if means is None else means)
    joint = centred.T @ centred / len(both)
    return joint[:KEPT, :KEPT], joint[KEPT:, :KEPT]


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(OUT, KEPT, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 3.0])
def test_against_a_ridge_towards_the_old_weights(samples, weight, damping):
    (x, t), _ = samples
    found = affine_refit(moments((x, t)), moments((x, t)), weight, (damping,))
    x, t = x - x.mean(0), t - t.mean(0)
    noise = damping * float(x.var(0, correction=0).mean())
    inputs = torch.cat([x / len(x) ** 0.5, noise**0.5 * torch.eye(KEPT).double()])
    missing = torch.cat([(t - x @ weight.T) / len(x) ** 0.5, torch.zeros(KEPT, OUT)])
    new = weight + torch.linalg.lstsq(inputs, missing).solution.T
    torch.testing.assert_close(found.weight, new, rtol=1e-9, atol=1e-9)
    condition = float(torch.linalg.cond(damped(moments((x, t))[0], damping)))
    assert condition <= found.condition < float("inf")


def test_the_damping_is_the_best_on_the_other_text(samples, weight):
    calibrate, other = samples
    means = torch.cat(calibrate, 1).mean(0)
    dampings = (1e-4, 1.0, 100.0)
    found = affine_refit(moments(calibrate), moments(other, means), weight, dampings)

    def error(w):
        x, t = other[0] - means[:KEPT], other[1] - means[KEPT:]
        return float((t - x @ w.T).square().sum(1).mean())

    alone = [affine_refit(moments(calibrate), moments(calibrate), weight, (d,)) for d in dampings]
    errors = [error(a.weight) for a in alone]
    assert found.damping == dampings[errors.index(min(errors))]
    assert error(found.weight) == pytest.approx(min(errors))
    assert min(errors) < error(weight)


def test_weights_that_nothing_beats_stay(samples, weight):
    """On the other text the target is what the weights say already."""
    (x, t), (other, _) = samples
    same = (other, other @ weight.T)
    means = torch.cat([x.mean(0), x.mean(0) @ weight.T])
    found = affine_refit(moments((x, t)), moments(same, means), weight, (0.01, 1.0))
    assert torch.equal(found.weight, weight)
    assert found.damping is None
    assert not found.refused


def test_a_system_that_cannot_be_solved_is_skipped_and_told(weight):
    joint = covariance_of(KEPT + OUT)
    inputs, cross = joint[:KEPT, :KEPT], joint[KEPT:, :KEPT]
    broken = inputs.clone()
    broken[0, 0] = -5.0
    found = affine_refit((broken, cross), (inputs, cross), weight, (1e-3,))
    assert found.refused
    assert torch.equal(found.weight, weight)


def test_shapes_and_values_are_checked(weight):
    inputs, cross = torch.eye(KEPT), torch.zeros(OUT, KEPT)
    with pytest.raises(ScoreError, match=r"expected \[kept, kept\] and \[out, kept\]"):
        affine_refit((inputs, cross[:-1]), (inputs, cross), weight, (0.01,))
    with pytest.raises(ScoreError, match="expected finite"):
        affine_refit((inputs * float("nan"), cross), (inputs, cross), weight, (0.01,))
