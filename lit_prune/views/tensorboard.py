"""The tags under which a run is found in TensorBoard, and the functions that write them.

| tag | kind | what |
|---|---|---|
| ``prune/requested_ratio`` | scalar | fraction of the budget (decoder parameters) to be removed |
| ``prune/achieved_ratio`` | scalar | fraction that was removed |
| ``prune/total_ratio`` | scalar | fraction of all parameters, embeddings and head included |
| ``prune/entropy/kv_group/{mean,min}`` | scalar | unit entropy (nats) at each validation |
| ``prune/entropy/channel/{mean,min}`` | scalar | unit entropy (nats) at each validation |
| ``quality/<key>/{before,after,ratio}`` | scalar | perplexity, accuracy, nats |
| ``cost/<key>/{before,after,ratio}`` | scalar | parameters, FLOPs, bytes, seconds; see below |
| ``before_after/picture`` | image | before and after, with a bar for each ratio |
| ``before_after/table`` | text | the report as Markdown |
| ``prune/score/kv_group`` | image | entropy of KV groups, layer x unit, cuts marked |
| ``prune/score/channel`` | image | entropy of MLP channels, layer x unit, cuts marked |
| ``prune/kept`` | image | kept share of KV groups and channels by layer |
| ``prune/damage_curves`` | image | predicted damage of each sub-block (preset ``conditional``) |
| ``prune/transfer_entropy`` | image | of blocks, attentions, MLPs (presets that measure it) |
| ``plan/json`` | text | the plan as JSON, one line for each layer |
| HPARAMS tab | hparams | the request as ``prune/<option>``, results (`hparams.METRICS`) beside it |

``<key>`` is `ReportRow.key`. A row that was not measured, or is not finite, has no scalar; a score
that was not measured has no image. TensorBoard sorts by name and gives each scalar a card, so what
a reader looks for first has the first name, and of the costs it shows those of `hparams.METRICS`:
each card has one value, and all rows stand in ``before_after/table``. A logger whose ``experiment``
takes no figures and text gets scalars alone, and every row.
"""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any, Protocol

from lit_prune.views.before_after import before_after
from lit_prune.views.damage import damage_curves
from lit_prune.views.hparams import METRICS, log_request
from lit_prune.views.kept_units import kept_units
from lit_prune.views.transfer import transfer_entropy
from lit_prune.views.unit_entropy import unit_entropy_heatmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from matplotlib.figure import Figure
    from torch import Tensor

    from lit_prune.decoder import DecoderSpec, SubBlock, SubBlockKind
    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport
    from lit_prune.views.transfer import BypassKind

_log = logging.getLogger(__name__)

RATIOS = ("prune/requested_ratio", "prune/achieved_ratio", "prune/total_ratio")
_SCORES = ("prune/score/kv_group", "prune/score/channel")
IMAGES = (
    "before_after/picture",
    *_SCORES,
    "prune/kept",
    "prune/damage_curves",  # of `conditional`
    "prune/transfer_entropy",  # where a preset measures it: `paper`
)
TEXTS = ("before_after/table", "plan/json")
ENTROPIES = tuple(
    f"prune/entropy/{g}/{s}" for g in ("kv_group", "channel") for s in ("mean", "min")
)


class MetricLogger(Protocol):
    """What is asked of a logger; every logger of Lightning has it."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record scalars."""


def log_report(
    loggers: Iterable[MetricLogger],
    *,
    spec: DecoderSpec,
    plan: PruningPlan,
    report: PruningReport,
    entropies: Mapping[tuple[int, SubBlockKind], Tensor],
    transfer: Mapping[tuple[int, BypassKind], float],
    damage: Mapping[SubBlock, Tensor] | None = None,
    step: int,
) -> None:
    """Show a finished pruning in every logger, as far as each can show it. Call it on rank zero.

    A logger that fails is reported as a warning and does not stop the others: the model is already
    pruned, and a picture is not worth losing it.

    Args:
        loggers: ``trainer.loggers``; may be empty.
        spec: The model before pruning.
        plan: What stays.
        report: Before and after.
        entropies: Entropy of each unit, ``[units]``, nats.
        transfer: Transfer entropy of blocks, attentions and MLPs; empty where it was not measured.
        damage: Predicted damage of each sub-block, for presets that predict it.
        step: Global step of the trainer.
    """
    found = list(loggers)
    if not found:
        _log.info("no logger: nothing is shown in TensorBoard; the report holds the numbers")
    scalars = _finite(report_scalars(report))
    nats = "activation units" if report.config.get("estimator") == "std_sum" else "nats"
    draw: dict[str, Callable[[], Figure]] = {
        "prune/kept": lambda: kept_units(spec, plan),
        "before_after/picture": lambda: before_after(report),
    }
    if any(kind == "attention" for _, kind in entropies):
        draw[_SCORES[0]] = lambda: unit_entropy_heatmap(spec, plan, entropies, "attention")
    if any(kind == "mlp" for _, kind in entropies):
        draw[_SCORES[1]] = lambda: unit_entropy_heatmap(spec, plan, entropies, "mlp")
    if transfer:
        draw["prune/transfer_entropy"] = lambda: transfer_entropy(spec, plan, transfer, unit=nats)
    if damage:
        draw["prune/damage_curves"] = lambda: damage_curves(spec, plan, damage)
    plan_block = f"```json\n{plan_text(plan)}\n```"
    texts = {"before_after/table": report.to_markdown(), "plan/json": plan_block}

    def show(logger: MetricLogger) -> None:
        writer: Any = getattr(logger, "experiment", None)
        if not hasattr(writer, "add_figure") or not hasattr(writer, "add_text"):
            logger.log_metrics(scalars, step=step)
            _log.info("%s shows scalars only; pictures and texts need TensorBoard", _name(logger))
            return
        logger.log_metrics({t: x for t, x in scalars.items() if _has_a_card(t)}, step=step)
        for tag, text in texts.items():
            writer.add_text(tag, text, step)
        log_request([logger], report.config, getattr(logger, "hparams", None))
        _write_figures(writer, draw, step)
        if hasattr(writer, "flush"):
            writer.flush()

    for logger in found:
        _guarded(show, logger)


