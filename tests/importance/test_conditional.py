import math

import pytest
import torch

from lit_prune.errors import ScoreError
from lit_prune.importance import (
    condition_bound,
    conditional_entropy,
    conditional_mean,
    damped,
    output_error,
)
from tests.importance.gaussians import covariance_of, random_weight


def test_damping_is_relative_to_the_mean_variance():
    covariance = covariance_of(12)
    wanted = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(damped(covariance, 0.1), wanted, rtol=1e-15, atol=0)
    before = covariance.clone()
    assert torch.equal(damped(covariance, 0), covariance)
    damped(covariance, 1.0)
    assert torch.equal(covariance, before)
    scaled = damped(1e6 * covariance, 0.1)
    torch.testing.assert_close(scaled, 1e6 * damped(covariance, 0.1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("damping", [-0.1, math.nan, math.inf])
def test_an_invalid_damping_is_refused(damping):
    with pytest.raises(ScoreError, match=r"damping is .*; expected finite and >= 0"):
        damped(torch.eye(2), damping)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 10.0])
def test_the_condition_bound_bounds_the_condition_number(damping):
    for covariance in (covariance_of(40, condition=1e5), torch.ones(3, 3), torch.zeros(3, 3)):
        noisy = damped(covariance, damping)
        bound = condition_bound(noisy, covariance)
        assert float(torch.linalg.cond(noisy)) <= bound * (1 + 1e-6) < math.inf


@pytest.mark.parametrize("width", [1, 3])
def test_entropy_is_that_of_the_residual_of_each_unit(width):
    covariance, weight = covariance_of(24, condition=1e3), random_weight(10, 24)
    found = conditional_entropy(covariance, weight, width)
    for unit in range(24 // width):
        own = torch.arange(unit * width, (unit + 1) * width)
        rest = torch.tensor([c for c in range(24) if c not in own])
        told = covariance[own][:, rest] @ torch.linalg.inv(covariance[rest][:, rest])
        residual = covariance[own][:, own] - told @ covariance[rest][:, own]
        variance = torch.trace(weight[:, own] @ residual @ weight[:, own].T)
        wanted = 0.5 * math.log(2 * math.pi * math.e * variance)
        assert found[unit].item() == pytest.approx(wanted, rel=1e-8)


def test_entropy_of_independent_inputs_is_the_marginal_one():
    variance, weight = torch.rand(9).double() + 0.1, random_weight(4, 9)
    wanted = 0.5 * torch.log(2 * math.pi * math.e * variance * weight.square().sum(0))
    torch.testing.assert_close(conditional_entropy(torch.diag(variance), weight), wanted)


def test_f19_a_unit_without_weight_is_finite_and_ranks_lowest():
    weight = random_weight(4, 6)
    weight[:, 2:4] = 0
    entropy = conditional_entropy(covariance_of(6), weight, 2)
    assert torch.isfinite(entropy).all()
    assert entropy.argmin() == 1
    assert torch.isfinite(conditional_entropy(damped(torch.zeros(6, 6), 0.01), weight)).all()


def test_the_mean_is_the_least_squares_solution_on_data():
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(3)).double()
    x = (x - x.mean(0)) @ random_weight(20, 20)
    x = x - x.mean(0)
    weight, kept = random_weight(7, 20, seed=4), torch.tensor([0, 1, 5, 8, 13, 19])
    wanted = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    found = conditional_mean(x.T @ x / len(x), weight, kept)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_damping_is_ridge_towards_the_original_weights():
    covariance, weight = covariance_of(10), random_weight(3, 10)
    kept, cut = torch.arange(0, 10, 2), torch.arange(1, 10, 2)
    noise = 0.3 * covariance.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    # the change E of the kept columns minimises |W_c x_c - E x_k|^2 + lambda |E|^2
    change = weight[:, cut] @ covariance[cut][:, kept]
    change = change @ torch.linalg.inv(covariance[kept][:, kept] + noise)
    found = conditional_mean(damped(covariance, 0.3), weight, kept)
    torch.testing.assert_close(found, weight[:, kept] + change, rtol=1e-10, atol=1e-12)


def test_nothing_cut_changes_nothing_and_everything_cut_leaves_nothing():
    covariance, weight = covariance_of(8), random_weight(3, 8)
    every, none = torch.arange(8), torch.arange(0)
    for damping in (0, 0.01, 10):
        assert torch.equal(conditional_mean(damped(covariance, damping), weight, every), weight)
    assert conditional_mean(covariance, weight, none).shape == (3, 0)
    assert output_error(covariance, weight, weight, every) == 0
    total = torch.trace(weight @ covariance @ weight.T).item()
    assert output_error(covariance, weight, weight[:, none], none) == pytest.approx(total)


@pytest.mark.parametrize("covariance", [covariance_of(8), torch.zeros(8, 8)])
def test_infinite_damping_or_constant_inputs_leave_the_original_weights(covariance):
    weight, kept = random_weight(3, 8), torch.tensor([1, 2, 6])
    found = conditional_mean(damped(covariance, 1e15), weight, kept)
    torch.testing.assert_close(found, weight[:, kept], rtol=0, atol=1e-12)


