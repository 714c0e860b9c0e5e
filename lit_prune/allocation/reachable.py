"""Which totals a set of choices can reach: known before any score is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lit_prune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# About half a second of shifting big integers; beyond this, sizes are put into buckets.
_EXACT_BIT_OPERATIONS = 4e10
_EXACT_BITS = 8e8  # 100 MB of bitsets
_BUCKETS = 20_000


def reachable_totals(
    options: Sequence[Sequence[int]], target: int, tolerance: int, total: int
) -> tuple[int | None, int | None, bool]:
    """Find the totals nearest to ``target`` when one number is chosen from each list.

    A bitset holds all sums at once, in units of the greatest common divisor: exact. Where that is
    too large (many options with a tiny divisor), each number is rounded to the nearest of ``total /
    20000``. What is returned is a sum of real options even then, only not surely the nearest.

    Args:
        options: For each decision, the parameter counts that it may remove; >= 0, none of the lists
            empty.
        target: Parameters to remove.
        tolerance: Largest accepted distance from ``target``, parameters.
        total: Parameters that the ratio is a fraction of; sets the width of the buckets.

    Returns:
        Nearest reachable total at or below the target, nearest at or above (None where there is
        none), and whether one of them is within ``tolerance``.

    Raises:
        ConfigError: If a list is empty or a count negative.

    Example:
        >>> reachable_totals([[0, 40], [0, 25]], target=30, tolerance=3, total=100)
        (25, 40, False)
    """
    lists = [[(size, 0) for size in choices] for choices in options]
    below, above = nearest_totals(lists, below=target, above=target, total=total)
    near = any(x is not None and abs(x - target) <= tolerance for x in (below, above))
    return below, above, near


def nearest_totals(
    options: Sequence[Sequence[tuple[int, int]]],
    *,
    below: int,
    above: int,
    total: int,
    most: int | None = None,
) -> tuple[int | None, int | None]:
    """Like `reachable_totals`, around a gap: at or below ``below``, at or above ``above``.

    Each option is (parameters, 0 or 1); the second numbers of the chosen options may add up to
    ``most``.

    Example:
        >>> options = [[(0, 0), (40, 1)], [(0, 0), (25, 1)]]
        >>> nearest_totals(options, below=30, above=50, total=100, most=1)
        (25, None)
    """
    lists = [sorted(set(choices)) for choices in options]
    if any(not choices or choices[0][0] < 0 for choices in lists):
        raise ConfigError("each decision needs at least one option, and no option may be negative.")
    # Bit (t * stride + k) of prefix[i]: the first i decisions can add up to t units and k.
    stride = 1 if most is None else len(lists) + 1
    divisor = math.gcd(*(size for choices in lists for size, _ in choices)) or 1
    bits = stride * (sum(choices[-1][0] for choices in lists) // divisor + 1)
    work = bits * sum(map(len, lists))
    exact = work <= _EXACT_BIT_OPERATIONS and bits * len(lists) <= _EXACT_BITS
    unit = divisor if exact else max(total // _BUCKETS, divisor)

    encoded: list[dict[int, int]] = []
    for choices in lists:
        encoded.append({})
        for size, count in choices:
            encoded[-1].setdefault((2 * size + unit) // (2 * unit) * stride + count, size)
    prefix = [1]
    for choice in encoded:
        reach = 0
        for shift in choice:
            reach |= prefix[-1] << shift
        prefix.append(reach)
    final = prefix[-1]
    if most is not None and most < stride - 1:
        repeats = final.bit_length() // stride + 1
        every = ((1 << stride * repeats) - 1) // ((1 << stride) - 1)  # one bit at each multiple
        final &= every * ((1 << max(most, -1) + 1) - 1)

    # Rounding may put a total on the wrong side: begin a few buckets beyond it.
    slack = 0 if exact else math.isqrt(len(lists)) + 1
    under = over = None
    t = _highest_at_most(final, (below // unit + slack + 1) * stride - 1)
    while t is not None and under is None:
        size = _sum_of(encoded, prefix, t)
        under = size if size <= below else None
        t = _highest_at_most(final, t // stride * stride - 1)
    t = _lowest_at_least(final, max(-(-above // unit) - slack, 0) * stride)
    while t is not None and over is None:
        size = _sum_of(encoded, prefix, t)
        over = size if size >= above else None
        t = _lowest_at_least(final, (t // stride + 1) * stride)
    return under, over


def _highest_at_most(bits: int, limit: int) -> int | None:
    length = (bits & ((2 << limit) - 1)).bit_length() if limit >= 0 else 0
    return length - 1 if length else None


def _lowest_at_least(bits: int, limit: int) -> int | None:
    rest = bits >> limit
    return limit + (rest & -rest).bit_length() - 1 if rest else None


def _sum_of(encoded: list[dict[int, int]], prefix: list[int], t: int) -> int:
    """Walk back from bit ``t`` to one choice for each decision, and add up the real sizes."""
    size = 0
    for choice, reach in zip(reversed(encoded), reversed(prefix[:-1]), strict=True):
        shift = next(s for s in choice if s <= t and reach >> (t - s) & 1)
        size += choice[shift]
        t -= shift
    return size
