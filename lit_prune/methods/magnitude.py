"""Preset ``magnitude``: units of least weight norm, the same fraction in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_prune.decoder import DecoderParts
from lit_prune.methods.decision import Method
from lit_prune.methods.scored import WITH_EXPERTS, by_score

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case


def score(case: Case) -> dict[SubBlock, Tensor]:
    """Return the sum of squares of all weights that leave with a unit, biases left out."""
    parts = DecoderParts(case.model)
    found: dict[SubBlock, Tensor] = {}
    for index, part in case.spec.sub_blocks:
        total = torch.zeros(part.num_units, dtype=torch.float64)
        if (routed := parts.routed(index, part.kind)) is not None:
            for _, name, parameter in routed.owned:
                if not name.endswith("bias"):
                    total += parameter.detach().double().square().flatten(1).sum(1).cpu()
            found[index, part.kind] = total
            continue
        for linear in parts.inputs(index, part.kind):
            squares = linear.weight.detach().double().square().sum(1).cpu()
            total += squares.reshape(part.num_units, -1).sum(1)
        squares = parts.output(index, part.kind).weight.detach().double().square().sum(0).cpu()
        found[index, part.kind] = total + squares.reshape(part.num_units, -1).sum(1)
    return found


METHOD = Method(
    name="magnitude",
    rule="units of least weight norm leave first, the same fraction in every layer",
    source="Han et al., Learning both Weights and Connections, NeurIPS 2015, by groups: the L2 "
    "baseline of LLM-Pruner (Ma et al., NeurIPS 2023)",
    decide=by_score(score),
    granularities=WITH_EXPERTS,
    allocators=("uniform", "global"),
)
