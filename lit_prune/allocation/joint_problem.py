"""The joint search's problem, and its Lagrangian: a bound on whatever contains a level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]
    Mask = npt.NDArray[np.bool_]

_STEPS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """Levels of all places, flat and sorted by place; in each place something has size 0.

    Attributes:
        place: Place of each level, ``[levels]``, ascending, every place at least once.
        index: What the caller knows the level by.
        size: Resource freed beyond the least that the place can free.
        cost: Predicted damage, nats.
        attention: Layers whose attention goes, beyond the place's least.
        low: Least total of ``size``.
        high: Largest total.
        limit: Largest total of ``attention``; 0, with all ``attention`` 0, where it cannot bind.
    """

    place: Ints
    index: Ints
    size: Ints
    cost: Floats
    attention: Ints
    low: int
    high: int
    limit: int

    @property
    def start(self) -> Ints:
        """First level of each place, ``[places]``."""
        return np.flatnonzero(np.diff(self.place, prepend=-1))

    def keep(self, mask: Mask) -> Problem | None:
        """Keep some levels, less those that fit no selection; None if that leaves a place bare."""
        number = int(self.place[-1]) + 1
        while True:
            place, size, attention = self.place[mask], self.size[mask], self.attention[mask]
            start = np.flatnonzero(np.diff(place, prepend=-1))
            if len(start) < number:
                return None
            least, most = np.minimum.reduceat(size, start), np.maximum.reduceat(size, start)
            fewest = np.minimum.reduceat(attention, start)
            size, attention = size - least[place], attention - fewest[place]
            low, high = self.low - int(least.sum()), self.high - int(least.sum())
            limit = self.limit - int(fewest.sum())
            span = most - least
            reach = int(span.sum())
            useful = (size <= high) & (size + (reach - span[place]) >= low) & (attention <= limit)
            if useful.all():
                break
            mask = mask.copy()
            mask[mask] = useful
        if int(np.maximum.reduceat(attention, start).sum()) <= limit:
            attention, limit = np.zeros_like(attention), 0
        index, cost = self.index[mask], self.cost[mask]
        # Totals are multiples of the divisor, so that the window may begin and end at one.
        divisor = math.gcd(*size.tolist()) or 1
        low, high = -(-max(low, 0) // divisor) * divisor, min(high, reach) // divisor * divisor
        if low > high:
            return None
        return Problem(place, index, size, cost, attention, low, high, limit)

    def mirrored(self) -> Problem:
        """Count what is *not* freed: the same problem with the two ends of the window swapped."""
        most = np.maximum.reduceat(self.size, self.start)
        size, total = most[self.place] - self.size, int(most.sum())
        low, high = total - self.high, total - self.low
        return Problem(
            self.place, self.index, size, self.cost, self.attention, low, high, self.limit
        )


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Prices of the relaxed constraints: ``cost - size_price size + attention_price attention``.

    A positive ``size_price`` pays for the lower end of the window, a negative one for the upper.
    Any prices give a valid bound (Lagrangian duality).
    """

    size_price: float
    attention_price: float

    def mirrored(self) -> Multipliers:
        """The same prices for the mirrored problem."""
        return Multipliers(-self.size_price, self.attention_price)

    def bounds(self, problem: Problem) -> Floats:
        """For each level, a lower bound on the cost of all selections that contain it."""
        reduced = (
            problem.cost - self.size_price * problem.size + self.attention_price * problem.attention
        )
        least = np.minimum.reduceat(reduced, problem.start)
        bound = problem.low if self.size_price > 0 else problem.high
        relaxed = self.size_price * bound - self.attention_price * problem.limit
        magnitude = float(np.abs(least).sum()) + abs(relaxed)
        root = math.fsum(least) + relaxed - rounding(len(least), magnitude)
        bounds: Floats = (reduced - least[problem.place]) + root
        return bounds


def rounding(terms: int, magnitude: float) -> float:
    """What a sum of so many numbers may be wrong by: bounds are lowered by it."""
    return 4 * (terms + 2) * float(np.finfo(np.float64).eps) * magnitude


@dataclass(frozen=True, slots=True)
class _Point:
    """A (mixture of) relaxed selection(s)."""

    cost: float
    size: float
    attention: float


def best_multipliers(problem: Problem) -> Multipliers:
    """Prices that (nearly) maximise the bound at the root: two nested concave maximisations.

    Both are piecewise linear; each step evaluates where the lines at both ends meet.
    """
    price, first = _size_price(problem, 0.0)
    if first.attention <= problem.limit:
        return Multipliers(price, 0.0)
    charge = float(problem.cost.max()) or 1.0
    price, second = _size_price(problem, charge)
    for _ in range(_STEPS):
        if second.attention <= problem.limit:
            break
        charge *= 2
        price, second = _size_price(problem, charge)
    for _ in range(_STEPS):
        if not first.attention > second.attention:
            break
        charge = max((second.cost - first.cost) / (first.attention - second.attention), 0.0)
        price, middle = _size_price(problem, charge)
        gain = first.cost - middle.cost + charge * (first.attention - middle.attention)
        if gain <= 1e-12 * abs(first.cost):
            break
        if middle.attention > problem.limit:
            first = middle
        else:
            second = middle
    return Multipliers(price, charge)


def _size_price(problem: Problem, charge: float) -> tuple[float, _Point]:
    """The best size price for a given attention price, and the mixture that meets the window."""
    value = problem.cost + charge * problem.attention

    def point(preferred: Floats) -> _Point:
        least = np.minimum.reduceat(preferred, problem.start)[problem.place]
        hits = np.flatnonzero(preferred == least)
        chosen = hits[np.diff(problem.place[hits], prepend=-1) > 0]
        return _Point(
            math.fsum(problem.cost[chosen]),
            int(problem.size[chosen].sum()),
            int(problem.attention[chosen].sum()),
        )

    one = point(value)
    if problem.low <= one.size <= problem.high:
        return 0.0, one
    short = one.size < problem.low
    target = problem.low if short else problem.high
    most = np.maximum.reduceat(problem.size, problem.start)[problem.place] if short else 0
    other = point(np.where(problem.size == most, value, np.inf))
    price = 0.0
    for _ in range(_STEPS):
        if one.size == other.size:
            break
        rise = (other.cost - one.cost) + charge * (other.attention - one.attention)
        price = rise / (other.size - one.size)
        middle = point(value - price * problem.size)
        gain = one.cost - middle.cost + charge * (one.attention - middle.attention)
        if gain - price * (one.size - middle.size) <= 1e-12 * abs(rise):
            break
        if (middle.size < target) == short:
            one = middle
        else:
            other = middle
    part = (other.size - target) / (other.size - one.size) if one.size != other.size else 1.0

    def mix(a: float, b: float) -> float:
        return part * a + (1 - part) * b

    cost, attention = mix(one.cost, other.cost), mix(one.attention, other.attention)
    return price, _Point(cost, target, attention)
