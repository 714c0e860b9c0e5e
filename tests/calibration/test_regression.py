"""Moments of a regression, against all samples at once."""

import pytest
import torch

from lit_prune.calibration import RegressionMoments
from lit_prune.errors import CalibrationError


def samples(tokens=300, inputs=5, target=3):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) + 20.0
    t = x[:, :target] * 2 + torch.randn(tokens, target, generator=generator, dtype=torch.float64)
    return x, t


@pytest.mark.parametrize("sizes", [[300], [1, 99, 0, 200]])
def test_against_all_samples_at_once(sizes):
    x, t = samples()
    moments = RegressionMoments()
    for inputs, target in zip(x.split(sizes), t.split(sizes), strict=True):
        moments.update(inputs, target)
    torch.testing.assert_close(moments.means, (x.mean(0), t.mean(0)), rtol=1e-12, atol=1e-12)
    for point in (moments.means, (x[0], t[1]), None):
        x0, t0 = (x, t) if point is None else (x - point[0], t - point[1])
        wanted = x0.T @ x0 / len(x), t0.T @ x0 / len(x)
        torch.testing.assert_close(moments.about(point), wanted, rtol=1e-10, atol=1e-10)


def test_a_target_without_inputs_has_a_mean():
    moments = RegressionMoments()
    moments.update(torch.zeros(4, 0), torch.ones(4, 2))
    assert moments.means[1].tolist() == [1.0, 1.0]


def test_nothing_seen_is_said():
    moments = RegressionMoments()
    moments.update(torch.zeros(0, 2), torch.zeros(0, 1))
    with pytest.raises(CalibrationError, match="no token"):
        moments.about()
