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
    units = weight.shape[1] // unit_width
    left = torch.arange(units, device=weight.device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    while len(left):
        compensated, factor = solved(covariance, weight, columns_of(left, unit_width))
        gram, inverse = compensated.T @ compensated, torch.cholesky_inverse(factor)
        panel = _Panel(inverse, gram, unit_width)
        leaves = len(left) - math.floor(_REFACTOR * len(left))
        while leaves:
            leaving, cost = panel.eliminate(min(panel.units, leaves))
            order.append(left[leaving])
            costs.append(cost)
            leaves -= len(leaving)
            if leaves:
                panel.fold()
        left = left[~panel.gone]
    damage = torch.cat([weight.new_zeros(1), torch.cat(costs).cumsum(0)])
    if not bool(torch.isfinite(damage).all()):
        raise ScoreError(
            f"the damage of {units} units is not finite: the covariance is too ill-conditioned. "
            "Raise the damping, or calibrate on more tokens."
        )
    return DamageCurve(torch.cat(order), damage)


class _Panel:
    """Units that leave one after the other while the matrices stay as they are.

    What a unit costs is told by its own blocks of the inverse and of the Gram matrix ``R^T R`` of
    the compensated weights: the weights themselves are not needed, so that a step reads rows of
    length ``m`` and no ``[m, out]``. When unit ``i`` leaves, with ``L L^T`` its block of the
    inverse, ``f = L^-1 inverse_i``, ``h = L^-1 gram_i`` and ``q = L^-1 gram_ii L^-T``:

        inverse -= f^T f,    gram -= f^T g + g^T f,    g = h - q f / 2

    All ``f`` and ``g`` of a panel are kept, and folded into the matrices together.

    Args:
        inverse: ``[m, m]``, of the covariance of what is left; `fold` changes it.
        gram: ``[m, m]``; likewise.
        width: Columns of a unit.

    Attributes:
        units: How many may leave before `fold`.
        gone: Units that left, ``[m / width]``.
    """

    def __init__(self, inverse: Tensor, gram: Tensor, width: int) -> None:
        device, size = inverse.device, len(inverse)
        self.units = max(_PANEL // width, 1)
        self.gone = torch.zeros(size // width, dtype=torch.bool, device=device)
        self._inverse, self._gram, self._width = inverse, gram, width
        # rows of units that have not left yet are zero, and change nothing
        self._factor = inverse.new_zeros(self.units * width, size)
        self._written = torch.zeros_like(self._factor)
        self._own, self._grams = own_blocks(inverse, width), own_blocks(gram, width)
        self._done = torch.zeros(1, dtype=torch.int64, device=device)
        self._leaving = torch.zeros(self.units, dtype=torch.int64, device=device)
        self._costs = inverse.new_zeros(self.units)
        self._again: torch.cuda.CUDAGraph | None = None

    def eliminate(self, steps: int) -> tuple[Tensor, Tensor]:
        """Let ``steps`` units leave; return them and their costs ``tr q``, ``[steps]`` each."""
        for step in range(steps):
            if self._again is not None:
                self._again.replay()
                continue
            self._step(step * self._width)
            # Thousands of steps of tiny operations: on a GPU they wait for their launches, unless
            # those are recorded. Steps with a solver's calls are few, and not recorded.
            if self._inverse.is_cuda and self._width == 1:
                self._again = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._again, capture_error_mode="thread_local"):
                    self._step(len(self._factor))
        return self._leaving[:steps].clone(), self._costs[:steps].clone()

    def fold(self) -> None:
        """Downdate the matrices by what has left, and begin anew."""
        factor, written = self._factor, self._written
        self._inverse.addmm_(factor.T, factor, alpha=-1)
        self._gram.addmm_(factor.T, written, alpha=-1).addmm_(written.T, factor, alpha=-1)
        self._own.copy_(own_blocks(self._inverse, self._width))
        self._grams.copy_(own_blocks(self._gram, self._width))
        for tensor in (factor, written, self._done):
            tensor.zero_()

    def _step(self, rows: int) -> None:
        """Let the cheapest unit leave; nothing here waits for the device, or for its answer.

        Args:
            rows: Of the panel, to be read: all that are filled, or more.
        """
        width, past_factor, past_written = self._width, self._factor[:rows], self._written[:rows]
        unit = unit_damage(self._own, self._grams).masked_fill(self.gone, math.inf).argmin().view(1)
        columns, here = columns_of(unit, width), columns_of(self._done, width)
        own_factor, own_written = past_factor[:, columns].T, past_written[:, columns].T
        f = self._inverse[columns] - own_factor @ past_factor
        h = self._gram[columns] - own_factor @ past_written - own_written @ past_factor
        lower = _lower(f[:, columns])
        f = _forward(lower, f)
        h = _forward(lower, h)
        q = _forward(lower, h[:, columns].T)
        g = h - 0.5 * (q @ f)
        cross = gram_blocks(f, g, width)
        self._grams -= cross + cross.mT
        self._own -= gram_blocks(f, f, width)
        self._factor.index_copy_(0, here, f)
        self._written.index_copy_(0, here, g)
        self._costs.index_copy_(0, self._done, q.trace().view(1))
        self._leaving.index_copy_(0, self._done, unit)
        self.gone.index_fill_(0, unit, True)
        self._done += 1


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
