"""All layers alike: one number of KV groups, one of channels, and whole blocks that may go."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

from lit_prune.decoder import all_kept
from lit_prune.errors import BudgetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_prune.allocation.budget import Budget
    from lit_prune.decoder import SubBlock


def alike_choice(
    budget: Budget, damage: Mapping[SubBlock, Sequence[float]]
) -> tuple[dict[SubBlock, int], float]:
    """Find the equal widths, and the blocks that go whole, of least predicted damage.

    Every pair of widths is tried with every number of removed blocks; for one pair, the blocks that
    go are those whose removal adds least. That is exact where all layers are of one size, as they
    are in a model that was not pruned before (up to the biases of compensation: which blocks go may
    decide where one is needed).

    Args:
        budget: Target and allowed counts.
        damage: Predicted damage of removing 0, 1, … all units of each sub-block.

    Returns:
        Kept units by ``(layer, kind)``, and their predicted damage.

    Raises:
        BudgetError: If no equal widths meet the ratio; names the nearest.
    """
    spec, whole = budget.spec, all_kept(budget.spec)
    layers = [[(block.index, part.kind) for part in block.sub_blocks] for block in spec.blocks]
    layers = [places for places in layers if places]
    shared: dict[str, set[int]] = {}
    for (_, kind), allowed in budget.allowed.items():
        some = {count for count in allowed if count}
        shared[kind] = shared[kind] & some if kind in shared else some
    removable = [all(0 in budget.allowed[place] for place in places) for places in layers]
    best: tuple[float, dict[SubBlock, int]] | None = None
    nearest = math.inf
    for widths in product(*(sorted(counts) for counts in shared.values())):
        width = dict(zip(shared, widths, strict=True))
        counts = {place: width[place[1]] for place in whole}
        cost = {place: damage[place][whole[place] - counts[place]] for place in whole}
        extra = [
            sum(damage[place][whole[place]] - cost[place] for place in places) for places in layers
        ]
        leaving = sorted(
            (i for i in range(len(layers)) if removable[i]), key=lambda i: (extra[i], i)
        )
        total = sum(cost.values())
        for number in range(len(leaving) + 1):
            if number:
                total += extra[leaving[number - 1]]
                counts |= dict.fromkeys(layers[leaving[number - 1]], 0)
            if not any(count for (_, kind), count in counts.items() if kind == "attention"):
                break
            deficit = budget.deficit(counts)
            nearest = min(nearest, abs(deficit), key=abs)
            if abs(deficit) <= budget.tolerance and (best is None or total < best[0]):
                best = (total, dict(counts))
            if deficit < -budget.tolerance:
                break
    if best is None:
        raise BudgetError(
            f"no equal widths of all layers meet pruning_ratio {budget.config.pruning_ratio:g}: "
            f"the nearest miss it by {nearest / spec.decoder_parameters:.4f} (channel_multiple "
            f"{budget.channel_multiple}). Set a smaller channel_multiple, or allow blocks to go."
        )
    return best[1], best[0]
