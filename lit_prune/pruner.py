"""The pipeline in one page: text -> calibration -> scores -> plan -> surgery -> report."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.allocation import Ranking, make_budget
from lit_prune.calibration import Calibration, bypass_units, collect_rows, replay
from lit_prune.config import PruningConfig
from lit_prune.decoder import DecoderParts, SubBlock, quiet, spec_for
from lit_prune.errors import CalibrationError, PlanMismatchError, UnsupportedModelError
from lit_prune.measurement import Measurement, conditions, measure, report_rows
from lit_prune.methods import Scores, entropy_scores, plan_of, preset
from lit_prune.metrics import perplexity_of
from lit_prune.record import PruningRecord
from lit_prune.report import PruningReport
from lit_prune.surgery import Compensation, applied, masked, mean_compensation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedModel

    from lit_prune.allocation import Budget
    from lit_prune.calibration import RowSet
    from lit_prune.plan import PruningPlan

# Below this many calibration tokens an entropy ranking is mostly noise: said in the report, not
# refused.
_FEW_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with everything that it rests on; nothing has been changed yet.

    Attributes:
        plan: What stays.
        compensation: Constants for what goes; None without compensation.
        scores: Unit entropies and transfer entropies.
        budget: The request against the model.
    """

    plan: PruningPlan
    compensation: Compensation | None
    scores: Scores
    budget: Budget


@dataclass(frozen=True, slots=True)
class PruningResult:
    """What `prune` returns."""

    plan: PruningPlan
    report: PruningReport
    calibration: Calibration
    scores: Scores
    compensation: Compensation | None


