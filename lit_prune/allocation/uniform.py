"""The same ratio everywhere: how many units a sub-block keeps."""

from __future__ import annotations

from lit_prune.errors import ConfigError


def uniform_counts(num_units: int, ratio: float, *, minimum_kept: int, multiple: int) -> int:
    """Number of units to keep: the removed fraction as near to ``ratio`` as the rules allow.

    What may be kept: a multiple of ``multiple`` that is at least ``minimum_kept``, or all units. Of
    two equally near counts the larger is kept.

    Args:
        num_units: Units (KV groups or channels) that the sub-block has.
        ratio: Fraction of units to remove, in [0, 1].
        minimum_kept: Fewest units that may stay; at or above ``num_units``, all stay.
        multiple: Kept counts are multiples of this.

    Returns:
        Kept units, in [0, num_units].

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> uniform_counts(11008, 0.3, minimum_kept=64, multiple=64)
        7680
        >>> uniform_counts(100, 0.01, minimum_kept=1, multiple=64)
        100
    """
    if not 0 <= ratio <= 1:  # also false for NaN
        raise ConfigError(f"ratio must be a fraction in [0, 1], got {ratio!r}.")
    if num_units < 0 or minimum_kept < 0 or multiple < 1:
        raise ConfigError(
            "num_units and minimum_kept must be >= 0 and multiple >= 1, got "
            f"{num_units}, {minimum_kept} and {multiple}."
        )
    wanted = num_units * (1 - ratio)
    below = int(wanted // multiple) * multiple
    smallest = -(-minimum_kept // multiple) * multiple
    choices = {below, below + multiple, smallest, num_units}
    # Around 1e-9 of a unit is rounding of `wanted`, not a preference.
    return max(
        (k for k in choices if k == num_units or smallest <= k <= num_units),
        key=lambda k: (-round(abs(k - wanted), 9), k),
    )
