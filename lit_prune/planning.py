"""From what was measured to a plan: decide, compensate; nothing is changed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_prune.allocation import cost_of, make_budget
from lit_prune.calibration import Divergence, out_of_memory_in
from lit_prune.decoder import DecoderParts, SubBlock, quiet, spec_for
from lit_prune.latency_table import table_words
from lit_prune.measuring import refuse_unfit
from lit_prune.methods import (
    Case,
    Scores,
    entropy_scores,
    plan_of,
    preset,
    prices_of,
    refuse_without_rule,
    sizes_of,
)
from lit_prune.metrics import quality_of
from lit_prune.plan import PruningPlan
from lit_prune.sequential import sequential_compensation
from lit_prune.surgery import (
    Compensation,
    Resumed,
    least_squares_compensation,
    masked,
    mean_compensation,
    weights_digest,
)
from lit_prune.versions import versions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.allocation import Budget
    from lit_prune.calibration import Calibration, Side
    from lit_prune.config import PruningConfig
    from lit_prune.methods import Kept
    from lit_prune.ranks import Ranks
    from lit_prune.surgery.least_squares import Solved

# What a number depends on.
MEASURED_WITH = ("lit-prune", "torch", "transformers", "lightning", "torchmetrics", "scikit-learn")


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with everything that it rests on; nothing has been changed yet.

    Of several ranks, rank 0 has all; the others plan, compensation and budget.

    Attributes:
        plan: What stays.
        compensation: What stands in for what goes; None without compensation. For
            ``sequential``, what drafts are judged with, until `compensated`.
        scores: Unit entropies and transfer entropies, whatever the preset decided by.
        budget: The request against the model.
        damage: Predicted damage of each sub-block's removals, where the preset predicts it.
    """

    plan: PruningPlan
    compensation: Compensation | None
    scores: Scores
    budget: Budget
    damage: dict[SubBlock, Tensor] = field(default_factory=dict)


