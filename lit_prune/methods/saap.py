"""Preset ``saap``: fused coarse and fine Taylor importance; unstable layers lose more.

References:
    Zheng et al., "Adaptive Pruning for Large Language Models with Structural Importance Awareness"
    (SAAP), arXiv 2412.15127. We know its abstract and descriptions by others; its formulas for the
    fluctuation of importance and for the ratio of a layer are RECONSTRUCTED here. Kendall & Gal,
    "What uncertainties do we need in Bayesian deep learning for computer vision?", NeurIPS 2017,
    for the form of the fusion.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lit_prune.allocation import Ranking, block_ratios, ratio_choice
from lit_prune.calibration import TAYLOR_SCORES, Needs
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.layer_sizes import layer_sizes, unit_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case

_GRANULARITIES = ("vector_mixed", "element_mixed")


def noise_variances(case: Case) -> list[float]:
    """Return ``sigma_m^2`` of the coarse and of the fine importance.

    What minimises ``sum_i I_i / (2 sigma^2) + log(sigma)`` over all units ``i``: the mean
    importance.
    """
    scores = torch.cat([_scores(case, place) for place in _taylor(case)])
    return [float(mean) for mean in scores.mean(0).clamp_min(1e-300)]


def score(case: Case) -> dict[SubBlock, Tensor]:
    """Return ``sum_m I_m / (2 sigma_m^2) + log(sigma_m)`` of every unit, ``m`` coarse and fine."""
    variances = noise_variances(case)
    constant = sum(0.5 * math.log(variance) for variance in variances)
    return {place: _weighted(case, place, variances) + constant for place in _taylor(case)}


def stability(case: Case) -> dict[SubBlock, float]:
    """Return how much importance fluctuates in each sub-block: deviation over mean of its units.

    Of the weighted sum only: the constants are the same for all units and would shift the mean.
    """
    variances = noise_variances(case)
    found = {}
    for place in _taylor(case):
        fused = _weighted(case, place, variances)
        found[place] = float(fused.std(correction=0) / fused.mean().clamp_min(1e-300))
    return found


def layer_stability(case: Case) -> list[float]:
    """Return the mean of `stability` over the sub-blocks of each layer, by what they could lose."""
    found, sizes = stability(case), unit_sizes(case.budget)
    totals = layer_sizes(case.budget)
    means = [0.0] * len(totals)
    for place, value in found.items():
        means[place[0]] += value * sizes[place] / max(totals[place[0]], 1)
    return means


def decide(case: Case) -> Decision:
    """Rank layers by how much importance fluctuates in them; the ones that do so most lose most."""
    if not case.config.pruning_ratio:
        return Decision.whole(case.spec)
    scores = {place: fused.numpy() for place, fused in score(case).items()}
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    indicator, sizes = layer_stability(case), layer_sizes(case.budget)
    ratios = block_ratios(
        [-value for value in indicator],
        sizes,
        min(case.budget.target / sum(sizes), 1.0),
        ratio_map="rank",
        strength=case.config.ratio_strength,
    )
    counts = ratio_choice(case.budget, ratios, ranking)
    trace = {
        "noise_variances": noise_variances(case),
        "stability": indicator,
        "layer_ratios": list(ratios),
    }
    return Decision.of(counts, ranking, trace)


def _taylor(case: Case) -> dict[SubBlock, Tensor]:
    assert case.calibration.taylor is not None  # noqa: S101 - `needs` asked for it
    return case.calibration.taylor


def _scores(case: Case, place: SubBlock) -> Tensor:
    """Coarse and fine importance of the units of a sub-block, ``[units, 2]``."""
    return _taylor(case)[place][:, [TAYLOR_SCORES.index(name) for name in _GRANULARITIES]]


def _weighted(case: Case, place: SubBlock, variances: list[float]) -> Tensor:
    return (_scores(case, place) / (2 * torch.tensor(variances, dtype=torch.float64))).sum(1)


METHOD = Method(
    name="saap",
    rule="units of least fused Taylor importance leave first, more in layers where it is unstable",
    source="Zheng et al., SAAP, arXiv 2412.15127, without its fine-tuning",
    decide=decide,
    needs=lambda _config: Needs(taylor=True),
    options=("ratio_strength",),
    granularities=("kv_group", "channel"),
    allocators=("global",),
    deviations=(
        "Reconstructed, as we could not read the paper's formulas: the noise of each importance is "
        "its mean over all units (published: learned); the stability indicator is the deviation "
        "over the mean of the units' importance in a sub-block, averaged over a layer; a layer's "
        "ratio rises with its rank by that indicator, from 1 - s to 1 + s times the mean ratio "
        "(ratio_strength s). Published: unstable structures are pruned, layers unevenly.",
        "The group-wise quantised fine-tuning is left out.",
        "KV groups leave whole, also under grouped-query attention.",
        "Gradients are of the calibration text; the diagonal Fisher stands for the Hessian.",
    ),
)
