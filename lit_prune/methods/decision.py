"""What a method is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_prune.importance import state_entropy, transfer_entropy, unit_entropy
from lit_prune.plan import LayerPlan, PruningPlan

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.allocation import Budget, Ranking
    from lit_prune.calibration import Calibration, Unit
    from lit_prune.config import PruningConfig
    from lit_prune.decoder import DecoderSpec, SubBlock

# Mean NLL of the choose text under a plan (nats for each token), measured on the masked dense
# model.
Judge = Callable[[PruningPlan], float]


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of everything that may leave, in nats; higher means keep.

    Attributes:
        units: Entropy of each KV group and channel, by ``(layer, kind)``, ``[units]``, float64.
        transfer: Transfer entropy of each block, attention and MLP; empty where it was not
            measured.
    """

    units: dict[SubBlock, Tensor]
    transfer: dict[Unit, float]


@dataclass(frozen=True, slots=True)
class Decision:
    """Kept units of every sub-block, and how they were found.

    Attributes:
        counts: Kept units by ``(layer, kind)``.
        trace: JSON-able record of each stage.
    """

    counts: dict[SubBlock, int]
    trace: dict[str, Any] = field(default_factory=dict)


def entropy_scores(spec: DecoderSpec, calibration: Calibration, config: PruningConfig) -> Scores:
    """Score units and blocks by Gaussian entropy and transfer entropy.

    Args:
        spec: The decoder.
        calibration: Moments of units and, where a replay measured them, of every bypass.
        config: Estimator, floor and reductions.

    Raises:
        ScoreError: If a moment is not finite.
    """
    floor = config.entropy_floor
    units: dict[SubBlock, Tensor] = {}
    for index, part in spec.sub_blocks:
        variance = calibration.units[index, part.kind][1]
        units[index, part.kind] = unit_entropy(
            variance, part.unit_width, floor=floor, reduction=config.kv_group_score
        )
    transfer: dict[Unit, float] = {}
    if calibration.full is not None and calibration.bypassed:
        full = _state_entropy(calibration.full, config)
        for unit, moments in calibration.bypassed.items():
            transfer[unit] = float(transfer_entropy(full, _state_entropy(moments, config)))
    return Scores(units, transfer)


def _state_entropy(moments: Tensor, config: PruningConfig) -> Tensor:
    # covariances that were kept for ``logdet`` serve the other estimators too
    if moments.ndim == 2 and config.estimator != "logdet":
        moments = moments.diagonal()
    return state_entropy(moments, estimator=config.estimator, floor=config.entropy_floor)


def plan_of(budget: Budget, counts: dict[SubBlock, int], ranking: Ranking) -> PruningPlan:
    """Return the plan that keeps the best ``counts`` units of every sub-block."""
    layers = tuple(
        LayerPlan(
            block.index,
            ranking.kept((block.index, "attention"), counts[block.index, "attention"])
            if block.attention
            else (),
            ranking.kept((block.index, "mlp"), counts[block.index, "mlp"]) if block.mlp else (),
        )
        for block in budget.spec.blocks
    )
    return PruningPlan(budget.spec.fingerprint, layers)
