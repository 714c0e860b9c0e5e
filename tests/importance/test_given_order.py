"""Damage in a given order, from one factorisation."""

import pytest
import torch

from lit_prune.errors import ScoreError
from lit_prune.importance import damage_curve, damped, order_damage

WIDTHS = [1, 3]


def problem(columns=24, outputs=7, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(300, columns, dtype=torch.float64) @ torch.randn(columns, columns).double()
    return damped(torch.cov(x.T), 1e-3), torch.randn(outputs, columns, dtype=torch.float64)


def columns_of(units, width):
    return (units.unsqueeze(1) * width + torch.arange(width)).reshape(-1)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_point_is_the_residual_that_is_solved_for_directly(width):
    covariance, weight = problem()
    order = torch.randperm(24 // width, generator=torch.Generator().manual_seed(1))
    compensated, alone = order_damage(covariance, weight, order, width)
    assert compensated[0] == alone[0] == 0
    for removed in range(1, len(order) + 1):
        cut = columns_of(order[:removed], width)
        kept = columns_of(order[removed:], width)
        within = covariance[cut][:, cut]
        told = covariance[cut][:, kept] @ torch.linalg.solve(
            covariance[kept][:, kept], covariance[kept][:, cut]
        )
        wanted = torch.trace(weight[:, cut] @ (within - told) @ weight[:, cut].T)
        torch.testing.assert_close(compensated[removed], wanted, rtol=1e-8, atol=0)
        wanted = torch.trace(weight[:, cut] @ within @ weight[:, cut].T)
        torch.testing.assert_close(alone[removed], wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_progressive_order_gives_the_progressive_curve(width):
    covariance, weight = problem(seed=2)
    curve = damage_curve(covariance, weight, width)
    compensated, _ = order_damage(covariance, weight, curve.order, width)
    torch.testing.assert_close(compensated, curve.damage, rtol=1e-8, atol=0)


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1], [0, 1, 3]])
def test_what_is_no_order_is_refused(order):
    covariance, weight = problem(columns=3)
    with pytest.raises(ScoreError, match="each of 3 units exactly once"):
        order_damage(covariance, weight, torch.tensor(order))


def test_what_cannot_be_factored_is_refused():
    singular = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(ScoreError, match="damping"):
        order_damage(singular - torch.eye(3), torch.ones(2, 3), torch.arange(3))