def log_unit_entropy(
    loggers: Iterable[MetricLogger],
    entropies: Mapping[tuple[int, SubBlockKind], Tensor],
    step: int,
) -> None:
    """Record mean and least unit entropy of one validation in every logger. Call it on rank zero.

    Args:
        loggers: ``trainer.loggers``; may be empty.
        entropies: Entropy of each unit, ``[units]``, nats; values that are not finite are left out.
        step: Global step of the trainer.
    """
    import torch

    scalars: dict[str, float] = {}
    for kind, granularity in (("attention", "kv_group"), ("mlp", "channel")):
        parts = [value.detach().double().cpu() for (_, k), value in entropies.items() if k == kind]
        values = torch.cat(parts) if parts else torch.empty(0)
        values = values[values.isfinite()]
        if values.numel():
            scalars[f"prune/entropy/{granularity}/mean"] = float(values.mean())
            scalars[f"prune/entropy/{granularity}/min"] = float(values.min())
    if scalars:
        for logger in loggers:
            _guarded(lambda one: one.log_metrics(scalars, step=step), logger)


def report_scalars(report: PruningReport) -> dict[str, float]:
    """Return every number of a report under its tag; what was not measured is left out.

    Example:
        >>> from lit_prune.report import PruningReport, ReportRow
        >>> row = ReportRow(key="mean_nll", label="NLL", unit="nats", before=2.0, after=3.0)
        >>> report = PruningReport(
        ...     requested_ratio=0.3, achieved_ratio=0.3, total_ratio=0.2, preset="paper",
        ...     plan_digest="", dry_run=False, rows=(row,))
        >>> report_scalars(report)["quality/mean_nll/ratio"]
        1.5
    """
    ratios = (report.requested_ratio, report.achieved_ratio, report.total_ratio)
    scalars = dict(zip(RATIOS, ratios, strict=True))
    for row in report.rows:
        place = "quality" if row.unit in ("nats", "perplexity", "accuracy") else "cost"
        for name, value in (("before", row.before), ("after", row.after), ("ratio", row.ratio)):
            if value is not None:
                scalars[f"{place}/{row.key}/{name}"] = float(value)
    return scalars


def plan_text(plan: PruningPlan) -> str:
    """Return a plan as JSON with one line for each layer: `PruningPlan.from_json` reads it."""
    whole = json.loads(plan.to_json())
    layers = ",\n".join(json.dumps(layer, sort_keys=True) for layer in whole.pop("layers"))
    rest = json.dumps(whole, sort_keys=True, indent=1)
    return f'{rest[:-2]},\n "layers": [\n{layers}\n]\n}}'


def _has_a_card(tag: str) -> bool:
    return f"{tag.rpartition('/')[0]}/ratio" in METRICS or not tag.startswith("cost/")


def _finite(scalars: dict[str, float]) -> dict[str, float]:
    wrong = sorted(tag for tag, value in scalars.items() if not math.isfinite(value))
    if wrong:
        _log.info("not finite, left out of the loggers: %s", ", ".join(wrong))
    return {tag: value for tag, value in scalars.items() if tag not in wrong}


def _write_figures(writer: Any, draw: dict[str, Callable[[], Figure]], step: int) -> None:  # noqa: ANN401
    try:
        import matplotlib.figure  # noqa: F401 - is it there?
    except ImportError as error:
        _log.info("no pictures: matplotlib cannot be imported (%s)", error)
        return
    for tag in IMAGES:
        if tag in draw:
            writer.add_figure(tag, draw[tag](), step, close=False)  # not pyplot's: nothing to close


def _guarded(act: Callable[[MetricLogger], None], logger: MetricLogger) -> None:
    try:
        act(logger)
    except Exception as error:  # a logger's failure must not cost the pruned model
        _log.warning("%s could not record the pruning: %r", _name(logger), error)


def _name(logger: object) -> str:
    return type(logger).__name__
