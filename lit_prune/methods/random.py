"""Preset ``random``: the control. Which units stay is drawn, the same number in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_prune.methods.decision import Method
from lit_prune.methods.scored import WITH_EXPERTS, by_score

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case


def score(case: Case) -> dict[SubBlock, Tensor]:
    """Draw a score for each unit from ``seed``."""
    generator = torch.Generator().manual_seed(case.config.seed)
    return {
        (index, part.kind): torch.rand(part.num_units, generator=generator, dtype=torch.float64)
        for index, part in case.spec.sub_blocks
    }


METHOD = Method(
    name="random",
    rule="a control: what stays is drawn, the same number in every layer",
    source="control",
    decide=by_score(score),
    granularities=WITH_EXPERTS,
    allocators=("uniform", "global"),
)
