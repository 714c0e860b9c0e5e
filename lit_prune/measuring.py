"""From text to a calibration: measure what the preset needs; the model is as it was."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.allocation import refuse_impossible
from lit_prune.calibration import (
    Calibration,
    bypass_units,
    covariance_groups,
    measure_residuals,
    measure_sensitivities,
    measure_taylor,
    out_of_memory_in,
    replay,
    replay_within,
)
from lit_prune.decoder import DecoderParts, SubBlock, spec_for
from lit_prune.errors import CalibrationError, PlanMismatchError, ScoreError
from lit_prune.importance import (
    damage_curve,
    damped,
    experts_damage,
    experts_order,
    order_damage,
)
from lit_prune.latency_table import (
    latency_from_json,
    latency_to_json,
    refuse_other_workload,
    with_latency_table,
)
from lit_prune.methods import preset
from lit_prune.ranks import ALONE
from lit_prune.surgery import weights_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from lit_prune.calibration import Replayed, RowSet, Unit
    from lit_prune.config import PruningConfig
    from lit_prune.ranks import Ranks

_log = logging.getLogger(__name__)
# Bytes of covariances that one wants to be told of.
_MUCH = 10**9


def calibrate(
    model: PreTrainedModel,
    rows: RowSet,
    config: PruningConfig,
    *,
    units: dict[SubBlock, tuple[Tensor, Tensor]] | None = None,
    notes: Sequence[str] = (),
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Calibration:
    """Measure what the method needs, by replaying the rows where it needs more than ``units``.

    Args:
        model: The model in its final, dense state.
        rows: The text.
        config: The request.
        units: Moments that were observed in the validation loop on exactly these weights. They are
            used where nothing else is needed; a replay measures them anew in its own first forward,
            at no extra cost and independent of order and padding.
        notes: What the report should say about the text.
        progress: Show a bar.
        ranks: Who shares the forwards; all must call this, with the same model, rows and request.
            The calibration is complete on rank 0, the others have rows, means and variances.

    Raises:
        CalibrationError: If there is too little text, an activation is not finite, or memory runs
            out; on all ranks.
        BudgetError: If a ratio of latency cannot be reached, as soon as latency is measured.
        RankError: If the weights are not the same on all ranks.
    """
    with out_of_memory_in("the calibration", config.replay_batch_tokens):
        return _calibrated(model, rows, config, units, notes, ranks, progress=progress)


def _calibrated(
    model: PreTrainedModel,
    rows: RowSet,
    config: PruningConfig,
    units: dict[SubBlock, tuple[Tensor, Tensor]] | None,
    notes: Sequence[str],
    ranks: Ranks,
    *,
    progress: bool,
) -> Calibration:
    config = preset(config.preset).resolve(config)
    needs = preset(config.preset).all_needs(config)
    fingerprint = spec_for(model).fingerprint
    calibration = Calibration(fingerprint, rows, units or {}, notes=tuple(notes))
    calibration.require(config.min_calibration_tokens)
    weights = weights_digest(model)
    ranks.same(
        weights,
        "the parameters of the model differ between the processes",
        "Load the same checkpoint everywhere; is a parameter kept out of DDP, or made from a seed "
        "of each process?",
    )
    calibration = replace(calibration, weights_digest=weights)
    if units is not None and not needs and rows.split:
        return calibration
    if needs.latency:
        calibration = ranks.decide(
            lambda: with_latency_table(model, calibration, config),
            latency_to_json,
            partial(latency_from_json, calibration),
        )
        refuse_impossible(model, config, calibration.latency)
    squares = needs.covariances or needs.curves
    options: dict[str, Any] = {
        "max_tokens": config.replay_batch_tokens,
        "progress": progress,
        "ranks": ranks,
    }
    if squares:
        options["covariance_bytes"] = config.covariance_bytes
        _say_memory(model, config)
    run = replay_within if squares else replay
    replayed = run(
        model,
        rows,
        needed_bypasses(model, config),
        target=config.transfer_target,
        joint=config.estimator == "logdet",
        **options,
    )
    calibration = calibration.with_replay(replayed)
    if squares:
        held_out = run(model, rows, side="choose", **options)
        calibration = replace(calibration, held_out=_about(held_out, replayed))
    if needs.curves:
        curves = ranks.on_first(lambda: damage_curves(model, calibration, config))
        calibration = replace(calibration, curves=curves)
    if needs.sensitivities:
        sensitivities = measure_sensitivities(
            model,
            rows,
            {place: mean for place, (mean, _) in replayed.units.items()},
            max_tokens=config.search_tokens,
            batch_tokens=config.replay_batch_tokens,
            progress=progress,
            ranks=ranks,
        )
        calibration = replace(calibration, sensitivities=sensitivities)
    if needs.residuals:
        similarities, inputs = measure_residuals(
            model, rows, batch_tokens=config.replay_batch_tokens, ranks=ranks
        )
        calibration = replace(calibration, similarities=similarities, inputs=inputs)
    if needs.taylor:
        taylor = ranks.on_first(lambda: measure_taylor(model, rows, progress=progress))
        calibration = replace(calibration, taylor=taylor)
    return calibration


def damage_curves(
    model: PreTrainedModel, calibration: Calibration, config: PruningConfig
) -> dict[SubBlock, Tensor]:
    """Return order and damage of every sub-block, as `Calibration.curves` keeps them."""
    spec, parts = spec_for(model), DecoderParts(model)
    curves: dict[SubBlock, Tensor] = {}
    for index, part in spec.sub_blocks:
        place: SubBlock = (index, part.kind)
        if part.unit == "expert":
            curves[place] = experts_curve((calibration.covariances or {})[place])
            continue
        weight = parts.output(*place).weight.detach()
        covariance = (calibration.covariances or {})[place].to(weight.device)
        covariance = damped(covariance, config.damping)
        try:
            curve = damage_curve(covariance, weight, part.unit_width)
        except ScoreError as error:
            name = parts.output_name(*place)
            raise ScoreError(f"{name}, with damping={config.damping}: {error}") from error
        _, alone = order_damage(covariance, weight, curve.order, part.unit_width)
        leaves = torch.cat([curve.order.new_full((1,), -1), curve.order])
        curves[place] = torch.stack([leaves.double(), curve.damage, alone], 1).cpu()
    return curves


def experts_curve(gram: Tensor, order: Tensor | None = None) -> Tensor:
    """Return order and damage of experts; the damage twice, as nothing is compensated."""
    order = experts_order(gram) if order is None else order
    damage = experts_damage(gram, order)
    leaves = torch.cat([order.new_full((1,), -1), order])
    return torch.stack([leaves.double(), damage, damage], 1)


def _say_memory(model: PreTrainedModel, config: PruningConfig) -> None:
    """Say what covariances will take, before they take it; aloud where that is much."""
    groups = covariance_groups(DecoderParts(model), config.covariance_bytes)
    whole = 2 * sum(size for group in groups for size in group.values())
    _log.log(
        logging.WARNING if whole >= _MUCH else logging.INFO,
        "covariances of %d sub-blocks, of two sides of the text, will take %.2f GB of memory; they "
        "are measured in %d pass(es) a side",
        sum(map(len, groups)), whole / 1e9, len(groups),
    )  # fmt: skip


def _about(other: Replayed, calibrated: Replayed) -> dict[SubBlock, Tensor]:
    """Return second moments of one text about the means of another."""
    moments = {}
    for place, covariance in other.covariances.items():
        if len(other.units[place][0]) != len(covariance):  # experts: about zero, not their means
            moments[place] = covariance
            continue
        shift = other.units[place][0] - calibrated.units[place][0]
        moments[place] = covariance.addr_(shift, shift)  # large, and nobody else's
    return moments


def needed_bypasses(model: PreTrainedModel, config: PruningConfig) -> tuple[Unit, ...]:
    """Return the units whose transfer entropy the request needs: none for fixed ratios."""
    method = preset(config.preset)
    wanted = method.all_needs(method.resolve(config)).bypasses
    return tuple(unit for unit in bypass_units(DecoderParts(model)) if unit.kind in wanted)


def refuse_unfit(
    model: PreTrainedModel, weights: str, calibration: Calibration, config: PruningConfig
) -> None:
    """Refuse a calibration of another model, or one that lacks what the request needs.

    Raises:
        PlanMismatchError: If it is of another architecture, or of other weights.
        CalibrationError: Says what it lacks.
    """
    fingerprint = spec_for(model).fingerprint
    if calibration.model_fingerprint != fingerprint:
        raise PlanMismatchError(
            "calibration was made for a model with fingerprint "
            f"{calibration.model_fingerprint[:12]}…, this one has {fingerprint[:12]}…. "
            "Calibrate this model."
        )
    made_on = calibration.weights_digest
    if made_on is not None and made_on != weights:
        raise PlanMismatchError(
            f"calibrated on other weights ({made_on[:12]}…, this model has "
            f"{weights[:12]}…), or on the same in another dtype: its statistics are not of this "
            "model. Calibrate again."
        )
    if not calibration.units:
        raise CalibrationError(
            "calibration has samples and no moments of the units: several processes saw parts of "
            "it in a validation, or no token fell on the calibrate side. Calibrate again."
        )
    needed = set(needed_bypasses(model, config))
    joint = calibration.full is not None and calibration.full.ndim == 2
    if needed and (
        calibration.target != config.transfer_target or (config.estimator == "logdet" and not joint)
    ):
        raise CalibrationError(
            f"calibration was measured for transfer_target {calibration.target!r} with "
            f"{'covariances' if joint else 'variances'}; estimator {config.estimator!r} at "
            f"{config.transfer_target!r} needs its own. Calibrate again with these options."
        )
    if missing := sorted(needed - set(calibration.bypassed or {})):
        raise CalibrationError(
            f"calibration has no transfer entropy of {missing[0]} ({len(missing)} of "
            f"{len(needed)} missing): it was made for another request. Calibrate again with these "
            "options."
        )
    if lacking := calibration.lacks(preset(config.preset).all_needs(config)):
        raise CalibrationError(
            f"calibration has no {' and no '.join(lacking)}, which preset {config.preset!r} with "
            f"compensation {config.compensation!r} needs: it was made for another request. "
            "Calibrate again with these options."
        )
    if config.budget == "latency":
        refuse_other_workload(model, calibration, config)
