"""What each layer could lose: the weights behind a ratio for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_prune.allocation import Budget
    from lit_prune.decoder import SubBlock


def unit_sizes(budget: Budget) -> dict[SubBlock, int]:
    """Return the parameters in the units of each sub-block; 0 where none of them may leave."""
    return {
        (index, part.kind): part.num_units * part.unit_parameters
        if len(budget.allowed[index, part.kind]) > 1
        else 0
        for index, part in budget.spec.sub_blocks
    }


def layer_sizes(budget: Budget) -> list[int]:
    """Return `unit_sizes`, added up for each layer."""
    sizes = [0] * len(budget.spec.blocks)
    for (index, _), size in unit_sizes(budget).items():
        sizes[index] += size
    return sizes
