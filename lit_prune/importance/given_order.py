"""Damage of removing units in a given order: one factorisation for the whole curve."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.errors import ScoreError
from lit_prune.importance.columns import columns_of


def order_damage(
    covariance: Tensor, weight: Tensor, order: Tensor, unit_width: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the expected squared output error after each removal, in an order that is given.

    With ``C = L Lᵀ`` over the columns from the last to leave to the first, the residual covariance
    of the first r units given all others is ``L22 L22ᵀ``, so that the damage after r removals is
    the squared norm of the last columns of ``W L``: no step needs another inverse.

    Args:
        covariance: Damped covariance of the projection's input, ``[width, width]``.
        weight: Its weight, ``[outputs, width]``.
        order: Units in the order in which they leave, ``[units]``.
        unit_width: Columns of one unit.

    Returns:
        Damage after 0, 1, … all removals, ``[units + 1]`` each, float64: with compensation by the
        conditional mean, and with the mean alone, ``tr(W_c C_cc W_cᵀ)``.

    Raises:
        ScoreError: If ``order`` is not a permutation of the units, or the covariance is not
            positive definite.

    Example:
        >>> covariance = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> order_damage(covariance, torch.eye(2), torch.tensor([1, 0]))[0]
        tensor([0., 1., 3.], dtype=torch.float64)
    """
    units = covariance.shape[0] // unit_width
    if sorted(order.tolist()) != list(range(units)):
        raise ScoreError(
            f"order has {len(order)} entries, expected each of {units} units exactly once."
        )
    columns = columns_of(order.flip(0).to(covariance.device), unit_width)
    ordered = covariance.double()[columns][:, columns]
    factor, failed = torch.linalg.cholesky_ex(ordered)
    if bool(failed):
        raise ScoreError("covariance is not positive definite. Raise damping (0.01, say).")
    written = weight.double()[:, columns]
    compensated = (written @ factor).square().sum(0)
    # what column i adds without compensation: itself and, twice, its pairs with what left before;
    # summed over a unit's columns this is its own block and its blocks with the units before
    products = (written.T @ written) * ordered
    alone = products.diagonal() + 2 * products.tril(-1).sum(0)
    zero = compensated.new_zeros(1)

    def curve(gains: Tensor) -> Tensor:
        return torch.cat([zero, gains.reshape(units, -1).sum(1).flip(0).cumsum(0)])

    return curve(compensated), curve(alone)
