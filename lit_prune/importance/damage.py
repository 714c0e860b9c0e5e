"""Damage curves: units leave one after the other, what they wrote is taken over by those that stay.

References:
    Hassibi & Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS
    1992 (published 1993): score and update, for single weights. Kurtic et al., "ZipLM", NeurIPS
    2023: the same for groups of columns. Meng et al., "OSSCAR", ICML 2024: backward elimination,
    then local swaps. We differ: moments are about the mean (the rest is a bias), the damping counts
    as noise in the damage itself, and there are no swaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.errors import ScoreError
from lit_prune.importance.columns import (
    checked,
    columns_of,
    gram_blocks,
    own_blocks,
    solved,
    unit_damage,
)

# Columns that are eliminated before their low-rank factors are folded into the matrices.
_PANEL = 64
# Inverse and weights are solved afresh whenever so few of the units are left: rounding stays small.
_REFACTOR = 0.75


@dataclass(frozen=True, slots=True, eq=False)
class DamageCurve:
    """How the expected error grows as units leave one after the other.

    ``order[:r]`` are the units that are gone after ``r`` removals, ``order[r:]`` those that stay.

    Attributes:
        order: Units as they leave, ``[units]``, int64.
        damage: Expected squared output error per token, summed over the outputs, with the first
            ``r`` units gone and compensated, ``[units + 1]``, float64 (squared output units). It
            starts at 0, never falls, and ends at ``tr(W C W^T)``.
    """

    order: Tensor
    damage: Tensor


def damage_curve(covariance: Tensor, weight: Tensor, unit_width: int = 1) -> DamageCurve:
    """Remove units one after the other, each time the one that costs least, and add up the costs.

    A unit ``g`` costs ``tr(W_g [(C^-1)_gg]^-1 W_g^T)``, with the inverse and the weights of the
    columns that are left. Afterwards the inverse is downdated and the weights compensated. Equal
    costs go to the lowest index. Greedy: each point is the least-squares optimum for *its* kept
    units, not the best choice of so many units. About ``4 n^3 + 10 out n^2`` operations, nearly all
    of them in matrix products; memory ``4 * 8 n^2`` bytes.

    Args:
        covariance: ``C``, ``[n, n]``, positive definite.
        weight: ``W``, ``[out, n]``.
        unit_width: Columns that one unit owns (1 for an MLP channel, query heads x head_dim for a
            KV group).

    Returns:
        Order and damage; see `DamageCurve`.

    Raises:
        ScoreError: If shapes do not fit, a value is not finite, or ``C`` not positive definite.

    Example:
        >>> covariance = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> curve = damage_curve(covariance, torch.tensor([[1.0, 2.0, 1.5]]))
        >>> curve.order
        tensor([0, 2, 1])
        >>> curve.damage.round(decimals=4)
        tensor([ 0.0000,  0.3600,  2.6100, 10.4500], dtype=torch.float64)
    """
    covariance, weight = checked(covariance, weight, unit_width)
    device, units = weight.device, weight.shape[1] // unit_width
    left = torch.arange(units, device=device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    while len(left):
        compensated, factor = solved(covariance, weight, columns_of(left, unit_width))
        gram, inverse = compensated.T @ compensated, torch.cholesky_inverse(factor)
        gone = torch.zeros(len(left), dtype=torch.bool, device=device)
        leaves = len(left) - math.floor(_REFACTOR * len(left))
        while leaves:
            steps = min(max(_PANEL // unit_width, 1), leaves)
            leaving, cost, factor, written = _eliminate(inverse, gram, gone, unit_width, steps)
            order.append(left[leaving])
            costs.append(cost)
            leaves -= steps
            if leaves:
                inverse.addmm_(factor.T, factor, alpha=-1)
                gram.addmm_(factor.T, written, alpha=-1).addmm_(written.T, factor, alpha=-1)
        left = left[~gone]
    damage = torch.cat([weight.new_zeros(1), torch.cat(costs).cumsum(0)])
    if not bool(torch.isfinite(damage).all()):
        raise ScoreError(
            f"the damage of {units} units is not finite: the covariance is too ill-conditioned. "
            "Raise the damping, or calibrate on more tokens."
        )
    return DamageCurve(torch.cat(order), damage)


def _eliminate(
    inverse: Tensor, gram: Tensor, gone: Tensor, width: int, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Let ``steps`` units leave, without touching the matrices (nor the host: no synchronisation).

    What a unit costs is told by its own blocks of the inverse and of the Gram matrix ``R^T R`` of
    the compensated weights: the weights themselves are not needed, so that a step reads rows of
    length ``m`` and no ``[m, out]``. When unit ``i`` leaves, with ``L L^T`` its block of the
    inverse, ``f = L^-1 inverse_i``, ``h = L^-1 gram_i`` and ``q = L^-1 gram_ii L^-T``:

        inverse -= f^T f,    gram -= f^T g + g^T f,    g = h - q f / 2

    Args:
        inverse: ``[m, m]``, of the covariance of what is left.
        gram: ``[m, m]``.
        gone: Units that left before, ``[m / width]``, whose rows are zero by now; added to.
        width: Columns of a unit.
        steps: Units that leave.

    Returns:
        Units, costs ``tr q``, and all ``f`` and all ``g``, ``[steps * width, m]``.
    """
    factor = inverse.new_empty(steps * width, len(inverse))
    written = torch.empty_like(factor)
    own, grams = own_blocks(inverse, width), own_blocks(gram, width)
    leaving, costs = [], []
    for step in range(steps):
        unit = unit_damage(own, grams).masked_fill(gone, math.inf).argmin().view(1)
        columns = columns_of(unit, width)
        done, here = step * width, slice(step * width, (step + 1) * width)
        past_factor, past_written = factor[:done], written[:done]
        own_factor, own_written = past_factor[:, columns].T, past_written[:, columns].T
        f = inverse[columns] - own_factor @ past_factor
        h = gram[columns] - own_factor @ past_written - own_written @ past_factor
        lower = _lower(f[:, columns])
        f = factor[here] = _forward(lower, f)
        h = _forward(lower, h)
        q = _forward(lower, h[:, columns].T)
        g = written[here] = h - 0.5 * (q @ f)
        cross = gram_blocks(f, g, width)
        grams -= cross + cross.mT
        own -= gram_blocks(f, f, width)
        gone.index_fill_(0, unit, True)
        leaving.append(unit)
        costs.append(q.trace())
    return torch.cat(leaving), torch.stack(costs), factor, written


def _lower(block: Tensor) -> Tensor:
    """Return the Cholesky factor; of a single number without the solver, whose call costs more."""
    lower: Tensor = block.sqrt() if len(block) == 1 else torch.linalg.cholesky_ex(block).L
    return lower


def _forward(lower: Tensor, rows: Tensor) -> Tensor:
    """Return ``lower^-1 rows``."""
    solved: Tensor
    solved = (
        rows / lower if len(lower) == 1 else torch.linalg.solve_triangular(lower, rows, upper=False)
    )
    return solved
