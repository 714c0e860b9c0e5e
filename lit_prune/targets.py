"""From what people ask for to a ratio, once the model is measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

from lit_prune.allocation import ReachableTotals, aimed, cost_of, make_budget
from lit_prune.amounts import amount_of
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import BudgetError
from lit_prune.planning import make_plan
from lit_prune.sweep import chosen_nll, nll_as_it_is

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.planning import Planned

# The search for a ratio ends when it knows it this well.
_STEP = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A request whose ratio is known.

    Attributes:
        config: The request, with a ``pruning_ratio``.
        asked: The target that it was made from: ``name``, ``value``, ``amount`` as a number, and
            what a search has tried; empty where a ratio was asked for.
    """

    config: PruningConfig
    asked: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return what other processes are told."""
        return json.dumps([self.config.to_dict(), self.asked])

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        config, asked = json.loads(text)
        return cls(config=PruningConfig.from_options(config), asked=asked)

    def noted(self, planned: Planned) -> Planned:
        """Return the plan with what was asked for in its provenance."""
        if not self.asked:
            return planned
        facts = {**planned.plan.provenance, "target": self.asked}
        return replace(planned, plan=replace(planned.plan, provenance=facts))


def resolve(
    model: PreTrainedModel,
    calibration: Calibration,
    config: PruningConfig,
    *,
    progress: bool = False,
) -> Aim:
    """Turn a target into a ratio; the model is only read.

    Args:
        model: The dense model.
        calibration: What was measured on it.
        config: The (resolved) request.
        progress: Show a bar where ratios are tried (only on a terminal).

    Raises:
        BudgetError: If the target cannot be reached; says which bound it meets.
    """
    asked, value = config.target, getattr(config, config.target)
    if asked == "pruning_ratio":
        return Aim(config=config)
    facts = {"name": asked, "value": value, "amount": amount_of(asked, value)}
    if asked == "max_perplexity_increase":
        config, found = _largest_cut(model, calibration, config, facts["amount"], progress=progress)
        return Aim(config=config, asked={**facts, **found})
    return Aim(config=aimed(model, config, calibration.latency), asked=facts)


def _largest_cut(
    model: PreTrainedModel,
    calibration: Calibration,
    config: PruningConfig,
    increase: float,
    *,
    progress: bool,
) -> tuple[PruningConfig, dict[str, Any]]:
    """Return the largest ratio that was found inside, and what was tried.

    Bisection, between what was found inside and outside; only ratios that can be reached are tried.
    """
    budget = make_budget(spec_for(model), config, cost_of(model, config, calibration.latency))
    totals, whole = ReachableTotals(budget), budget.cost.total
    dense = nll_as_it_is(model, calibration, config)
    inside, outside = 0.0, totals.most() / whole + _STEP
    tried: list[dict[str, Any]] = []
    judged: dict[Any, float] = {}
    best: tuple[float, float] | None = None
    bar = tqdm(
        total=math.ceil(math.log2(max(outside / _STEP, 2))),
        desc="Searching the largest cut",
        unit="plan",
        leave=False,
        disable=None if progress else True,
    )
    with bar:
        while outside - inside > _STEP:
            middle = (inside + outside) / 2
            near = [x / whole for x in totals.nearest(middle * whole) if x is not None]
            between = [x for x in near if inside + _STEP / 2 < x < outside - _STEP / 2]
            if not between:
                break
            ratio = min(between, key=lambda x: abs(x - middle))
            at = replace(config, max_perplexity_increase=None, pruning_ratio=ratio)
            try:
                planned = make_plan(model, calibration, at, judged=judged)
            except BudgetError as error:
                tried.append({"pruning_ratio": ratio, "note": str(error)})
                outside = ratio
                continue
            nll = chosen_nll(model, planned, calibration, at)
            rise = math.expm1(min(nll - dense, 700.0))
            tried.append({"pruning_ratio": ratio, "perplexity_increase": rise})
            bar.set_postfix_str(f"{ratio:.1%} cut: perplexity {rise:+.1%}")
            bar.update()
            if rise <= increase:
                inside, best = ratio, (ratio, nll)
            else:
                outside = ratio
    if best is None:
        least = min(tried, key=lambda x: float(x["pruning_ratio"]), default=None)
        words = (
            f"removing {least['pruning_ratio']:.2%} already gives {_percent(least)}"
            if least
            else "nothing can be removed"
        )
        raise BudgetError(
            f"max_perplexity_increase {config.max_perplexity_increase!r}: no cut stays within "
            f"{increase:.3g} on the choose side of the text; {words}. Allow more, calibrate on "
            "more text, or choose another preset."
        )
    config = replace(config, max_perplexity_increase=None, pruning_ratio=best[0])
    found = {"dense_nll": dense, "predicted_nll": best[1], "tried": tried}
    if best[0] + _STEP >= totals.most() / whole:
        found["bound"] = "the largest cut that can be reached"
    return config, found


def _percent(tried: dict[str, Any]) -> str:
    if "perplexity_increase" not in tried:
        return f"no plan ({tried['note']})"
    return f"{tried['perplexity_increase']:+.1%}"
