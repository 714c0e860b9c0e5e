"""Preset ``dsa``: layer ratios by the allocation expression that a search discovered.

``W:(ABSLOG)-(VAR)-(ATAN,ASIN)``: variance of ``log(|W_ij| * ||x_j||)`` over all weights of a layer,
then ``asin(atan(.))``. The larger, the more the layer loses.

References:
    Li et al., "Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models"
    (DSA), NeurIPS 2024, and its code (lliai/DSA: README for the expression, ``lib/autolayer.py``
    for its operations, ``lib/prune_all.py`` for the map to ratios).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from lit_prune.allocation import Ranking, ratio_choice
from lit_prune.calibration import Needs
from lit_prune.decoder import DecoderParts
from lit_prune.methods import wanda
from lit_prune.methods.decision import Decision, Method

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lit_prune.methods.decision import Case

# Ratios of two layers differ by at most twice this.
_SPAN = 0.08


def log_variance(metric: Tensor) -> float:
    """Return the variance of ``log |x|``; zeros count as ones, as in its code.

    Example:
        >>> round(log_variance(torch.tensor([1.0, 0.0, math.e])), 4)
        0.3333
    """
    magnitude = metric.abs()
    return float(torch.where(magnitude == 0, 1.0, magnitude).log().var())


def importance(variance: float) -> float:
    """Return ``asin(atan(variance))``; 0 where that is undefined, above ``tan(1)``, as in its code.

    Example:
        >>> importance(0.0), round(importance(1.0), 4), importance(1.6)
        (0.0, 0.9033, 0.0)
    """
    angle = math.atan(variance)
    return math.asin(angle) if angle <= 1 else 0.0


def layer_ratios(importances: list[float], ratio: float) -> list[float]:
    """Return ratios around the mean ``ratio``, at most ``2 * 0.08`` apart.

    Example:
        >>> [round(found, 2) for found in layer_ratios([0.0, 1.0], 0.3)]
        [0.22, 0.38]
    """
    found = np.array(importances)
    spread = found.max() - found.min()
    scaled = (found - found.min()) / spread * (2 * _SPAN) if spread else np.zeros_like(found)
    ratios: list[float] = np.clip(ratio + (scaled - scaled.mean()), 0, 1).tolist()
    return ratios


def decide(case: Case) -> Decision:
    """Layers whose weights differ more in magnitude lose more; units leave by Wanda's metric."""
    if not case.config.pruning_ratio:
        return Decision.whole(case.spec)
    scores = {place: found.numpy() for place, found in wanda.score(case).items()}
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    variances = [log_variance(metric) for metric in _metrics(case)]
    importances = [importance(variance) for variance in variances]
    ratios = layer_ratios(importances, case.config.ratio)
    undefined = [i for i, variance in enumerate(variances) if math.atan(variance) > 1]
    trace = {"log_variances": variances, "layer_ratios": ratios, "undefined": undefined}
    return Decision.of(ratio_choice(case.budget, ratios, ranking), ranking, trace)


def _metrics(case: Case) -> Iterator[Tensor]:
    """Yield ``|W_ij| * ||x_j||`` of all weights of each layer, flat."""
    parts, calibration = DecoderParts(case.model), case.calibration
    assert calibration.inputs is not None  # noqa: S101 - `needs` asked for it
    for block in case.spec.blocks:
        metrics = [torch.ones(2)]  # a layer without sub-blocks has variance 0
        for part in block.sub_blocks:
            place = (block.index, part.kind)
            mean, variance = calibration.units[place]
            written = (variance + mean.square()).sqrt()
            reads = calibration.inputs[place].sqrt()
            pairs = [(linear, reads) for linear in parts.inputs(*place)]
            for linear, norm in [*pairs, (parts.output(*place), written)]:
                weight = linear.weight.detach().abs().float()
                metrics.append((weight * norm.to(weight)).flatten())
        yield torch.cat(metrics[1:] or metrics)


METHOD = Method(
    name="dsa",
    rule="layer ratios follow an expression that a search discovered",
    source="Li et al., Discovering Sparsity Allocation (DSA), NeurIPS 2024, on Wanda-sp units",
    decide=decide,
    needs=lambda _config: Needs(residuals=True),
    granularities=("kv_group", "channel"),
    allocators=("global",),
    deviations=(
        "Published for unstructured sparsity; its ratios are applied to units here.",
        "The expression is the one that its authors found for Llama 7B at 70 % sparsity; nothing "
        "is searched. Its last part, (7), has no effect in its public code, nor here.",
        "Where the variance exceeds tan(1) the expression is undefined and counts as 0, as in its "
        "code: such a layer loses least, not most. The plan's record names those layers.",
    ),
)
