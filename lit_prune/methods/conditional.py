"""Preset ``conditional``: the paper's Gaussian assumption, followed to its end.

1. Units of each sub-block leave one after the other, each time the one of least conditional
   entropy; what they wrote is taken over by the ones that stay. That gives an order, and a *damage
   curve*: expected squared output error against units removed.
2. The damage of a sub-block's total loss is measured at the model's output (by default as KL
   divergence to the dense model). A curve is scaled so that its end meets that measurement.
3. One depth-first branch and bound over the curves of all sub-blocks, from nothing removed to the
   whole sub-block, finds the allocation of least predicted damage under the budget. Exact.
4. The conditional mean of what was cut is folded into what stays.

Experts of a mixture leave in the order in which their contributions add least to the squared error
of the sub-block (`lit_prune.importance.experts_order`); nothing takes over what they wrote, and
that tokens are routed anew is not predicted. Where a shared expert stays with them, the end of
their curve, all of them gone, is scaled to the measured loss of both: a cautious reading.

References:
    The unit score is that of optimal brain surgeon and its structured heirs (Hassibi & Stork, 1992;
    ZipLM, OSSCAR, SlimGPT), the compensation affine least squares (GRAIL and others). Ours is the
    reading as conditional entropy, and the joint allocation weighed by measured sensitivities.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.allocation import Allocation, Ranking, alike_choice, coupled_search, settled
from lit_prune.calibration import SENSITIVITIES, Needs, Unit
from lit_prune.config import SQUARES
from lit_prune.decoder import DecoderParts, all_kept
from lit_prune.errors import BudgetError, CalibrationError
from lit_prune.importance import damped, experts_damage, order_damage
from lit_prune.methods import flap, random
from lit_prune.methods.decision import CONDITIONAL_OPTIONS, EVERYTHING, Decision, Method
from lit_prune.methods.entropy import entropy_scores
from lit_prune.methods.refine import refine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_prune.config import PruningConfig
    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case

# What the report says of a search.
_PROVEN = "proven: nothing within {:.2g} percentage points of the ratio is predicted to cost less"
_SETTLED = "no combination was found that fits: met by single steps"
_ALL_WIDTHS = "every pair of equal widths was tried with every number of blocks that go"


def needs(config: PruningConfig) -> Needs:
    """Ask for damage curves and for what weighs them."""
    transfer = config.sensitivity == "transfer_entropy"
    return Needs(
        curves=True,
        bypasses=("attention", "mlp") if transfer else (),
        sensitivities=config.sensitivity in SENSITIVITIES,
        covariances=config.unit_score != "conditional",
    )


def sensitivities(case: Case, curves: Mapping[SubBlock, Tensor]) -> dict[SubBlock, float]:
    """Return what the loss of each whole sub-block is worth, by the measure of the request."""
    config, calibration = case.config, case.calibration
    if config.sensitivity == "none":
        return {place: float(curve[-1, 1]) for place, curve in curves.items()}
    if config.sensitivity == "transfer_entropy":
        transfer = entropy_scores(case.spec, calibration, config).transfer
        return {place: transfer[Unit(*place)] for place in curves}
    column = SENSITIVITIES.index(config.sensitivity)
    measured = calibration.sensitivities or {}
    if any(bool(found[column].isnan()) for found in measured.values()):
        raise CalibrationError(
            f"sensitivity {config.sensitivity!r} is the increase of a loss, and no sample on the "
            "calibrate side has a label. Give labels, or take sensitivity 'kl'."
        )
    # an increase of the loss may be negative by noise: nothing is better than free
    return {place: max(float(measured[place][column]), 0.0) for place in curves}


def curves_of(case: Case) -> dict[SubBlock, Tensor]:
    """Return the damage curves of the request, as `Calibration.curves` keeps them."""
    config, calibration = case.config, case.calibration
    if config.unit_score == "conditional":
        return calibration.curves or {}
    parts, curves = DecoderParts(case.model), {}
    scores = _control_scores(case)
    for index, part in case.spec.sub_blocks:
        place: SubBlock = (index, part.kind)
        order = scores[place].argsort(stable=True)
        covariance = (calibration.covariances or {})[place]
        damages: tuple[Tensor, ...]
        if part.unit == "expert":
            damages = (experts_damage(covariance, order),) * 2
        else:
            weight = parts.output(*place).weight.detach().cpu()
            covariance = damped(covariance, config.damping)
            damages = order_damage(covariance, weight, order, part.unit_width)
        leaves = torch.cat([order.new_full((1,), -1), order]).double()
        curves[place] = torch.stack([leaves, *damages], 1)
    return curves


def _control_scores(case: Case) -> dict[SubBlock, Tensor]:
    if case.config.unit_score == "random":
        return random.score(case)
    if case.config.unit_score == "fluctuation":
        return flap.score(case)
    return entropy_scores(case.spec, case.calibration, case.config).units


def predicted_damage(case: Case, curves: Mapping[SubBlock, Tensor]) -> dict[SubBlock, Tensor]:
    """Return the predicted damage of removing 0, 1, … all units of each sub-block.

    The curve of the compensation that will be used, scaled to end at the sub-block's sensitivity.
    """
    worth = sensitivities(case, curves)
    column = 1 if case.config.compensation in SQUARES else 2
    return {
        place: curve[:, column] * (worth[place] / float(curve[-1, column].clamp_min(1e-300)))
        for place, curve in curves.items()
    }


def decide(case: Case) -> Decision:
    """Find the allocation of least predicted damage."""
    if not case.config.pruning_ratio:
        return Decision.whole(case.spec)
    curves = curves_of(case)
    # `order` says when a unit leaves: the later, the higher its rank
    ranks = {}
    for place, curve in curves.items():
        rank = torch.empty(len(curve) - 1, dtype=torch.float64)
        rank[curve[1:, 0].long()] = torch.arange(len(rank), dtype=torch.float64)
        ranks[place] = rank.numpy()
    ranking = Ranking(ranks, dict.fromkeys(ranks, 1))
    damage = predicted_damage(case, curves)
    counts, record = _allocate(case, damage, ranking)
    searched = counts
    rounds: list[dict[str, Any]] = []
    if case.config.verify_rounds:
        counts, rounds = refine(
            case, damage, counts, ranking, lambda draft: _allocate(case, draft, ranking)[0]
        )
    trace = _trace(case, damage, counts, record)
    if rounds:
        trace["verified"] = rounds
    if counts != searched:
        why = "measured divergences preferred it to what is predicted best"
        trace["searches"] = [{**x, "optimal": False, "why": why} for x in trace["searches"]]
        trace.pop("proven", None)
    return replace(Decision.of(counts, ranking, trace), damage=damage)


def _allocate(
    case: Case, damage: Mapping[SubBlock, Tensor], ranking: Ranking
) -> tuple[dict[SubBlock, int], dict[str, Any]]:
    """Return the counts of least predicted damage, and a record of how they were found."""
    if case.config.allocator == "uniform_widths":
        lists = {place: values.tolist() for place, values in damage.items()}
        return alike_choice(case.budget, lists)[0], {"tried": _ALL_WIDTHS}
    budget, limit, record = case.budget, case.config.node_limit, {}
    curves = {place: curve.tolist() for place, curve in damage.items()}
    # a model too coarse for the narrow window is given the whole tolerance
    for slack in (case.config.search_tolerance, case.config.ratio_tolerance):
        try:
            found = coupled_search(
                budget, curves, slack=slack * budget.cost.total, node_limit=limit
            )
        except BudgetError:
            record = {"searches": [{"optimal": False, "bound": 0.0, "nodes": limit}]}
            continue
        if found is not None:
            return found.counts, _record(found, slack, limit)
    counts = settled(budget, all_kept(case.spec), ranking)
    return counts, {**record, "settled": _SETTLED}


def _record(found: Allocation, slack: float, node_limit: int) -> dict[str, Any]:
    search: dict[str, Any] = {"optimal": found.optimal, "bound": found.bound, "nodes": found.nodes}
    if found.optimal:
        return {"searches": [search], "proven": _PROVEN.format(100 * slack)}
    if found.nodes < node_limit:
        search["why"] = "the search stopped at its limit of branches"
    return {"searches": [search]}


def _trace(
    case: Case,
    damage: Mapping[SubBlock, Tensor],
    counts: Mapping[SubBlock, int],
    record: dict[str, Any],
) -> dict[str, Any]:
    whole = all_kept(case.spec)
    cost = sum(float(damage[place][whole[place] - count]) for place, count in counts.items())
    return {
        "allocator": case.config.allocator,
        "sensitivity": case.config.sensitivity,
        "predicted_damage": cost,
        **record,
        "searches": [{"cost": cost, **search} for search in record.get("searches", [])],
    }


METHOD = Method(
    name="conditional",
    rule="what leaves is predicted to change the output least for the size that it frees, "
    "in all layers together",
    source="lit_prune: conditional entropy, least squares, sensitivity-weighed joint allocation",
    decide=decide,
    needs=needs,
    granularities=EVERYTHING,
    allocators=("joint", "uniform_widths"),
    options=CONDITIONAL_OPTIONS,
    choices={
        "unit_score": ("conditional", "entropy", "fluctuation", "random"),
        "sensitivity": ("kl", "nll", "frobenius", "transfer_entropy", "none"),
    },
    compensation="sequential",
)
