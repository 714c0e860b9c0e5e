"""All layers alike: one number of KV groups, one of channels (of experts), whole blocks may go."""

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
    spec, cost, whole = budget.spec, budget.cost, all_kept(budget.spec)
    layers = [[(block.index, part.kind) for part in block.sub_blocks] for block in spec.blocks]
    layers = [places for places in layers if places]
    shared: dict[str, set[int]] = {}
    units = {(index, part.kind): part.unit for index, part in spec.sub_blocks}
    for place, allowed in budget.allowed.items():
        some, unit = {count for count in allowed if count}, units[place]
        shared[unit] = shared[unit] & some if unit in shared else some
    removable = [all(0 in budget.allowed[place] for place in places) for places in layers]
    slack = cost.bias * (len(whole) + 1)
    best: tuple[float, dict[SubBlock, int]] | None = None
    below, above = 0.0, math.inf
    for widths in product(*(sorted(counts) for counts in shared.values())):
        width = dict(zip(shared, widths, strict=True))
        counts = {place: width[units[place]] for place in whole}
        harm = {place: damage[place][whole[place] - counts[place]] for place in whole}
        extra = [
            sum(damage[place][whole[place]] - harm[place] for place in places) for places in layers
        ]
        leaving = sorted(
            (i for i in range(len(layers)) if removable[i]), key=lambda i: (extra[i], i)
        )
        total, left = sum(harm.values()), cost.of(counts)
        for number in range(len(leaving) + 1):
            if number:
                gone = layers[leaving[number - 1]]
                total += extra[leaving[number - 1]]
                left -= sum(cost.kept[place][counts[place]] for place in gone)
                left -= cost.shared.get(gone[0][0], 0)
                counts |= dict.fromkeys(gone, 0)
            if not any(count for (_, kind), count in counts.items() if kind == "attention"):
                break
            most, target = cost.total - left, budget.target  # before biases
            if most - slack - budget.tolerance <= target <= most + budget.tolerance or (
                best is None and below < most and most - slack < above
            ):  # others are not worth the counting of their biases
                removed = budget.removed(counts)
                met = abs(target - removed) <= budget.tolerance and counts != whole
                if met and (best is None or total < best[0]):
                    best = (total, dict(counts))
                if removed <= target:
                    below = max(below, removed)
                else:
                    above = min(above, removed)
            if most - slack - budget.tolerance > target:
                break
    if best is None:
        nearest = [f"{total / cost.total:.4f}" for total in (below, above) if total < math.inf]
        raise BudgetError(
            f"pruning_ratio {budget.config.ratio:g} of the {cost.words} cannot be reached "
            f"by equal widths in all layers: the nearest are {' and '.join(nearest)} "
            f"(channel_multiple {budget.channel_multiple}). Ask for one of these, set a smaller "
            "channel_multiple, or allow blocks to go."
        )
    return best[1], best[0]
