"""The usual way to write a method: score every unit, then distribute the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_prune.allocation import Ranking, global_choice, require_met, uniform_choice
from lit_prune.decoder import DecoderParts, all_kept
from lit_prune.methods.decision import Decision

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lit_prune.config import Granularity
    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case

UNITS: tuple[Granularity, ...] = ("kv_group", "channel")
WITH_EXPERTS: tuple[Granularity, ...] = (*UNITS, "expert")


def by_score(score: Callable[[Case], dict[SubBlock, Tensor]]) -> Callable[[Case], Decision]:
    """Return a method's ``decide`` from a function that scores units; higher stays.

    Only the order inside a sub-block counts under ``uniform``; under ``global`` the scores of all
    layers and kinds are compared as they are.
    """

    def decide(case: Case) -> Decision:
        scores = {place: found.double().cpu() for place, found in score(case).items()}
        arrays = {place: found.numpy() for place, found in scores.items()}
        ranking = Ranking(arrays, dict.fromkeys(arrays, 1))
        if not case.config.pruning_ratio:
            return Decision.of(all_kept(case.spec), ranking, {"stages": "nothing to remove"})
        if case.config.allocator == "global":
            counts = global_choice(case.budget, arrays)
        else:
            counts = uniform_choice(case.budget)
            require_met(case.budget, counts)
        return Decision.of(counts, ranking, {"allocator": case.config.allocator})

    return decide


def output_weights(case: Case) -> dict[SubBlock, Tensor]:
    """Return the weight of every output projection, ``[hidden_size, width]``, float64."""
    parts = DecoderParts(case.model)
    return {
        (index, part.kind): parts.output(index, part.kind).weight.detach().double()
        for index, part in case.spec.sub_blocks
    }


def column_squares(case: Case) -> dict[SubBlock, Tensor]:
    """Return ``||W_:j||^2`` of every output projection, ``[width]``; one for what experts add."""
    parts = DecoderParts(case.model)
    return {
        (index, part.kind): torch.ones(part.num_units * part.unit_width, dtype=torch.float64)
        if part.unit == "expert"
        else parts.output(index, part.kind).weight.detach().double().square().sum(0).cpu()
        for index, part in case.spec.sub_blocks
    }


def summed(case: Case, columns: dict[SubBlock, Tensor]) -> dict[SubBlock, Tensor]:
    """Add scores of columns ``[width]`` up to scores of the units that own them, ``[units]``."""
    return {
        (index, part.kind): columns[index, part.kind].reshape(part.num_units, -1).sum(1)
        for index, part in case.spec.sub_blocks
    }