def prune(
    model: PreTrainedModel,
    dataloader: Iterable[Any] | None = None,
    *,
    dry_run: bool = False,
    calibration: Calibration | None = None,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """Prune a causal language model in place.

    Args:
        model: A Hugging Face …ForCausalLM of a supported family, on the device where it shall be
            calibrated.
        dataloader: Batches with ``input_ids [batch, tokens]`` and, where there is padding,
            ``attention_mask``; ``labels`` of -100 leave tokens out of the perplexity. Rows are
            split by content into a side to calibrate on, one to choose on and one to score on.
        dry_run: Stop before surgery and report what would happen.
        calibration: A saved calibration of this model in place of ``dataloader``: planning costs no
            forward pass then (measuring does).
        progress: Show progress bars (only on a terminal).
        **options: Fields of `PruningConfig`; ``pruning_ratio`` is required.

    Returns:
        Plan, report and calibration. Plan and report also travel on the model, for `save_pruned`.

    Raises:
        ConfigError: If an option is wrong.
        UnsupportedModelError: If the model cannot be pruned exactly.
        BudgetError: If the ratio cannot be reached; before any forward pass.
        CalibrationError: If the text or the activations are unusable.
        SurgeryError: If the result is not what was planned. After every error the model is
            bit-identical.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        ...     max_position_embeddings=64))
        >>> batches = [{"input_ids": torch.randint(64, (4, 32))} for _ in range(8)]
        >>> result = prune(model, batches, pruning_ratio=0.3, latency_prompt_tokens=0)
        >>> abs(result.report.achieved_ratio - 0.3) <= 0.005
        True
    """
    config = PruningConfig.from_options(options)
    preset(config.preset)
    spec = spec_for(model)
    make_budget(spec, config)
    refuse_non_finite_weights(model)
    if calibration is None:
        if dataloader is None:
            raise CalibrationError("give a dataloader to calibrate on, or a saved calibration.")
        rows, notes = collect_rows(model, dataloader, config.max_calibration_tokens)
        calibration = calibrate(model, rows, config, notes=notes, progress=progress)
    planned = make_plan(model, calibration, config)
    before = measure(model, calibration.rows, config)
    if dry_run:
        report = make_report(planned, calibration, config, before, None)
    else:
        with applied(model, planned.plan, planned.compensation):
            after = measure(model, calibration.rows, config)
            report = make_report(planned, calibration, config, before, after)
        model.pruning_record = PruningRecord(planned.plan, report)  # type: ignore[assignment]
    return PruningResult(planned.plan, report, calibration, planned.scores, planned.compensation)


def calibrate(
    model: PreTrainedModel,
    rows: RowSet,
    config: PruningConfig,
    *,
    units: dict[SubBlock, tuple[Tensor, Tensor]] | None = None,
    notes: Sequence[str] = (),
    progress: bool = True,
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

    Raises:
        CalibrationError: If there is too little text, or an activation is not finite.
    """
    fingerprint = spec_for(model).fingerprint
    calibration = Calibration(fingerprint, rows, units or {}, notes=tuple(notes))
    calibration.require(config.min_calibration_tokens)
    bypass = needed_bypasses(model, config)
    if units is not None and not bypass and rows.split:
        return calibration
    replayed = replay(
        model,
        rows,
        bypass,
        target=config.transfer_target,
        joint=config.estimator == "logdet",
        max_tokens=config.replay_batch_tokens,
        progress=progress,
    )
    return calibration.with_replay(replayed)


def needed_bypasses(model: PreTrainedModel, config: PruningConfig) -> tuple[Any, ...]:
    """Return the units whose transfer entropy the request needs: none for fixed ratios."""
    if config.allocator == "uniform" or not config.pruning_ratio:
        return ()
    wanted = {"block"} | ({"attention", "mlp"} if "sub_block" in config.granularities else set())
    return tuple(unit for unit in bypass_units(DecoderParts(model)) if unit.kind in wanted)


def make_plan(model: PreTrainedModel, calibration: Calibration, config: PruningConfig) -> Planned:
    """Plan from a calibration.

    The model is only read (and, between K = 3 and 6, judged on the choose text).

    Raises:
        PlanMismatchError: If the calibration belongs to another architecture.
        BudgetError: If the ratio cannot be met.
    """
    spec = spec_for(model)
    if calibration.model_fingerprint != spec.fingerprint:
        raise PlanMismatchError(
            "calibration was made for a model with fingerprint "
            f"{calibration.model_fingerprint[:12]}…, this one has {spec.fingerprint[:12]}…. "
            "Calibrate this model."
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
            "options, or use allocator='uniform'."
        )
    budget = make_budget(spec, config)
    scores = entropy_scores(spec, calibration, config)
    ranking = Ranking(
        {place: entropy.numpy() for place, entropy in scores.units.items()},
        {(index, part.kind): part.unit_width for index, part in spec.sub_blocks},
    )

    def constants(plan: PruningPlan) -> Compensation | None:
        if config.compensation == "none":
            return None
        return mean_compensation(model, plan, calibration.units, removed_mean=config.removed_mean)

    def judge(plan: PruningPlan) -> float:
        with quiet(model), masked(model, plan, constants(plan)):
            return perplexity_of(
                model, calibration.rows.batches("choose", config.replay_batch_tokens)
            ).mean_nll

    decision = preset(config.preset)(budget, scores, ranking, judge)
    provenance = {
        "config": config.to_dict(),
        "channel_multiple": budget.channel_multiple,
        "achieved_ratio": budget.removed(decision.counts) / spec.decoder_parameters,
        "method": decision.trace,
        "calibration": calibration.describe(),
        "versions": versions(),
    }
    plan = replace(plan_of(budget, decision.counts, ranking), provenance=provenance)
    return Planned(plan, constants(plan), scores, budget)


def make_report(
    planned: Planned,
    calibration: Calibration,
    config: PruningConfig,
    before: Measurement,
    after: Measurement | None,
    warnings: Sequence[str] = (),
) -> PruningReport:
    """Put what was asked, achieved and measured into one value."""
    dense = before.footprint
    if after is None:
        removed = round(planned.plan.provenance["achieved_ratio"] * dense.decoder_parameters)
    else:
        removed = dense.decoder_parameters - after.footprint.decoder_parameters
    few = []
    if calibration.num_tokens < _FEW_TOKENS:
        few = [
            f"only {calibration.num_tokens} tokens to calibrate on: entropies are noisy below "
            f"{_FEW_TOKENS}"
        ]
    fallback = [
        "the search stopped at its node limit: the selection is the best found, its cost proven "
        f"within {search['transfer_entropy'] - search['bound']:.4g} nats of the optimum"
        for search in planned.plan.provenance["method"].get("searches", [])
        if not search["optimal"] and config.allocator == "depth_first"
    ]
    if config.channel_multiple is None and planned.budget.channel_multiple < 64:
        fallback.append(
            f"kept channels are multiples of {planned.budget.channel_multiple}, not 64: on a "
            "model this small, 64 would be too coarse for the ratio"
        )
    return PruningReport(
        requested_ratio=config.pruning_ratio,
        achieved_ratio=removed / dense.decoder_parameters,
        total_ratio=removed / dense.total_parameters,
        preset=config.preset,
        plan_digest=planned.plan.digest,
        dry_run=after is None,
        rows=report_rows(before, after),
        calibration=calibration.describe(),
        search=planned.plan.provenance["method"],
        config=config.to_dict(),
        conditions=conditions(before, after),
        warnings=(*calibration.notes, *few, *fallback, *warnings),
        versions=versions(),
    )


def refuse_non_finite_weights(model: PreTrainedModel) -> None:
    """Refuse a model with NaN or infinite weights, before anything is computed from them.

    Raises:
        UnsupportedModelError: Names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise UnsupportedModelError(
                f"{name} has {bad} of {parameter.numel()} values that are NaN or infinite: load "
                "the checkpoint again, or look at the training run (learning rate, precision)."
            )


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    found = {"python": platform.python_version()}
    for package in (
        "lit-prune",
        "torch",
        "transformers",
        "lightning",
        "torchmetrics",
        "scikit-learn",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
