import math

import pytest
import torch

from lit_prune.errors import ScoreError
from lit_prune.importance import (
    conditional_entropy,
    conditional_mean,
    damage_curve,
    damped,
    output_error,
)
from lit_prune.importance.columns import columns_of
from tests.importance.gaussians import covariance_of, random_weight

# Wide enough that panels are folded in, units compacted and everything solved afresh, repeatedly.
CASES = [
    pytest.param(220, 40, 1, 1e2, id="channels"),
    pytest.param(220, 40, 1, 1e6, id="channels, ill-conditioned"),
    pytest.param(20, 90, 1, 1e4, id="more outputs than channels"),
    pytest.param(300, 40, 3, 1e6, id="groups, ill-conditioned"),
    pytest.param(400, 30, 80, 1e4, id="groups wider than a panel"),
]


def naive_curve(covariance, weight, width):
    """Everything solved directly at every step."""
    left, order, costs = list(range(len(covariance) // width)), [], [0.0]
    while left:
        columns = columns_of(torch.tensor(left), width)
        inverse = torch.linalg.inv(covariance[columns][:, columns])
        new = conditional_mean(covariance, weight, columns)
        own = [slice(i * width, (i + 1) * width) for i in range(len(left))]
        loss = [torch.trace(new[:, s] @ inverse[s, s].inverse() @ new[:, s].T).item() for s in own]
        least = min(range(len(left)), key=loss.__getitem__)
        order.append(left.pop(least))
        costs.append(costs[-1] + loss[least])
    return torch.tensor(order), torch.tensor(costs, dtype=torch.float64)


def residual(covariance, weight, columns):
    """Least squares on a root of the covariance: an orthogonal factorisation, no inverse."""
    root = torch.linalg.cholesky(covariance).T
    target = root @ weight.T
    if not len(columns):
        return target.square().sum().item()
    basis = torch.linalg.qr(root[:, columns]).Q
    for _ in range(2):  # twice is enough
        target = target - basis @ (basis.T @ target)
    return target.square().sum().item()


@pytest.mark.parametrize(("columns", "out", "width", "condition"), CASES)
def test_every_point_is_the_residual_of_least_squares(columns, out, width, condition):
    covariance, weight = covariance_of(columns, condition=condition), random_weight(out, columns)
    curve = damage_curve(covariance, weight, width)
    units = columns // width
    assert curve.order.dtype == torch.int64
    assert curve.damage.dtype == torch.float64
    assert curve.order.sort().values.tolist() == list(range(units))
    assert curve.damage[0] == 0
    assert (curve.damage.diff() >= 0).all()
    for removed in range(1, units + 1):
        kept = columns_of(curve.order[removed:].sort().values, width)
        wanted = residual(covariance, weight, kept)
        assert curve.damage[removed].item() == pytest.approx(wanted, rel=1e-8)
    total = torch.trace(weight @ covariance @ weight.T).item()
    assert curve.damage[-1].item() == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize(
    ("columns", "out", "width", "condition"), [(150, 30, 1, 1e6), (210, 30, 3, 1e4)]
)
def test_units_leave_as_when_everything_is_solved_at_every_step(columns, out, width, condition):
    covariance, weight = covariance_of(columns, condition=condition), random_weight(out, columns)
    order, damage = naive_curve(covariance, weight, width)
    curve = damage_curve(covariance, weight, width)
    assert torch.equal(curve.order, order)
    torch.testing.assert_close(curve.damage, damage, rtol=1e-8, atol=0)


def test_the_damage_is_the_output_error_of_the_conditional_mean():
    covariance, weight = damped(covariance_of(60), 0.01), random_weight(8, 60)
    curve = damage_curve(covariance, weight, 2)
    for removed in (1, 10, 29):
        kept = columns_of(curve.order[removed:].sort().values, 2)
        new = conditional_mean(covariance, weight, kept)
        error = output_error(covariance, weight, new, kept)
        assert curve.damage[removed].item() == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("width", [1, 3])
def test_the_first_to_leave_is_that_of_least_conditional_entropy(width):
    covariance, weight = covariance_of(60), random_weight(8, 60)
    entropy = conditional_entropy(covariance, weight, width)
    curve = damage_curve(covariance, weight, width)
    assert curve.order[0] == entropy.argmin()
    cost = torch.exp(2 * entropy.min()) / (2 * math.pi * math.e)
    assert curve.damage[1].item() == pytest.approx(cost.item(), rel=1e-9)


def test_units_without_weight_leave_first_and_free_of_charge():
    weight = random_weight(5, 90)
    weight[:, [7, 40, 88]] = 0
    curve = damage_curve(covariance_of(90), weight)
    assert curve.order[:3].tolist() == [7, 40, 88]
    assert curve.damage[:4].tolist() == [0, 0, 0, 0]
    assert curve.damage[4] > 0


@pytest.mark.parametrize("width", [1, 2])
def test_one_of_two_duplicates_leaves_free_of_charge(width):
    half = covariance_of(20)
    twice = torch.cat([torch.cat([half, half], 1)] * 2)
    weight = random_weight(6, 40)
    curve = damage_curve(damped(twice, 1e-7), weight, width)
    units = 20 // width
    assert sorted(unit % units for unit in curve.order[:units].tolist()) == list(range(units))
    assert curve.damage[units] < 1e-5 * curve.damage[-1]
    assert curve.damage[units + 1] > 100 * curve.damage[units]


def test_equal_costs_go_to_the_lowest_index():
    curve = damage_curve(torch.eye(150), torch.ones(2, 150))
    assert torch.equal(curve.order, torch.arange(150))
    assert torch.equal(curve.damage, 2 * torch.arange(151).double())


def test_constant_inputs_cost_nothing():
    weight = random_weight(5, 100)
    for width in (1, 4):
        curve = damage_curve(damped(torch.zeros(100, 100), 0.01), weight, width)
        assert torch.isfinite(curve.damage).all()
        assert curve.damage[-1] < 1e-20
        assert len(curve.order.unique()) == 100 // width


def test_a_single_unit_or_output_is_enough():
    covariance = covariance_of(6)
    whole = damage_curve(covariance, random_weight(4, 6), 6)
    assert whole.order.tolist() == [0]
    assert len(whole.damage) == 2
    assert len(damage_curve(covariance, random_weight(1, 6)).damage) == 7


@pytest.mark.parametrize("width", [1, 3])
def test_same_input_same_curve_whatever_the_scale(width):
    covariance, weight = covariance_of(150), random_weight(20, 150)
    first, second = (damage_curve(covariance, weight, width) for _ in range(2))
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.damage, second.damage)
    scaled = damage_curve(covariance * 2.0**-40, weight * 2.0**10, width)
    assert torch.equal(scaled.order, first.order)
    assert torch.equal(scaled.damage, first.damage * 2.0**-20)


def test_low_precision_is_raised_before_anything_is_computed():
    covariance = covariance_of(80).float()
    weight = random_weight(10, 80).float().requires_grad_()
    before = covariance.clone(), weight.detach().clone()
    curve = damage_curve(covariance, weight)
    wanted = damage_curve(covariance.double(), weight.detach().double())
    assert torch.equal(curve.order, wanted.order)
    assert torch.equal(curve.damage, wanted.damage)
    assert not curve.damage.requires_grad
    assert torch.equal(covariance, before[0])
    assert torch.equal(weight, before[1])


def test_what_no_curve_can_be_made_of_is_refused():
    weight = random_weight(3, 4)
    with pytest.raises(ScoreError, match=r"not positive definite.*Raise damping"):
        damage_curve(torch.ones(4, 4), weight)
    with pytest.raises(ScoreError, match="4 columns are no multiple of unit_width 3"):
        damage_curve(torch.eye(4), weight, 3)
    with pytest.raises(ScoreError, match=r"weight has shape \[3, 4\]; expected \[out, 5\]"):
        damage_curve(torch.eye(5), weight)
    with pytest.raises(ScoreError, match=r"covariance at \(0, 0\) is inf"):
        damage_curve(torch.eye(4) * math.inf, weight)


@pytest.mark.gpu
def test_a_gpu_finds_the_same_curve():
    covariance, weight = covariance_of(300, condition=1e4), random_weight(40, 300)
    for width in (1, 3):
        wanted = damage_curve(covariance, weight, width)
        found = damage_curve(covariance.cuda(), weight.cuda(), width)
        assert torch.equal(found.order.cpu(), wanted.order)
        torch.testing.assert_close(found.damage.cpu(), wanted.damage, rtol=1e-8, atol=0)
