"""Lower bounds for the depth-first search: all suffixes of layers solved, sizes in buckets."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from lit_prune.allocation.search import LayerOption

    Vector = npt.NDArray[np.float64]

_BUCKETS = 1 << 15
_COARSE_BUCKETS = 1 << 10
_UNITS_TRIED = 256
# Deeper in the tree the best multiplier is another one: these multiples of the root's are kept.
_PARTS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


class CostBounds:
    """Least cost of completing a partial selection, never too high.

    Sizes are rounded down to a bucket, and each suffix of layers is solved by dynamic programming
    over the buckets. A suffix's true size lies between its bucketed size and that plus the suffix's
    largest rounding loss, so that the cheapest entry within the widened window is a lower bound;
    infinite means that no completion fits. With sizes whose multiples all fit into the table the
    bound is exact.

    A limit on removed attentions is relaxed: each one is charged ``multiplier`` and the limit's
    worth is refunded. Any multiplier >= 0 gives a valid bound (Lagrangian duality), and the highest
    of several counts; the fewest attentions with which a suffix can fit at all are kept beside
    them.

    Args:
        layers: Options of each layer, in the order in which the search decides them.
        minimum: Parameters to free, at least; positive.
        maximum: Parameters to free, at most; None for no limit.
        attention_limit: Most layers that may lose their attention.

    Example:
        >>> from lit_prune.allocation.search import LayerOption
        >>> nothing = LayerOption(chosen=(), cost=0.0, size=0, attention=0)
        >>> block = LayerOption(chosen=(), cost=1.5, size=10, attention=1)
        >>> bounds = CostBounds([[nothing, block]] * 3, minimum=15, maximum=None, attention_limit=3)
        >>> bounds.completion(0, 0, 0), bounds.completion(2, 0, 0)
        (3.0, inf)
    """

    def __init__(
        self,
        layers: Sequence[Sequence[LayerOption]],
        *,
        minimum: int,
        maximum: int | None,
        attention_limit: int,
    ) -> None:
        self._layers, self._minimum, self._limit = layers, minimum, attention_limit
        largest = max((option.size for options in layers for option in options), default=0)
        # A selection that exceeds the minimum by a whole layer can drop that layer at no cost.
        enough = minimum + largest
        self._maximum = enough if maximum is None else min(maximum, enough)
        divisor = math.gcd(*(option.size for options in layers for option in options)) or 1
        self._unit, self._loss = self._buckets(_BUCKETS, divisor)
        self._tables = [(0.0, self._windows(1.0, 0.0, self._unit, self._loss))]
        self._fewest: list[memoryview] | None = None
        could_lose = sum(any(option.attention for option in options) for options in layers)
        if attention_limit < could_lose:
            self._fewest = self._windows(0.0, 1.0, self._unit, self._loss)
            multiplier = self._multiplier(*self._buckets(_COARSE_BUCKETS, divisor))
            for part in _PARTS if multiplier > 0 else ():
                table = self._windows(1.0, part * multiplier, self._unit, self._loss)
                self._tables.append((part * multiplier, table))

    def completion(self, level: int, size: int, attention: int) -> float:
        """Bound the cost of deciding layers ``level`` and after, so that the whole selection fits.

        Args:
            level: Number of layers decided.
            size: Parameters freed by them.
            attention: How many of them lost their attention.

        Returns:
            A lower bound, nats; infinite if nothing fits.
        """
        if size > self._maximum or attention > self._limit:
            return math.inf
        lacking = self._minimum - size
        if lacking <= 0:
            return 0.0
        first = max(-((self._loss[level] - lacking) // self._unit), 0)
        if first >= len(self._tables[0][1][level]):
            return math.inf
        left = self._limit - attention
        if self._fewest is not None and self._fewest[level][first] > left:
            return math.inf
        return max(table[level][first] - multiplier * left for multiplier, table in self._tables)

    def _buckets(self, number: int, divisor: int) -> tuple[int, list[int]]:
        """Bucket width, and the largest rounding loss of each suffix, in parameters."""
        finest = -(-self._maximum // (number * divisor))
        tries = {finest + finest * i // _UNITS_TRIED for i in range(_UNITS_TRIED)}

        def losses(unit: int) -> list[int]:
            return [max(option.size % unit for option in options) for options in self._layers]

        # Equal sizes lose equally: of widths up to twice the finest, one nearly divides them.
        unit = min((width * divisor for width in sorted(tries)), key=lambda unit: sum(losses(unit)))
        return unit, [*accumulate(reversed(losses(unit)), initial=0)][::-1]

    def _windows(self, price: float, charge: float, unit: int, loss: list[int]) -> list[memoryview]:
        """For each suffix and bucket t: the least sum over t and all above that may still fit.

        What is summed over the chosen options: price x cost + charge x attention.
        """
        length = self._maximum // unit + 1
        least = np.full(length, math.inf)
        least[0] = 0.0
        windows = [least]
        for options, slack in zip(reversed(self._layers), loss[-2::-1], strict=True):
            longer = np.full(length, math.inf)
            for option in options:
                shift = option.size // unit
                if shift < length:
                    cost = price * option.cost + charge * option.attention
                    np.minimum(longer[shift:], least[: length - shift] + cost, out=longer[shift:])
            least = longer
            width = (self._maximum - self._minimum + slack) // unit + 1
            windows.append(_window_minimum(least, width))
        # Reading one number from a memoryview is several times faster than from an array.
        return [memoryview(window) for window in reversed(windows)]

    def _multiplier(self, unit: int, loss: list[int]) -> float:
        """A multiplier that (nearly) maximises the bound at the root, which is concave in it."""

        def root(multiplier: float) -> float:
            first = max(-((loss[0] - self._minimum) // unit), 0)
            table = self._windows(1.0, multiplier, unit, loss)[0]
            value: float = table[first] if first < len(table) else math.inf
            return value - multiplier * self._limit

        low, high = 0.0, 4 * max(option.cost for options in self._layers for option in options)
        at_zero = root(0.0)
        if not math.isfinite(at_zero) or root(1e-6 * high) <= at_zero:
            return 0.0
        for _ in range(24):
            left, right = (2 * low + high) / 3, (low + 2 * high) / 3
            low, high = (left, high) if root(left) < root(right) else (low, right)
        return (low + high) / 2


def _window_minimum(values: Vector, width: int) -> Vector:
    """``out[t] = min(values[t : t + width])``, by doubling."""
    out = values.copy()
    span, width = 1, min(width, len(values))
    while span < width:
        step = min(span, width - span)
        np.minimum(out[:-step], out[step:].copy(), out=out[:-step])
        span += step
    return out
