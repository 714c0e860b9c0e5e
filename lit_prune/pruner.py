"""The pipeline in one page: text -> calibration -> scores -> plan -> surgery -> report."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_prune.allocation import refuse_impossible
from lit_prune.calibration import Calibration, collect_rows
from lit_prune.checks import check_choice
from lit_prune.config import PruningConfig
from lit_prune.decoder import text_view, whole_of
from lit_prune.errors import CalibrationError, UnsupportedModelError
from lit_prune.measurement import Measurement, conditions, measure, predicted_rows, report_rows
from lit_prune.measuring import calibrate
from lit_prune.methods import Scores, preset, refuse_without_rule
from lit_prune.planning import MEASURED_WITH, Planned, compensated, make_plan, same_plan
from lit_prune.ranks import ALONE
from lit_prune.record import PruningRecord
from lit_prune.report import PruningReport
from lit_prune.surgery import Compensation, applied, tried, weights_digest
from lit_prune.target_words import target_facts, with_target
from lit_prune.targets import Aim, resolve
from lit_prune.versions import versions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from lit_prune.plan import PruningPlan
    from lit_prune.ranks import Ranks
    from lit_prune.surgery import Replaced

    Carry = Callable[[tuple[Replaced, ...]], AbstractContextManager[Sequence[str]]]

# True stops before the surgery; ``measured`` cuts and measures, then takes it back.
DryRun = Literal[False, True, "measured"]
# Below this many calibration tokens an entropy ranking is mostly noise: said in the report, not
# refused.
_FEW_TOKENS = 8192
# Below this many scored tokens a perplexity says little.
_FEW_SCORED = 256
# Of a calibration as a validation left it, or saved before calibrations named their weights.
_UNNAMED = (
    "the calibration does not say on which weights it was made, which was not checked: make a new "
    "one where they may be others"
)
_TEXT_PART = (
    "the model is multimodal: its language model was pruned. Parameters in all and bytes of "
    "weights are of the whole, all other numbers of the language model on text"
)
# Below this many tokens for each channel the inverse of a covariance is mostly noise.
_FEW_PER_CHANNEL = 5
# Where a footprint shows the resource of a budget.
_RECOUNTED = {
    "parameters": "decoder_parameters",
    "flops": "flops_per_token",
    "kv_cache_bytes": "kv_cache_bytes_per_token",
    "weight_bytes": "decoder_weight_bytes",
}


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
    dry_run: DryRun = False,
    calibration: Calibration | None = None,
    progress: bool = True,
    **options: Any,
) -> PruningResult:
    """Prune a causal language model, or a classifier on its decoder, in place.

    Args:
        model: A Hugging Face …ForCausalLM of a supported family (or …ForSequenceClassification,
            …ForTokenClassification), on the device where it shall be calibrated. Of a multimodal
            model the language model inside is pruned, on samples without images.
        dataloader: Batches with ``input_ids [batch, tokens]`` and, where there is padding,
            ``attention_mask``; ``labels`` of -100 leave tokens out of the perplexity, and those of
            a classifier are its classes. Rows are split by content into a side to calibrate on, one
            to choose on and one to score on.
        dry_run: True stops before surgery and reports what would go. ``"measured"`` also says what
            it would cost: the model is cut, measured, and put back as it was.
        calibration: A saved calibration of this model in place of ``dataloader``: planning costs no
            forward pass then (measuring does).
        progress: Show progress bars (only on a terminal).
        **options: Fields of `PruningConfig`: how much, by exactly one of ``pruning_ratio``,
            ``target_parameters``, ``target_bytes``, ``target_speedup`` and
            ``max_perplexity_increase``; and how.

    Returns:
        Plan, report and calibration. Plan and report also travel on the model, for `save_pruned`.

    Raises:
        ConfigError: If an option is wrong.
        UnsupportedModelError: If the model cannot be pruned exactly.
        BudgetError: If the target cannot be reached: before any forward pass, but for latency and
            perplexity, which are measured first.
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
    check_choice("dry_run", dry_run, DryRun)
    config = PruningConfig.from_options(options)
    config = preset(config.preset).resolve(config)
    model = text_view(model)
    refuse_without_rule(model, preset(config.preset), config)
    refuse_impossible(model, config)
    refuse_non_finite_weights(model)
    if calibration is None:
        if dataloader is None:
            raise CalibrationError("give a dataloader to calibrate on, or a saved calibration.")
        rows, notes = collect_rows(model, dataloader, config.max_calibration_tokens)
        calibration = calibrate(model, rows, config, notes=notes, progress=progress)
    planned, report = carry_out(model, calibration, config, dry_run=dry_run, progress=progress)
    return PruningResult(planned.plan, report, calibration, planned.scores, planned.compensation)