def make_plan(
    model: PreTrainedModel,
    calibration: Calibration,
    config: PruningConfig,
    *,
    judged: dict[tuple[str, str], float] | None = None,
) -> Planned:
    """Plan from a calibration.

    The model is only read (and judged on text by the methods that search by real losses).

    Args:
        model: The dense model.
        calibration: What was measured on it.
        config: The request.
        judged: Losses that drafts were found to have, by plan digest and side (or ``kl``: that
            divergence, on the choose side, as a draft or fitted); read and added to.
            Planning several ratios with one method, hand the same one in: greedy paths start alike.

    Raises:
        PlanMismatchError: If the calibration belongs to another architecture, or other weights.
        BudgetError: If the ratio cannot be met.
    """
    method = preset(config.preset)
    config = method.resolve(config)
    refuse_without_rule(model, method, config)
    spec = spec_for(model)
    weights = weights_digest(model)  # hashed once, not for every draft
    refuse_unfit(model, weights, calibration, config)
    cost = cost_of(model, config, calibration.latency)
    budget = make_budget(spec, config, cost)
    config = budget.config
    memory = {} if judged is None else judged
    table = table_words(model, calibration) if config.budget == "latency" else ()
    solved: dict[SubBlock, dict[tuple[int, ...], Solved]] = {}

    def compensation_of(plan: PruningPlan) -> Compensation | None:
        if not config.adds_constants:  # `compensated` fits what needs none
            return None
        if config.compensation == "mean":
            return mean_compensation(
                model,
                plan,
                calibration.units,
                removed_mean=config.removed_mean,
                weights=weights,
            )
        return least_squares_compensation(
            model,
            plan,
            calibration.units,
            calibration.covariances or {},
            calibration.held_out,
            damping=config.damping,
            removed_mean=config.removed_mean,
            weights=weights,
            solved=solved,
        )

    def judge(kept: Kept, side: Side) -> float:
        plan = plan_of(spec, kept)
        if (known := memory.get((plan.digest, side))) is not None:
            return known
        with quiet(model), masked(model, plan, compensation_of(plan), spec=spec):
            if side == "calibrate":
                place = f"a draft judged on {config.search_tokens} search_tokens (fewer take less)"
                with out_of_memory_in(place, config.replay_batch_tokens):
                    found = searched().of(plan, partial(quality_of, model)).mean_nll
            else:
                batches = calibration.rows.batches(side, config.replay_batch_tokens)
                found = quality_of(model, batches).mean_nll
        memory[plan.digest, side] = found
        return found

    @cache
    def searched() -> Resumed:
        # hundreds of drafts: on a part of the text, of which the layers' outputs can be kept
        size, most = config.replay_batch_tokens, config.search_tokens
        batches = calibration.rows.batches("calibrate", size, most)
        return Resumed(DecoderParts(model).layers, batches)

    @cache
    def dense() -> Divergence:
        with quiet(model):
            return Divergence(model, calibration.rows.batches("choose", config.replay_batch_tokens))

    def diverges(kept: Kept, *, fitted: bool = False) -> float:
        plan, from_dense = plan_of(spec, kept), dense()
        fitted = fitted and config.compensation == "sequential"
        key = plan.digest, "kl, fitted" if fitted else "kl"
        if (known := memory.get(key)) is not None:
            return known
        compensation = compensation_of(plan)
        if fitted:
            compensation = _fitted(model, plan, calibration, config, compensation)
        with quiet(model), masked(model, plan, compensation, spec=spec):
            found = memory[key] = from_dense()
        return found

    decision = method.decide(
        Case(model=model, calibration=calibration, budget=budget, judge=judge, diverges=diverges)
    )
    plan = plan_of(spec, decision.kept)
    compensation = compensation_of(plan)
    scores = entropy_scores(spec, calibration, config)
    provenance = {
        "config": config.to_dict(),
        "source": method.source,
        "rule": method.rule,
        "deviations": list(method.deviations),
        "channel_multiple": budget.channel_multiple,
        "achieved_ratio": budget.achieved(decision.counts),
        "budget": {
            "resource": cost.resource,
            "dense": cost.total,
            "removed": budget.removed(decision.counts),
            "removed_parameters": budget.removed_parameters(decision.counts),
            "notes": [*budget.notes, *cost.notes, *table],
        },
        "method": decision.trace,
        "sizes": sizes_of(spec),
        "prices": prices_of(spec, decision, scores, config),
        "compensation": describe(compensation),
        "calibration": calibration.describe(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions_of(*MEASURED_WITH),
    }
    plan = replace(plan, provenance=provenance)
    return Planned(plan, compensation, scores, budget, decision.damage)


def compensated(
    model: PreTrainedModel,
    planned: Planned,
    calibration: Calibration,
    config: PruningConfig,
    *,
    progress: bool = False,
) -> Planned:
    """Return the plan with the compensation that was asked for, where that needs forwards.

    `make_plan` makes none, so that many plans can be looked at; this is for the one that stays.

    Args:
        model: The dense model; it is left as it was.
        planned: What `make_plan` returned.
        calibration: What it was made from; the text is run again.
        config: The request.
        progress: Show a bar (only on a terminal).

    Raises:
        CalibrationError: If an activation is not finite, or memory runs out.
    """
    config = preset(config.preset).resolve(config)
    if config.compensation != "sequential" or not config.pruning_ratio:
        return planned
    compensation = _fitted(
        model,
        planned.plan,
        calibration,
        planned.budget.config,
        planned.compensation,
        progress=progress,
    )
    facts = {**planned.plan.provenance, "compensation": describe(compensation)}
    return replace(planned, plan=replace(planned.plan, provenance=facts), compensation=compensation)


def _fitted(
    model: PreTrainedModel,
    plan: PruningPlan,
    calibration: Calibration,
    config: PruningConfig,
    draft: Compensation | None,
    progress: bool = False,
) -> Compensation:
    """Fit what stays; ``config`` as the budget has it, ``draft`` knows the weights' digest."""
    with out_of_memory_in("the fit behind the pruned prefix", config.replay_batch_tokens):
        return sequential_compensation(
            model,
            plan,
            calibration.rows,
            damping=config.damping,
            removed_mean=config.removed_mean,
            add_biases=config.adds_constants,
            protected_layers=config.protected_layers,
            weights=None if draft is None else draft.weights_digest,
            batch_tokens=config.replay_batch_tokens,
            progress=progress,
        )


def same_plan(
    planned: Planned | None,
    model: PreTrainedModel,
    calibration: Calibration,
    config: PruningConfig,
    ranks: Ranks,
) -> Planned:
    """Tell all ranks what rank 0 has planned; call on all of them.

    Args:
        planned: On rank 0; None on the others.
        model: The dense model.
        calibration: What this rank knows of it.
        config: The request.
        ranks: Who shall know.

    Returns:
        On the other ranks plan, compensation and budget; the scores stay on rank 0.

    Raises:
        RankError: If another plan arrives than was sent.
    """
    if planned is not None and ranks.size == 1:
        return planned

    def told() -> dict[str, Any]:
        assert planned is not None  # noqa: S101 - only rank 0 is asked
        made = planned.compensation
        digests = made and {"plan_digest": made.plan_digest, "weights_digest": made.weights_digest}
        return {"plan": planned.plan.to_json(), "compensation": digests}

    words = ranks.decide(told, json.dumps, json.loads)
    made = planned.compensation if planned is not None else None
    tensors = ranks.hand_out({} if made is None else made.tensors())
    if planned is None:
        compensation = None
        if words["compensation"] is not None:
            compensation = Compensation({}, **words["compensation"]).with_tensors(tensors)
        config = preset(config.preset).resolve(config)
        budget = make_budget(spec_for(model), config, cost_of(model, config, calibration.latency))
        plan = PruningPlan.from_json(words["plan"])
        planned = Planned(plan, compensation, Scores({}, {}), budget)
    ranks.same(planned.plan.digest, "the plan differs between the processes", "Please report this.")
    return planned


def describe(compensation: Compensation | None) -> dict[str, Any]:
    """Return what the plan records about its compensation."""
    if compensation is None:
        return {"notes": []}
    return {"notes": list(compensation.notes), "sub_blocks": compensation.facts}