def test_error_is_the_mean_square_on_data():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(5)).double()
    weight, new, kept = random_weight(3, 8), random_weight(3, 2, seed=6), torch.tensor([2, 7])
    wanted = (x @ weight.T - x[:, kept] @ new.T).square().sum(1).mean().item()
    assert output_error(x.T @ x / 300, weight, new, kept) == pytest.approx(wanted, rel=1e-12)


def test_held_out_error_is_below_that_of_the_mean_alone():
    mixing = torch.linalg.cholesky(covariance_of(30, condition=1e3))
    draw = torch.Generator().manual_seed(7)
    train, test = (
        torch.randn(400, 30, generator=draw, dtype=torch.float64) @ mixing.T for _ in range(2)
    )
    weight, kept = random_weight(12, 30), torch.arange(0, 30, 2)
    new = conditional_mean(damped(train.T @ train / 400, 0.01), weight, kept)
    held_out = test.T @ test / 400
    bias_only = output_error(held_out, weight, weight[:, kept], kept)
    assert output_error(held_out, weight, new, kept) < 0.5 * bias_only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_raised_before_anything_is_computed(dtype):
    covariance, weight = covariance_of(6).to(dtype), random_weight(3, 6).to(dtype)
    covariance, kept = torch.tril(covariance) + torch.tril(covariance, -1).T, torch.tensor([0, 3])
    raised = damped(covariance, 0.01)
    assert raised.dtype == torch.float64
    assert torch.equal(raised, damped(covariance.double(), 0.01))
    for function in (lambda c, w: conditional_mean(c, w, kept), conditional_entropy):
        found = function(raised, weight.requires_grad_())
        assert found.dtype == torch.float64
        assert not found.requires_grad
        assert torch.equal(found, function(raised, weight.double()))


def test_f22_a_covariance_that_cannot_be_inverted_names_the_remedy():
    weight, kept = random_weight(3, 4), torch.tensor([0, 1])
    for call in (
        lambda c: conditional_mean(c, weight, kept),
        lambda c: conditional_entropy(c, weight),
    ):
        with pytest.raises(ScoreError, match=r"not positive definite.*Raise damping"):
            call(torch.ones(4, 4))
        call(damped(torch.ones(4, 4), 0.01))


def test_f20_what_is_not_finite_is_refused_with_its_place():
    bad = torch.eye(4)
    bad[1, 2] = math.nan
    weight, kept = random_weight(3, 4), torch.tensor([0, 1])
    infinite = torch.full((3, 2), math.inf)
    for call in (
        lambda: damped(bad, 0.1),
        lambda: conditional_entropy(bad, weight),
        lambda: conditional_mean(bad, weight, kept),
        lambda: output_error(bad, weight, weight[:, kept], kept),
    ):
        with pytest.raises(ScoreError, match=r"covariance at \(1, 2\) is nan; expected finite"):
            call()
    with pytest.raises(ScoreError, match=r"weight at \(0, 0\) is inf"):
        conditional_entropy(torch.eye(2), infinite)
    with pytest.raises(ScoreError, match=r"new_weight at \(0, 0\) is inf"):
        output_error(torch.eye(4), weight, infinite, kept)


def test_shapes_that_do_not_fit_are_refused():
    weight, kept = random_weight(3, 4), torch.tensor([0, 1])
    with pytest.raises(ScoreError, match=r"covariance has shape \[4, 3\]; expected \[n, n\]"):
        damped(torch.ones(4, 3), 0.1)
    with pytest.raises(ScoreError, match=r"covariance has shape \[0, 0\]"):
        damped(torch.ones(0, 0), 0.1)
    with pytest.raises(ScoreError, match=r"weight has shape \[3, 4\]; expected \[out, 5\]"):
        conditional_mean(torch.eye(5), weight, kept)
    for width in (0, 3):
        with pytest.raises(ScoreError, match=f"4 columns are no multiple of unit_width {width}"):
            conditional_entropy(torch.eye(4), weight, width)
    with pytest.raises(ScoreError, match=r"new_weight has shape \[3, 4\]; expected .* \[3, 2\]"):
        output_error(torch.eye(4), weight, weight, kept)


@pytest.mark.parametrize("columns", [[1, 0], [0, 0], [-1, 2], [0, 4]])
def test_columns_that_do_not_ascend_within_the_weight_are_refused(columns):
    with pytest.raises(ScoreError, match=r"must ascend, without repeats, within \[0, 4\)"):
        conditional_mean(torch.eye(4), random_weight(3, 4), torch.tensor(columns))
    with pytest.raises(ScoreError, match=r"kept_columns is torch.bool \[4\]; expected integers"):
        conditional_mean(torch.eye(4), random_weight(3, 4), torch.ones(4, dtype=torch.bool))