def carry_out(
    model: PreTrainedModel,
    calibration: Calibration,
    config: PruningConfig,
    *,
    dry_run: DryRun = False,
    warnings: Sequence[str] = (),
    keep: Callable[[Planned], None] | None = None,
    carry: Carry | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> tuple[Planned, PruningReport]:
    """Plan, compensate, cut and measure again, from a calibration; `prune` from there on.

    Args:
        model: The model, in its final, dense state; pruned in place.
        calibration: What was measured on it.
        config: The request, resolved by its preset.
        dry_run: True stops before surgery, ``measured`` takes it back once the model is measured.
        warnings: What the report shall say besides.
        keep: Called with what was decided, before anything is cut; on rank 0. If it raises, nothing
            is.
        carry: Entered around what follows the surgery, with where each new parameter comes from;
            left by an exception if the surgery is taken back. It returns what the report shall say.
        progress: Show progress bars (only on a terminal).
        ranks: Who has the same model: rank 0 decides and measures, all cut, and all must call this.
            What fails on one is taken back, and raised, on all.

    Raises:
        RankError: If the ranks end with different models.
    """
    aim = ranks.decide(
        lambda: resolve(model, calibration, config, progress=progress), Aim.to_json, Aim.from_json
    )
    config = aim.config

    def decide() -> tuple[Planned, Measurement]:
        planned = aim.noted(make_plan(model, calibration, config))
        before = measure(model, calibration.rows, config)
        if dry_run is not True:
            planned = compensated(model, planned, calibration, config, progress=progress)
        if keep is not None:
            keep(planned)
        return planned, before

    def report(after: Measurement | None) -> PruningReport:
        assert decided is not None  # noqa: S101 - only rank 0 is asked
        planned, before = decided
        return make_report(planned, calibration, config, before, after, said, dry_run=bool(dry_run))

    said = [*warnings, *([_TEXT_PART] if whole_of(model) is not model else ())]
    decided = ranks.on_first(decide)
    planned = same_plan(decided and decided[0], model, calibration, config, ranks)
    words = (PruningReport.to_json, PruningReport.from_json)
    if dry_run is True:
        return planned, ranks.decide(lambda: report(None), *words)
    cut = tried if dry_run else applied
    with ExitStack() as undo:  # taken back if anything fails, on any rank
        with ranks.together():
            replaced = undo.enter_context(cut(model, planned.plan, planned.compensation))
            said += undo.enter_context(carry(replaced)) if carry and not dry_run else ()
        if ranks.size > 1:
            ranks.same(weights_digest(model), "the pruned models differ", "Please report this.")
        found = ranks.decide(lambda: report(measure(model, calibration.rows, config)), *words)
    for part in {model, whole_of(model)} if not dry_run else ():
        part.pruning_record = PruningRecord(planned.plan, found)  # type: ignore[assignment]
    return planned, found


def make_report(
    planned: Planned,
    calibration: Calibration,
    config: PruningConfig,
    before: Measurement,
    after: Measurement | None,
    warnings: Sequence[str] = (),
    *,
    dry_run: bool = False,
) -> PruningReport:
    """Put what was asked, achieved and measured into one value."""
    dense, budget = before.footprint, planned.plan.provenance["budget"]
    achieved, removed = planned.plan.provenance["achieved_ratio"], budget["removed_parameters"]
    if after is not None:
        removed = dense.decoder_parameters - after.footprint.decoder_parameters
        if counted := _RECOUNTED.get(config.budget):  # latency is predicted, not counted
            whole, left = (getattr(size, counted) for size in (dense, after.footprint))
            achieved = (whole - left) / whole
    rows = report_rows(before, after)
    if config.budget == "latency":
        rows += predicted_rows(budget["dense"] / 1e9, budget["removed"] / 1e9, before, after)
    target = {}
    if asked := planned.plan.provenance.get("target"):
        target = target_facts(asked, budget, before, after)
        rows = with_target(rows, target, after)
    few = []
    if calibration.num_tokens < _FEW_TOKENS:
        few = [
            f"only {calibration.num_tokens} tokens to calibrate on: entropies are noisy below "
            f"{_FEW_TOKENS}"
        ]
    if (scored := calibration.rows.num_scored("score")) < _FEW_SCORED:
        few.append(_few_scored(scored, classifies=calibration.rows.classifies))
    if calibration.weights_digest is None:
        few.append(_UNNAMED)
    per_channel = calibration.tokens_per_channel
    if per_channel is not None and per_channel < _FEW_PER_CHANNEL:
        few += [
            f"only {per_channel:g} tokens for each channel of the widest projection: covariances "
            f"are noisy below {_FEW_PER_CHANNEL}, so more damping is chosen. Calibrate on more text"
        ]
    fallback = [
        f"{search.get('why', 'the search stopped at its node limit')}: the selection costs "
        f"{search['cost']:.4g}, and is proven within {search['cost'] - search['bound']:.4g} of the "
        "least"
        for search in planned.plan.provenance["method"].get("searches", [])
        if not search["optimal"] and search["nodes"]
    ]
    if config.channel_multiple is None and planned.budget.channel_multiple < 64:
        fallback.append(
            f"kept channels are multiples of {planned.budget.channel_multiple}, not 64: on a "
            "model this small, 64 would be too coarse for the ratio"
        )
    return PruningReport(
        requested_ratio=config.ratio,
        achieved_ratio=achieved,
        total_ratio=removed / dense.total_parameters,
        preset=config.preset,
        plan_digest=planned.plan.digest,
        dry_run=dry_run,
        rows=rows,
        budget=config.budget,
        target=target,
        parameter_ratio=None
        if config.budget == "parameters"
        else removed / dense.decoder_parameters,
        calibration=calibration.describe(),
        search=planned.plan.provenance["method"],
        compensation=planned.plan.provenance["compensation"].get("sub_blocks", {}),
        config=planned.plan.provenance["config"],  # as the family resolves it
        conditions=conditions(before, after),
        warnings=(
            *calibration.notes,
            *few,
            *fallback,
            *budget["notes"],
            *planned.plan.provenance["compensation"]["notes"],
            *warnings,
        ),
        versions=versions_of(*MEASURED_WITH),
    )


def _few_scored(scored: int, *, classifies: bool) -> str:
    if not classifies:
        return f"only {scored} tokens are scored: the perplexity is a rough estimate"
    if not scored:
        return "no sample to score has a label: accuracy and cross-entropy were not measured"
    return f"only {scored} labels are scored: the accuracy is a rough estimate"


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
