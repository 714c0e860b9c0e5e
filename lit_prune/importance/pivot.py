"""Kept and cut units of a projection on one table: remove, take back, exchange, all in closed form.

An output projection reads ``x`` with (damped) covariance ``C [n, n]`` and writes ``y = W x``. The
table ``[C | C W^T]``, ``[n, n + out]``, is pivoted on the columns that are kept. Then it holds, for

- kept columns: ``C_kk^-1``, and the compensated weights (what regresses ``y`` on the kept inputs);
- cut columns: their covariance given the kept inputs, and that with the error of ``y``;
- a kept row and a cut column: what regresses the cut input on the kept ones.

Pivoting once more on the same columns takes it back.

References:
    Beaton, "The use of special matrix operators in statistical calculus", 1964 (the sweep
    operator). Meng et al., "OSSCAR", ICML 2024: local search over kept and cut groups of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.importance.columns import (
    checked,
    columns_of,
    factored,
    gram_blocks,
    own_blocks,
    unit_damage,
)

# A swap has to gain this fraction of what the projection writes: less is rounding.
_LEAST_GAIN = 1e-9


def cut_table(covariance: Tensor, weight: Tensor) -> Tensor:
    """Return the table with nothing kept, ``[n, n + out]``, float64."""
    covariance, weight = checked(covariance, weight)
    return torch.cat([covariance, covariance @ weight.T], 1)


def kept_table(covariance: Tensor, weight: Tensor) -> Tensor:
    """Return the table with everything kept, ``[n, n + out]``, float64.

    Raises:
        ScoreError: If the covariance is not positive definite.
    """
    covariance, weight = checked(covariance, weight)
    return torch.cat([torch.cholesky_inverse(factored(covariance)), weight.T], 1)


def pivot(table: Tensor, columns: Tensor) -> None:
    """Cut these columns where they are kept, keep them where they are cut; in place.

    Args:
        table: ``[n, n + out]``, float64; changed.
        columns: All kept or all cut, ``[p]``, integers.

    Raises:
        ScoreError: If their block is not positive definite.

    Example:
        >>> table = cut_table(torch.tensor([[1.0, 0.8], [0.8, 1.0]]), torch.tensor([[1.0, 2.0]]))
        >>> pivot(table, torch.tensor([0]))
        >>> table.round(decimals=4)  # x_1 from x_0, weight of x_0; variance of x_1, its covariance
        tensor([[ 1.0000,  0.8000,  2.6000],
                [-0.8000,  0.3600,  0.7200]], dtype=torch.float64)
    """
    rows, across = table[columns], table[:, columns]
    block = rows[:, columns]
    inverse = torch.cholesky_inverse(factored((block + block.T) / 2))
    solved = inverse @ rows
    table.addmm_(across, solved, alpha=-1)
    table[columns] = solved
    table[:, columns] = -across @ inverse
    table[columns.unsqueeze(1), columns] = inverse


def unit_errors(table: Tensor, unit_width: int = 1) -> Tensor:
    """Return what each unit is worth, ``[units]``: the error that cutting a kept one would add,
    or that taking a cut one back would save, with the other weights compensated each time.
    """  # noqa: D205 - one sentence
    written = table[:, len(table) :].T
    own = own_blocks(table[:, : len(table)], unit_width)
    return unit_damage(own, gram_blocks(written, written, unit_width))


def exchanged(
    covariance: Tensor,
    weight: Tensor,
    kept: Tensor,
    unit_width: int = 1,
    *,
    max_swaps: int = 100,
    candidates: int = 256,
) -> tuple[Tensor, int]:
    """Exchange a kept unit for a cut one while that lowers the error of least squares.

    Each time the pair of largest gain, computed exactly; of so many pairs as ``candidates`` units
    make that cost least when cut, with as many that gain most when taken back. With no more units
    than that, the result cannot be improved by any one exchange (unless ``max_swaps`` ended it).

    Args:
        covariance: ``C``, ``[n, n]``, positive definite.
        weight: ``W``, ``[out, n]``.
        kept: Units to start from, ``[k]``, integers.
        unit_width: Columns that one unit owns.
        max_swaps: Exchanges, at most.
        candidates: Units of each side that are paired, at most.

    Returns:
        As many kept units, ascending; and how many exchanges were made.

    Raises:
        ScoreError: If shapes do not fit, a value is not finite, or ``C`` not positive definite.

    Example:
        >>> covariance = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> exchanged(covariance, torch.tensor([[1.0, 2.0, 1.5]]), torch.tensor([0, 2]))
        (tensor([1, 2]), 1)
    """
    covariance, weight = checked(covariance, weight, unit_width)
    stays = torch.zeros(weight.shape[1] // unit_width, dtype=torch.bool, device=weight.device)
    stays[kept.to(weight.device)] = True
    swaps = 0
    if bool(stays.any()) and not bool(stays.all()):
        table = cut_table(covariance, weight)
        least = _LEAST_GAIN * float((weight.T * table[:, len(table) :]).sum())
        pivot(table, columns_of(stays.nonzero().squeeze(1), unit_width))
        while swaps < max_swaps:
            leaves, enters, gain = _best_exchange(table, stays, unit_width, candidates)
            if not gain > least:
                break
            pivot(table, columns_of(leaves, unit_width))
            pivot(table, columns_of(enters, unit_width))
            stays[leaves], stays[enters] = False, True
            swaps += 1
    return stays.nonzero().squeeze(1), swaps


def _best_exchange(
    table: Tensor, stays: Tensor, width: int, candidates: int
) -> tuple[Tensor, Tensor, float]:
    """Return the kept unit that leaves, the cut one that enters, ``[1]`` each, and the gain."""
    errors, inputs = unit_errors(table, width), len(table)
    own = own_blocks(table[:, :inputs], width)
    order = errors.argsort(stable=True)
    leave = order[stays[order]][:candidates]
    enter = order[~stays[order]].flip(0)[:candidates]
    rows, others = columns_of(leave, width), columns_of(enter, width)

    def by_pair(matrix: Tensor) -> Tensor:
        return matrix.reshape(len(leave), width, len(enter), width).transpose(1, 2)

    # Without unit i its own part e_i, of covariance own_i^-1, stays unexplained: the input of j
    # then also varies by b^T e_i, the output also errs by W'_i e_i.
    regression = by_pair(table[rows][:, others])
    factor = torch.linalg.cholesky_ex(own[leave]).L.unsqueeze(1)
    told = torch.cholesky_solve(regression, factor)
    written, missed = table[rows, inputs:], table[others, inputs:]
    cross = told.mT @ by_pair(written @ missed.T)
    gram_out = gram_blocks(written.T, written.T, width).unsqueeze(1)
    gram = gram_blocks(missed.T, missed.T, width) + cross + cross.mT + told.mT @ gram_out @ told
    unexplained = own[enter] + regression.mT @ told
    saved = unit_damage(unexplained.reshape(-1, width, width), gram.reshape(-1, width, width))
    gain = saved.reshape(len(leave), len(enter)) - errors[leave].unsqueeze(1)
    best = int(gain.argmax())
    i, j = divmod(best, len(enter))
    return leave[i : i + 1], enter[j : j + 1], float(gain[i, j])
