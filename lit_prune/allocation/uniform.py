"""The same ratio everywhere: how many units a sub-block keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.decoder import all_kept
from lit_prune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_prune.allocation.budget import Budget
    from lit_prune.decoder import SubBlock


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


def uniform_choice(budget: Budget) -> dict[SubBlock, int]:
    """Return the counts of equal ratio everywhere that come nearest to the budget.

    Among the shares of KV groups that meet it, the one nearest to the ratio itself; then channels
    fill up what is missing.
    """
    best = all_kept(budget.spec)
    miss = float("inf")
    share_of_best = None
    for share, counts in uniform_choices(budget):
        if share_of_best not in (None, share) and miss <= budget.tolerance:
            break
        if counts != all_kept(budget.spec) and abs(budget.deficit(counts)) < miss:
            best, miss, share_of_best = counts, abs(budget.deficit(counts)), share
    return best


def uniform_choices(budget: Budget) -> Iterator[tuple[float, dict[SubBlock, int]]]:
    """Yield every share of KV groups with every share of channels, nearest to the ratio first."""
    spec, config = budget.spec, budget.config
    parts = [
        (index, part) for index, part in spec.sub_blocks if index not in config.protected_layers
    ]
    groups = {c for i, p in parts if p.kind == "attention" for c in budget.allowed[i, p.kind]}
    shares = {1 - count / max(groups) for count in groups} or {0.0}
    widest = max((p.num_units for _, p in parts if p.kind == "mlp"), default=1)
    step = budget.channel_multiple if "channel" in config.granularities else widest
    for share in sorted(shares, key=lambda share: (abs(share - config.pruning_ratio), share)):
        for kept in range(widest, 0, -step):
            counts = all_kept(spec)
            for index, part in parts:
                if len(budget.allowed[index, part.kind]) > 1:
                    attends = part.kind == "attention"
                    counts[index, part.kind] = uniform_counts(
                        part.num_units,
                        share if attends else 1 - kept / widest,
                        minimum_kept=config.min_kv_groups if attends else 1,
                        multiple=1 if attends else budget.channel_multiple,
                    )
            yield share, counts
