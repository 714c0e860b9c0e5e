"""Preset ``wanda``: weight times activation norm, summed over a unit's output columns (Wanda-sp).

``wanda_ls`` keeps the same units and compensates by least squares.

References:
    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024: the
    metric. An et al. (FLAP), AAAI 2024, baseline "Wanda-sp": its structured form. GRAIL, arXiv
    2602.23795: the same with Gram least squares.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lit_prune.methods.decision import Method
from lit_prune.methods.scored import UNITS, by_score, output_weights, summed

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case


def score(case: Case) -> dict[SubBlock, Tensor]:
    """Return ``sum_j mean_i |W_ij| * sqrt(E[x_j ** 2])`` over the columns ``j`` of each unit."""
    columns = {}
    for place, weight in output_weights(case).items():
        mean, variance = case.calibration.units[place]
        norm = (variance + mean.square()).sqrt()
        columns[place] = weight.abs().mean(0).cpu() * norm
    return summed(case, columns)


# Of every preset that adds the compensation of GRAIL to another paper's units.
GRAIL_DEVIATIONS = (
    "Least squares is centred (with a bias), ridged towards the original weights, and its "
    "damping is chosen on held-out text for each sub-block; GRAIL's is not centred and ridged "
    "towards zero. Covariances are of the dense model, not of the pruned prefix.",
)
METHOD = Method(
    name="wanda",
    rule="units of least weight times activation leave first",
    source="Sun et al., A Simple and Effective Pruning Approach for LLMs (Wanda), ICLR 2024, in "
    "the structured form of An et al. (Wanda-sp)",
    decide=by_score(score),
    granularities=UNITS,
    allocators=("uniform", "global"),
    deviations=(
        "Activations are of the dense model; the code of Wanda-sp recomputes each layer's input "
        "from the pruned prefix.",
        "Counts meet the ratio over all parameters; its code removes int(ratio * units) of each "
        "kind.",
    ),
)
METHOD_LS = replace(
    METHOD,
    name="wanda_ls",
    source=f"{METHOD.source}, with the Gram compensation of GRAIL (arXiv 2602.23795)",
    compensation="least_squares",
    deviations=(*METHOD.deviations, *GRAIL_DEVIATIONS),
)
