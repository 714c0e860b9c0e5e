"""Lower bounds for the joint search: all suffixes of places solved, sizes in buckets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lit_prune.allocation.joint_problem import rounding

if TYPE_CHECKING:
    import numpy.typing as npt

    from lit_prune.allocation.joint_problem import Problem

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

_UNITS_TRIED = 256
_FEWEST_BUCKETS = 64


class SuffixTables:
    """Least cost of completing a partial selection, never too high (but for 1e-12 of it).

    Sizes are rounded down to a bucket, and each suffix of places is solved by dynamic programming
    over (attention, bucket). A suffix's true size S lies between its bucketed size and that plus
    the suffix's largest rounding loss, so that the least entry within the widened window bounds all
    completions. What the entries add up is the *reduced* cost, cost - price x size with the true
    size; price x S is added again with the least S possible. So a size within the loss is charged
    for what it lacks, and rounding costs the bound a little noise and no slope. With sizes whose
    multiples all fit into the table the bound is exact.

    Args:
        problem: What is to be chosen.
        order: Places in the order in which the search decides them.
        price: Size price, >= 0.
        cells: Numbers to keep in each of the two families of tables, about.
        work: Additions to spend, about.

    Example:
        >>> from lit_prune.allocation.joint_problem import Problem
        >>> two = np.array([0, 0, 1, 1])
        >>> size, cost, none = np.array([0, 10, 0, 10]), np.array([0, 1.5, 0, 1.5]), 0 * two
        >>> problem = Problem(two, two, size, cost, none, 15, 20, 0)
        >>> tables = SuffixTables(problem, [0, 1], price=0.15, cells=99, work=1e6)
        >>> tables.completion(1, np.array([0, 10]), np.array([0, 0])).round(9)
        array([inf, 1.5])
    """

    def __init__(
        self, problem: Problem, order: list[int], *, price: float, cells: int, work: float
    ) -> None:
        self._low, self._high, self._limit = problem.low, problem.high, problem.limit
        self._price = price
        levels = np.split(np.arange(len(problem.place)), problem.start[1:])
        rows = problem.limit + 1
        number = min(cells // (rows * len(order)), int(work / (rows * len(problem.place))))
        self._unit, losses = _bucket(problem, max(number, _FEWEST_BUCKETS))
        length = self._high // self._unit + 1
        least = np.zeros((rows, 1))
        self._loss, self._floor = [0], [0.0]
        self._tables = [self._windows(least, 0)]
        reduced = problem.cost - price * problem.size
        # What costs contribute is relative to the bound, and far below a tie.
        self._rounding = rounding(len(order), price * self._high)
        for place in reversed(order):
            chosen = levels[place]
            shifts = problem.size[chosen] // self._unit
            longer = np.full((rows, min(length, least.shape[1] + int(shifts.max()))), np.inf)
            room = np.empty_like(longer)
            triples = (shifts, problem.attention[chosen], reduced[chosen])
            for shift, lost, cost in zip(*(array.tolist() for array in triples), strict=True):
                width = min(longer.shape[1] - shift, least.shape[1])
                if width > 0 and lost < rows:
                    part = longer[lost:, shift : shift + width]
                    sums = np.add(least[: rows - lost, :width], cost, out=room[lost:, :width])
                    np.minimum(part, sums, out=part)
            least = longer
            self._loss.insert(0, self._loss[0] + int(losses[place]))
            self._floor.insert(0, self._floor[0] + float(problem.cost[chosen].min()))
            self._tables.insert(0, self._windows(least, self._loss[0]))

    def completion(self, depth: int, size: Ints, attention: Ints) -> Floats:
        """Bound the cost of deciding place ``depth`` and after, for several partial selections.

        Args:
            depth: Number of places decided.
            size: What each partial selection frees, ``[selections]``.
            attention: Attentions that it loses, ``[selections]``.

        Returns:
            Lower bounds, nats, ``[selections]``; infinite where nothing fits.
        """
        near, far, skip = self._tables[depth]
        lacking = np.maximum(self._low - size, 0)
        first = np.maximum(-((self._loss[depth] - lacking) // self._unit), 0)
        left = self._limit - attention
        impossible = (size > self._high) | (left < 0)
        left = np.maximum(left, 0)
        # The last column is infinite: it stands for everything beyond.
        bound: Floats = far[left, np.minimum(first + skip, far.shape[1] - 1)]
        if near is not None:
            lacks = near[left, np.minimum(first, near.shape[1] - 1)] + self._price * lacking
            bound = np.minimum(bound, lacks)
        bound = np.maximum(bound - self._rounding, self._floor[depth])
        bound[impossible] = np.inf
        return bound

    def _windows(self, least: Floats, loss: int) -> tuple[Floats | None, Floats, int]:
        """Least reduced cost where the size may be too small, least cost where it surely is not."""
        skip = -(-loss // self._unit)
        width = (self._high - self._low + loss) // self._unit + 1 - skip
        cost = least + self._price * self._unit * np.arange(least.shape[1])
        return _window_minimum(least, skip) if skip else None, _window_minimum(cost, width), skip


def _bucket(problem: Problem, number: int) -> tuple[int, Ints]:
    """Bucket width, and the largest rounding loss of each place."""
    divisor = math.gcd(*problem.size.tolist()) or 1
    finest = -(-(problem.high + 1) // (number * divisor))
    tries = sorted({finest + finest * i // _UNITS_TRIED for i in range(_UNITS_TRIED)})

    def losses(unit: int) -> Ints:
        return np.maximum.reduceat(problem.size % unit, problem.start)

    # Equal sizes lose equally: of widths up to twice the finest, one nearly divides them.
    unit = min((width * divisor for width in tries), key=lambda unit: int(losses(unit).sum()))
    return unit, losses(unit)


def _window_minimum(values: Floats, width: int) -> Floats:
    """``out[:, t] = min(values[:, t : t + width])``, by doubling; a last column is infinite."""
    if width <= 0:
        return np.full((len(values), 1), np.inf)
    out = np.pad(values, ((0, 0), (0, 1)), constant_values=np.inf)
    span, width = 1, min(width, values.shape[1])
    while span < width:
        step = min(span, width - span)
        np.minimum(out[:, :-step], out[:, step:].copy(), out=out[:, :-step])
        span += step
    return out
