"""Preset ``owl``: Wanda's units, with the layer ratios of outlier-weighed layerwise sparsity.

References:
    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, and its code: M = 5, lambda
    = 0.08.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lit_prune.allocation import Ranking, ratio_choice
from lit_prune.calibration import Needs
from lit_prune.decoder import DecoderParts, all_kept
from lit_prune.methods import wanda
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.scored import UNITS

if TYPE_CHECKING:
    from lit_prune.methods.decision import Case

# Published defaults: an outlier is above this many means; ratios differ by at most twice the span.
_OUTLIER, _SPAN = 5.0, 0.08


def outlier_fractions(case: Case) -> list[float]:
    """Return the fraction of each layer's ``|W_ij| * ||x_j||`` above `_OUTLIER` times its mean."""
    parts, calibration = DecoderParts(case.model), case.calibration
    assert calibration.inputs is not None  # noqa: S101 - `needs` asked for it
    fractions = []
    for block in case.spec.blocks:
        metrics = []
        for part in block.sub_blocks:
            place = (block.index, part.kind)
            reads = calibration.inputs[place].sqrt()
            mean, variance = calibration.units[place]
            pairs = [(linear, reads) for linear in parts.inputs(*place)]
            pairs.append((parts.output(*place), (variance + mean.square()).sqrt()))
            for linear, norm in pairs:
                weight = linear.weight.detach().abs()
                metrics.append((weight * norm.to(weight)).flatten().float())
        metric = torch.cat(metrics) if metrics else torch.zeros(1)
        outliers = metric > _OUTLIER * metric.mean()
        fractions.append(float(outliers.double().mean()))
    return fractions


def decide(case: Case) -> Decision:
    """Layers with more outliers lose less."""
    scores = {place: found.numpy() for place, found in wanda.score(case).items()}
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    if not case.config.pruning_ratio:
        return Decision.of(all_kept(case.spec), ranking)
    found = np.array(outlier_fractions(case))
    spread = found.max() - found.min()
    scaled = (found - found.min()) / spread * (2 * _SPAN) if spread else np.zeros_like(found)
    ratios = np.clip(case.config.ratio - (scaled - scaled.mean()), 0, 1)
    counts = ratio_choice(case.budget, ratios.tolist(), ranking)
    trace = {"outlier_fractions": found.tolist(), "layer_ratios": ratios.tolist()}
    return Decision.of(counts, ranking, trace)


METHOD = Method(
    name="owl",
    rule="units of least weight times activation leave first, fewer in layers with many outliers",
    source="Yin et al., Outlier Weighed Layerwise Sparsity (OWL), ICML 2024, on Wanda-sp units",
    decide=decide,
    needs=lambda _config: Needs(residuals=True),
    granularities=UNITS,
    allocators=("global",),
    deviations=("Published for unstructured sparsity; its ratios are applied to units here.",),
)
