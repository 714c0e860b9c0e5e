"""Preset ``conditional``: the paper's Gaussian assumption, followed to its end.

1. Units of each sub-block leave one after the other, each time the one of least conditional
   entropy; what they wrote is taken over by the ones that stay. That gives an order, and a *damage
   curve*: expected squared output error against units removed.
2. The damage of a sub-block's total loss is measured at the model's output (by default as KL
   divergence to the dense model). A curve is scaled so that its end meets that measurement.
3. One depth-first branch and bound over the curves of all sub-blocks, from nothing removed to the
   whole sub-block, finds the allocation of least predicted damage under the budget. Exact.
4. The conditional mean of what was cut is folded into what stays.

References:
    The unit score is that of optimal brain surgeon and its structured heirs (Hassibi & Stork, 1992;
    ZipLM, OSSCAR, SlimGPT), the compensation affine least squares (GRAIL and others). Ours is the
    reading as conditional entropy, and the joint allocation weighed by measured sensitivities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lit_prune.allocation import (
    Level,
    Ranking,
    alike_choice,
    joint_search,
    require_met,
    settled,
)
from lit_prune.calibration import SENSITIVITIES, Needs, Unit
from lit_prune.decoder import all_kept
from lit_prune.methods.decision import EVERYTHING, Decision, Method
from lit_prune.methods.entropy import entropy_scores

if TYPE_CHECKING:
    from lit_prune.allocation import JointSelection
    from lit_prune.config import PruningConfig
    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case

# A choice of kept counts for the sub-blocks that one place of the search decides.
Choice = dict["SubBlock", int]


def needs(config: PruningConfig) -> Needs:
    """Ask for damage curves and for what weighs them."""
    transfer = config.sensitivity == "transfer_entropy"
    return Needs(
        curves=True,
        bypasses=("attention", "mlp") if transfer else (),
        sensitivities=config.sensitivity in SENSITIVITIES,
    )


def sensitivities(case: Case) -> dict[SubBlock, float]:
    """Return what the loss of each whole sub-block is worth, by the measure of the request."""
    config, calibration = case.config, case.calibration
    curves = calibration.curves or {}
    if config.sensitivity == "none":
        return {place: float(curve[-1, 1]) for place, curve in curves.items()}
    if config.sensitivity == "transfer_entropy":
        transfer = entropy_scores(case.spec, calibration, config).transfer
        return {place: transfer[Unit(*place)] for place in curves}
    column = SENSITIVITIES.index(config.sensitivity)
    measured = calibration.sensitivities or {}
    # an increase of the loss may be negative by noise: nothing is better than free
    return {place: max(float(measured[place][column]), 0.0) for place in curves}


def predicted_damage(case: Case) -> dict[SubBlock, torch.Tensor]:
    """Return for each sub-block the predicted damage of removing 0, 1, … all units in its order."""
    worth = sensitivities(case)
    predicted = {}
    for place, curve in (case.calibration.curves or {}).items():
        damage = curve[:, 1]
        predicted[place] = damage * (worth[place] / float(damage[-1].clamp_min(1e-300)))
    return predicted


def decide(case: Case) -> Decision:
    """Find the allocation of least predicted damage."""
    curves = case.calibration.curves or {}
    # `order` says when a unit leaves: the later, the higher its rank
    ranks = {}
    for place, curve in curves.items():
        rank = torch.empty(len(curve) - 1, dtype=torch.float64)
        rank[curve[1:, 0].long()] = torch.arange(len(rank), dtype=torch.float64)
        ranks[place] = rank.numpy()
    ranking = Ranking(ranks, dict.fromkeys(ranks, 1))
    whole = all_kept(case.spec)
    if not case.config.pruning_ratio:
        return Decision.of(whole, ranking)
    if case.config.allocator == "uniform_widths":
        damage = {place: curve.tolist() for place, curve in predicted_damage(case).items()}
        counts, cost = alike_choice(case.budget, damage)
        return Decision.of(counts, ranking, _trace(case, cost))
    choices, levels = _levels(case)
    selection = _search(case, levels)
    counts = dict(whole)
    if selection is None:  # too coarse for the window that the search is given
        counts = settled(case.budget, counts, ranking)
        return Decision.of(counts, ranking, {"search": "no combination of levels fits the window"})
    for options, chosen in zip(choices, selection.chosen, strict=True):
        counts |= options[chosen]
    if not case.budget.met_by(counts):
        # sizes of whole sub-blocks depend on their neighbours by a bias: a few parameters
        counts = settled(case.budget, counts, ranking)
    require_met(case.budget, counts)
    search = {
        "optimal": selection.optimal,
        "bound": selection.bound,
        "nodes": selection.nodes,
    }
    return Decision.of(counts, ranking, _trace(case, selection.cost, search))


def _trace(
    case: Case, cost: float, search: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "allocator": case.config.allocator,
        "sensitivity": case.config.sensitivity,
        "predicted_damage": cost,
        "searches": [{"cost": cost, **search}] if search else [],
    }


def _levels(case: Case) -> tuple[list[list[Choice]], list[list[Level]]]:
    """Return what each place may keep, and what that frees and costs."""
    budget, damage = case.budget, predicted_damage(case)
    apart = "sub_block" in case.config.granularities or "block" not in case.config.granularities
    choices: list[list[Choice]] = []
    if apart:
        choices = [[{place: c} for c in reversed(budget.allowed[place])] for place in damage]
    else:  # a block goes whole or not at all: its halves are decided together
        for block in case.spec.blocks:
            places = [(block.index, part.kind) for part in block.sub_blocks]
            combined: list[Choice] = [{}]
            for place in places:
                combined = [{**c, place: n} for c in combined for n in budget.allowed[place]]
            choices += [[c for c in combined if all(c.values()) or not any(c.values())]]
    whole = all_kept(case.spec)
    nothing = budget.removed(whole)
    levels = []
    for options in choices:
        here = []
        for choice in options:
            cost = sum(float(damage[place][whole[place] - n]) for place, n in choice.items())
            size = budget.removed({**whole, **choice}) - nothing
            lost = sum(1 for (_, kind), n in choice.items() if kind == "attention" and not n)
            # one unit may be worth less than the bias that its loss would cost
            here.append(Level(size=max(size, 0), cost=cost, attention=lost))
        levels.append(here)
    return choices, levels


def _search(case: Case, levels: list[list[Level]]) -> JointSelection | None:
    budget = case.budget
    attentions = sum(part.kind == "attention" for _, part in case.spec.sub_blocks)
    for slack in (case.config.search_tolerance * case.spec.decoder_parameters, budget.tolerance):
        selection = joint_search(
            levels,
            minimum=max(0, round(budget.target - slack)),
            maximum=int(budget.target + slack),
            attention_limit=max(attentions - 1, 0) if attentions else None,
            node_limit=case.config.node_limit,
        )
        if selection is not None:
            return selection
    return None


METHOD = Method(
    name="conditional",
    source="lit_prune: conditional entropy, least squares, sensitivity-weighed joint allocation",
    decide=decide,
    needs=needs,
    granularities=EVERYTHING,
    allocators=("joint", "uniform_widths"),
    compensation="least_squares",
)
