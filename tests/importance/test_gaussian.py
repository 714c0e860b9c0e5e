import math

import pytest
import torch

from lit_prune.errors import ScoreError
from lit_prune.importance import channel_entropy, state_entropy, transfer_entropy, unit_entropy

HALF_LOG_2PIE = 0.5 * math.log(2 * math.pi * math.e)


def variances(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 5


def test_entropy_of_each_channel_is_the_closed_form():
    variance = variances(50)
    wanted = [math.log(math.sqrt(v) + 1e-6) + HALF_LOG_2PIE for v in variance.double().tolist()]
    found = channel_entropy(variance)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_f19_a_constant_channel_is_finite_and_ranks_lowest(dtype):
    entropy = channel_entropy(torch.tensor([0.0, 1e-7, 1.0], dtype=dtype))
    assert torch.isfinite(entropy).all()
    assert entropy.argmin() == 0
    assert entropy[0].item() == pytest.approx(math.log(1e-6) + HALF_LOG_2PIE)
    assert torch.isfinite(state_entropy(torch.zeros(4, 4), estimator="logdet"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-3])
def test_f20_an_invalid_variance_is_refused_with_its_place(bad):
    variance = torch.ones(2, 3)
    variance[1, 2] = bad
    for call in (
        lambda: channel_entropy(variance),
        lambda: state_entropy(variance, estimator="std_sum"),
        lambda: state_entropy(torch.diag(variance[1]), estimator="logdet"),
        lambda: unit_entropy(variance[1], 1),
    ):
        with pytest.raises(ScoreError, match=r"variance at \(.*2.*expected finite and >= 0"):
            call()


def test_f20_a_non_finite_covariance_off_the_diagonal_is_refused():
    covariance = torch.eye(3)
    covariance[0, 1] = covariance[1, 0] = math.nan
    with pytest.raises(ScoreError, match=r"covariance at \(0, 1\) is nan"):
        state_entropy(covariance, estimator="logdet")


def test_estimators_agree_where_they_must():
    variance = variances(7)
    diagonal = torch.diag(variance.double())
    independent = state_entropy(variance)
    # log(sigma + floor) against log(sigma^2 + floor^2) / 2: a floor apart
    assert state_entropy(diagonal, estimator="logdet").item() == pytest.approx(
        independent.item(), abs=7e-5
    )
    assert state_entropy(variance, estimator="std_sum").item() == pytest.approx(
        sum(math.sqrt(v) for v in variance.tolist()), rel=1e-6
    )


def test_joint_entropy_is_that_of_the_library_and_never_above_the_independent_one():
    factor = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = factor @ factor.T
    wanted = torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance).entropy()
    found = state_entropy(covariance, estimator="logdet")
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert found < state_entropy(covariance.diagonal())


def test_f22_a_rank_deficient_covariance_stays_finite():
    factor = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    entropy = state_entropy(factor @ factor.T, estimator="logdet")
    assert torch.isfinite(entropy)


def test_states_are_independent_along_leading_axes():
    stacked = variances(3, 5)
    assert torch.equal(state_entropy(stacked), torch.stack([state_entropy(x) for x in stacked]))


def test_units_own_neighbouring_channels():
    variance = variances(12)
    each = channel_entropy(variance).reshape(4, 3)
    assert torch.equal(unit_entropy(variance, 3), each.sum(1))
    assert torch.equal(unit_entropy(variance, 3, reduction="mean"), each.mean(1))
    assert torch.equal(unit_entropy(variance, 1), each.reshape(-1))
    with pytest.raises(ScoreError, match=r"shape \[12\]; expected \[units \* 5\]"):
        unit_entropy(variance, 5)
    with pytest.raises(ScoreError, match=r"shape \[3, 4\]; expected"):
        unit_entropy(variance.reshape(3, 4), 4)


def test_transfer_entropy_is_a_distance():
    found = transfer_entropy(torch.tensor(3.0), torch.tensor([2.5, 4.0, 3.0, math.nan]))
    assert found[:3].tolist() == [0.5, 1.0, 0.0]
    assert found[3].isnan()
