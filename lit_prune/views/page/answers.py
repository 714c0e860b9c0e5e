"""The three answers at the top: what was cut, what did it cost, is it faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.config import RESOURCES
from lit_prune.report import format_value
from lit_prune.views.page.elements import listed, section, tag
from lit_prune.views.page.figures import change, enumerated, percent, short
from lit_prune.views.page.outline import NAMES
from lit_prune.views.page.times import PHASES

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from lit_prune.report import PruningReport, ReportRow
    from lit_prune.views.page.outline import Outline
    from lit_prune.views.page.times import Timed

_PHASE_WORDS = {"prefill": "reading the prompt (prefill)", "decode": "writing tokens (decode)"}


def answers(report: PruningReport, outline: Outline, times: list[Timed]) -> Element:
    """Return the headline: three questions, each with its answer in words and figures."""
    would = report.dry_run
    cards = (
        ("What would be cut?" if would else "What was cut?", *_cut(report, outline)),
        ("What would it cost?" if would else "What did it cost?", *_cost(report)),
        ("Is it faster?", *_faster(report, times)),
    )
    shown = [
        tag("div", tag("h3", question), tag("p", answer, class_="answer"), listed(facts))
        for question, answer, facts in cards
    ]
    return section("answers", "In short", tag("div", *shown, class_="cards"))


def _cut(report: PruningReport, outline: Outline) -> tuple[str, list[str]]:
    answer = f"{percent(report.achieved_ratio)} of the {RESOURCES[report.budget]}"
    facts = [f"asked for {percent(report.requested_ratio)}"]
    if report.parameter_ratio is not None:
        facts.append(f"{percent(report.parameter_ratio)} of the decoder parameters")
    total = f"{percent(report.total_ratio)} of all parameters, embeddings and head included"
    row = _row(report, "total_parameters")
    if row is not None and row.after is not None:
        total += f": {format_value(row.before, row.unit)} → {format_value(row.after, row.unit)}"
    facts.append(total)
    for kind, unit in (("attention", "attention KV groups"), ("mlp", "MLP channels")):
        cut, whole = outline.counts(kind)  # type: ignore[arg-type] # the two kinds, spelled out
        if outline.exact:
            facts.append(f"{cut:,} of {whole:,} {unit}" if cut else f"no {unit}")
    if gone := outline.whole_layers():
        facts.append(f"whole layers: {enumerated(gone)}")
    for kind, name in NAMES.items():
        if lost := outline.removed(kind):
            facts.append(f"the whole {name} of layers: {enumerated(lost)}")
    return answer, facts


def _cost(report: PruningReport) -> tuple[str, list[str]]:
    classifies = "classification" in report.conditions
    row = _row(report, "accuracy" if classifies else "perplexity")
    name, scored, kind = "Perplexity", report.conditions.get("perplexity", {}), "tokens"
    if classifies:
        name, scored, kind = "Accuracy", report.conditions["classification"], "labels"
    facts = []
    if (count := scored.get(f"num_{kind}")) is not None:
        decided = "on which nothing was decided"
        if not report.calibration.get("disjoint_sides", True):
            decided = "by which it was pruned, too: optimistic, there was too little to split"
        facts.append(f"measured on {count:,} {kind} of the text given, {decided}")
    if report.dry_run and all(one.after is None for one in report.rows):
        predicted = report.search.get("predicted_damage")
        if predicted is not None and report.search.get("sensitivity") in ("kl", "nll"):
            facts.append("a prediction: nothing was cut")
            return f"{short(predicted)} nats per token, predicted", facts
        return "Not known: nothing was cut", ["dry run"]
    if row is None or row.before is None:
        return "Not measured", facts
    if row.after is None:
        return f"{name} is not a finite number any more", [*facts, "do not use this model"]
    lower, higher = ("worse", "better") if classifies else ("better", "worse")
    words = {lower: f"lower, which is {lower}", higher: f"higher, which is {higher}"}
    verdict = words.get(row.verdict, "hardly any difference")
    facts.insert(0, f"{change(row.ratio)}: {verdict}")
    if not classifies:
        facts.append("perplexity is not fitness for a task: measure yours")
    return f"{name} {row.before:,.2f} → {row.after:,.2f}", facts


def _faster(report: PruningReport, times: list[Timed]) -> tuple[str, list[str]]:
    if not times:
        return "Not measured", ["latency was switched off (`latency_prompt_tokens` is 0)"]
    if all(one.after is None for one in times):
        return "Not known: nothing was cut", ["dry run; the dense model was measured"]
    facts, claims, slower, doubts, everywhere = [], 0, 0, 0, 0
    for name in PHASES:
        words, alike = [], []
        for one in times:
            phase, batch = one.phase(name), f"at batch {one.before.batch_size}"
            if phase is None:
                continue
            everywhere += 1
            doubt = phase.claim and bool(one.reasons.get(name))
            claims, doubts = claims + phase.claim, doubts + doubt
            slower += phase.measurable and not phase.claim
            if phase.claim:
                words.append(f"{phase.ratio:.2f}× faster {batch}" + " (doubtful)" * doubt)
            elif phase.measurable:
                words.append(f"slower {batch} ({phase.ratio:.2f}×)")
            else:
                alike.append(str(one.before.batch_size))
        if alike:
            words.append(f"no measurable difference at batch {' and '.join(alike)}")
        if words:  # a classifier decodes nothing
            facts.append(f"{_PHASE_WORDS[name]}: {', '.join(words)}")
    if claims == doubts:
        answer = "No, slower" if slower else "No gain to count on"
    elif slower:
        answer = "In part, and in part slower"
    else:
        answer = "Yes" if claims - doubts == everywhere else "In part"
    first = times[0].before
    facts.append(f"on {first.device}, {first.dtype}")
    if claims - doubts < everywhere:
        facts.append("why not everywhere: see Latency" if claims > doubts else "why: see Latency")
    return answer, facts


def _row(report: PruningReport, key: str) -> ReportRow | None:
    return next((row for row in report.rows if row.key == key), None)
