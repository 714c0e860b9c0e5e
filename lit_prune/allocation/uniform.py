"""The same ratio everywhere: how many units a sub-block keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.decoder import all_kept

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_prune.allocation.budget import Budget
    from lit_prune.decoder import SubBlock


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
    unit = "channel" if any(p.unit == "channel" for _, p in parts) else "expert"
    widest = max((p.num_units for _, p in parts if p.unit == unit), default=1)
    fine = budget.channel_multiple if unit == "channel" else 1
    step = fine if unit in config.granularities else widest
    for share in sorted(shares, key=lambda share: (abs(share - config.ratio), share)):
        for kept in range(widest, 0, -step):
            counts = all_kept(spec)
            for index, part in parts:
                stays = 1 - share if part.kind == "attention" else kept / widest
                counts[index, part.kind] = budget.nearest(
                    (index, part.kind), part.num_units * stays
                )
            yield share, counts
