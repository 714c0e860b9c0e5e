"""One threshold for all layers: the lowest-scored units of the whole model leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lit_prune.allocation.settle import Ranking, settled
from lit_prune.decoder import all_kept

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from lit_prune.allocation.budget import Budget
    from lit_prune.decoder import SubBlock


def global_choice(
    budget: Budget, scores: Mapping[SubBlock, npt.NDArray[np.float64]]
) -> dict[SubBlock, int]:
    """Remove the lowest-scored units of all layers until the budget is met.

    Scores of KV groups and channels are compared as they are; a unit counts for the parameters that
    leave with it. Every sub-block keeps its least allowed count. Counts are then rounded to allowed
    ones and settled.

    Args:
        budget: Target and allowed counts.
        scores: Score of each unit; higher stays.

    Returns:
        Kept units by ``(layer, kind)``.

    Raises:
        BudgetError: If the ratio is not met.
    """
    sizes = {(index, part.kind): part.unit_parameters for index, part in budget.spec.sub_blocks}
    room = {
        place: max(allowed) - min(count for count in allowed if count)
        for place, allowed in budget.allowed.items()
    }
    leaving = sorted(
        (float(scores[place][unit]), place, int(unit))
        for place in scores
        # those beyond the room stay, whatever their score
        for unit in np.argsort(scores[place], kind="stable")[: room[place]]
    )
    counts, freed = all_kept(budget.spec), 0
    for _, place, _ in leaving:
        if freed >= budget.target:
            break
        counts[place] -= 1
        freed += sizes[place]
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    return settled(
        budget, {place: budget.nearest(place, n) for place, n in counts.items()}, ranking
    )


def ratio_choice(budget: Budget, ratios: Sequence[float], ranking: Ranking) -> dict[SubBlock, int]:
    """Remove a given fraction of the units of each layer, then settle on the budget.

    Args:
        budget: Target and allowed counts.
        ratios: Fraction of KV groups and of channels to remove, one for each layer.
        ranking: In which order units leave.

    Raises:
        BudgetError: If the ratio is not met.
    """
    counts = {
        place: round(units * (1 - ratios[place[0]]))
        for place, units in all_kept(budget.spec).items()
    }
    return settled(
        budget, {place: budget.nearest(place, n) for place, n in counts.items()}, ranking
    )
