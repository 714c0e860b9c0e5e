"""Preset ``slimgpt``: optimal brain surgeon in batches, more in deep layers than in shallow ones.

References:
    Ling et al., "SlimGPT: Layer-wise Structured Pruning for Large Language Models", NeurIPS 2024
    (arXiv 2412.18110): batched greedy pruning with grouped Cholesky, dynamic group size (1024 down
    to 8), incremental pruning ratio ``r_i = r_0 + (r_{n-1} - r_0) * log(i + 1) / log(n)``. There is
    no public code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lit_prune.allocation import Ranking, ratio_choice
from lit_prune.calibration import Needs
from lit_prune.decoder import DecoderParts
from lit_prune.importance import damped
from lit_prune.importance.columns import columns_of, own_blocks
from lit_prune.importance.pivot import kept_table, pivot
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.layer_sizes import layer_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case

# Channels that leave between two updates, at most and at least.
_LARGEST, _SMALLEST = 1024, 8


def layer_ratios(sizes: Sequence[float], target: float) -> list[float]:
    """Return the fraction of each layer that leaves, rising with the logarithm of its number.

    Args:
        sizes: What each layer could lose.
        target: What all of them together shall lose, in the same unit.

    Returns:
        Ratios from ``r_0`` to ``r_{n-1}``. ``r_0`` is 0, or as small as ``r_{n-1} <= 1`` allows;
        the paper does not state it.

    Example:
        >>> [round(ratio, 2) for ratio in layer_ratios([1, 1, 1, 1], 1.0)]
        [0.0, 0.22, 0.35, 0.44]
    """
    layers = len(sizes)
    shares = [math.log(i + 1) / math.log(layers) if layers > 1 else 1.0 for i in range(layers)]
    rising = sum(size * share for size, share in zip(sizes, shares, strict=True))
    last = min(target / rising, 1.0) if rising else 0.0
    level = sum(sizes) - rising
    first = min((target - last * rising) / level, 1.0) if level else 0.0
    return [first + (last - first) * share for share in shares]


def group_errors(table: Tensor, unit_width: int) -> Tensor:
    """Return the estimated error of cutting each kept unit, ``[units]``.

    ``sum_j ||w_j||^2 / L_jj^2`` over the columns of a unit, with ``L`` the Cholesky factor of its
    block of the inverse: as if its columns left one by one, without the updates in between.
    """
    own = own_blocks(table[:, : len(table)], unit_width)
    pivots = torch.linalg.cholesky_ex(own).L.diagonal(dim1=-2, dim2=-1)
    norms = table[:, len(table) :].square().sum(1).reshape(-1, unit_width)
    errors: Tensor = (norms / pivots.square()).sum(1)
    return errors


def batched_greedy(covariance: Tensor, weight: Tensor, count: int, unit_width: int) -> Tensor:
    """Cut the units of least error, batch after batch, until ``count`` are left.

    KV groups leave one at a time; channels half of what is left to cut at a time, but between 8 and
    1024. After each batch the inverse is downdated and the weights compensated.

    Args:
        covariance: ``C``, ``[n, n]``, positive definite.
        weight: ``W``, ``[out, n]``.
        count: Units to keep.
        unit_width: Columns that one unit owns.

    Returns:
        Kept units, ascending, ``[count]``.
    """
    table = kept_table(covariance, weight)
    stays = torch.ones(len(table) // unit_width, dtype=torch.bool, device=table.device)
    while (left := int(stays.sum()) - count) > 0:
        batch = 1 if unit_width > 1 else min(left, max(_SMALLEST, min(_LARGEST, left // 2)))
        errors = group_errors(table, unit_width).masked_fill(~stays, math.inf)
        leaving = errors.argsort(stable=True)[:batch]
        pivot(table, columns_of(leaving, unit_width))
        stays[leaving] = False
    return stays.nonzero().squeeze(1)


def decide(case: Case) -> Decision:
    """Give every layer its ratio, then cut each sub-block on its own."""
    whole = Decision.whole(case.spec)
    if not case.config.pruning_ratio:
        return whole
    widths = {(index, part.kind): part.unit_width for index, part in case.spec.sub_blocks}
    scores = {}
    for place, width in widths.items():
        scores[place] = group_errors(kept_table(*_problem(case, place)), width).cpu().numpy()
    ratios = layer_ratios(layer_sizes(case.budget), case.budget.target)
    counts = ratio_choice(case.budget, ratios, Ranking(scores, widths))
    kept = dict(whole.kept)
    for place, width in widths.items():
        if counts[place] < len(kept[place]):
            chosen = batched_greedy(*_problem(case, place), counts[place], width)
            kept[place] = tuple(chosen.tolist())
    return Decision(kept, {"layer_ratios": ratios})


def _problem(case: Case, place: SubBlock) -> tuple[Tensor, Tensor]:
    """Return covariance and weight of an output projection."""
    assert case.calibration.covariances is not None  # noqa: S101 - `needs` asked for it
    weight = DecoderParts(case.model).output(*place).weight.detach().double()
    covariance = case.calibration.covariances[place].to(weight.device)
    return damped(covariance, case.config.damping), weight


METHOD = Method(
    name="slimgpt",
    rule="units leave in batches by the error that they would leave behind, more in deep layers",
    source="Ling et al., SlimGPT, NeurIPS 2024, without fine-tuning",
    decide=decide,
    needs=lambda _config: Needs(covariances=True),
    options=("damping",),
    granularities=("kv_group", "channel"),
    allocators=("global",),
    compensation="least_squares",
    deviations=(
        "Reconstructed: the first layer's ratio is 0 (the paper does not state it), and batches of "
        "channels halve from 1024 to 8 (published: that they shrink).",
        "The same ratio goes to KV groups and channels of a layer; counts are then settled on the "
        "ratio, by least error.",
        "Moments are about the mean, the rest is a bias; the damping of the compensation is chosen "
        "on held-out text.",
        "Covariances are of the dense model in one pass; the paper collects them behind the layers "
        "that were already pruned.",
        "KV groups leave whole, also under grouped-query attention.",
    ),
)
