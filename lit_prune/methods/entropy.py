"""Scores of the ICML 2025 paper: unit entropy and transfer entropy, from a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_prune.importance import state_entropy, transfer_entropy, unit_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.calibration import Calibration, Unit
    from lit_prune.config import PruningConfig
    from lit_prune.decoder import DecoderSpec, SubBlock


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
