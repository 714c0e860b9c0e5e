"""Many budgets from one calibration: what each would remove, and what it is predicted to cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from lit_prune.config import PruningConfig
from lit_prune.decoder import quiet
from lit_prune.errors import BudgetError, ConfigError
from lit_prune.methods import preset
from lit_prune.metrics import quality_of
from lit_prune.planning import compensated, make_plan
from lit_prune.surgery import masked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.config import Resource
    from lit_prune.plan import PruningPlan
    from lit_prune.planning import Planned


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One budget.

    Attributes:
        requested: Fraction of the request's ``budget`` (decoder parameters) asked for.
        achieved: Fraction that the plan removes; None where the ratio cannot be reached.
        plan: What stays; None where the ratio cannot be reached.
        predicted_damage: What the search expects the plan to cost, in the unit of the request's
            sensitivity (nats per token under ``kl``); None for presets that predict nothing.
        mean_nll: Measured on the choose side, nats per token; None unless asked for.
        dense_nll: That of the dense model.
        note: Why there is no plan.
        budget: What the ratios are fractions of.
    """

    requested: float
    achieved: float | None = None
    plan: PruningPlan | None = None
    predicted_damage: float | None = None
    mean_nll: float | None = None
    dense_nll: float | None = None
    note: str = ""
    budget: Resource = "parameters"

    @property
    def excess_nll(self) -> float | None:
        """What was measured above the dense model, nats per token."""
        if self.mean_nll is None or self.dense_nll is None:
            return None
        return self.mean_nll - self.dense_nll


def sweep(
    model: PreTrainedModel,
    calibration: Calibration,
    ratios: Iterable[float],
    *,
    measured: bool = False,
    progress: bool = False,
    **options: Any,
) -> tuple[SweepPoint, ...]:
    """Plan for several ratios; the model is only read.

    Args:
        model: The dense model that ``calibration`` was made on.
        calibration: Statistics, from ``prune(...).calibration`` or `Calibration.load`.
        ratios: Fractions of the request's ``budget`` (decoder parameters) to remove.
        measured: Also measure each plan on the choose side, by masking the dense model: one pass
            over that text for each ratio, and one of the dense model. Without it no forward pass is
            made by presets that score once.
        progress: Show a bar (only on a terminal).
        **options: The other fields of `PruningConfig`.

    Raises:
        ConfigError: If ``ratios`` are not several fractions.
        CalibrationError: If the calibration lacks what the preset needs.

    Example::

        points = sweep(model, result.calibration, [0.1, 0.2, 0.3, 0.4], measured=True)
        trade_off(points).savefig("trade_off.png")  # from lit_prune.views
    """
    try:
        ratios = [float(ratio) for ratio in ratios]
    except (TypeError, ValueError):
        raise ConfigError(
            f"ratios is {ratios!r}; expected several fractions, e.g. [0.2, 0.3]."
        ) from None
    points: list[SweepPoint] = []
    dense = None
    bar = tqdm(ratios, desc="Planning", unit="ratio", disable=None if progress else True)
    for ratio in bar:
        config = PruningConfig.from_options({**options, "pruning_ratio": ratio})
        config = preset(config.preset).resolve(config)
        if measured and dense is None:
            dense = nll_as_it_is(model, calibration, config)
        try:
            planned = make_plan(model, calibration, config)
        except BudgetError as error:
            points.append(SweepPoint(ratio, dense_nll=dense, note=str(error), budget=config.budget))
            continue
        point = SweepPoint(
            ratio,
            planned.plan.provenance["achieved_ratio"],
            planned.plan,
            planned.plan.provenance["method"].get("predicted_damage"),
            dense_nll=dense,
            budget=config.budget,
        )
        if measured:
            point = replace(point, mean_nll=chosen_nll(model, planned, calibration, config))
        points.append(point)
    return tuple(points)


def chosen_nll(
    model: PreTrainedModel, planned: Planned, calibration: Calibration, config: PruningConfig
) -> float:
    """Return what a plan comes to on the choose side, nats per token, by masking the dense model.

    Args:
        model: The dense model; it is left as it was.
        planned: What `make_plan` returned; compensated here where that needs forwards.
        calibration: What it was made from.
        config: The resolved request.
    """
    planned = compensated(model, planned, calibration, config)
    with masked(model, planned.plan, planned.compensation):
        return nll_as_it_is(model, calibration, config)


def nll_as_it_is(model: PreTrainedModel, calibration: Calibration, config: PruningConfig) -> float:
    """Return what a model comes to on the choose side as it stands, nats per token."""
    with quiet(model):
        batches = calibration.rows.batches("choose", config.replay_batch_tokens)
        return quality_of(model, batches).mean_nll
