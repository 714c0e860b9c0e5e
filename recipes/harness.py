"""Runs the cells of a comparison: prune, score, measure; one after the other, each stored."""

from __future__ import annotations

import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from benchmark import surroundings
from cells import DENSE, Cell, Found
from process_memory import Rise
from rivals import MASKED, RIVALS
from texts import Scored, read_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from zero_shot import accuracies

from lit_prune import PruningConfig, apply_plan
from lit_prune.allocation import make_budget
from lit_prune.allocation.exact import ReachableTotals
from lit_prune.config import RATIO_TOLERANCE
from lit_prune.decoder import all_kept, spec_for
from lit_prune.errors import BudgetError, LitPruneError
from lit_prune.measuring import calibrate, needed_bypasses
from lit_prune.methods import preset
from lit_prune.metrics import footprint_of, measure_latency, perplexity_of
from lit_prune.planning import compensated, make_plan
from lit_prune.surgery import weights_digest

if TYPE_CHECKING:
    import argparse

    from lit_prune.calibration import Calibration, RowSet

PROMPT_TOKENS, NEW_TOKENS, TURNS, REPETITIONS = 128, 16, 3, 3
# Options that change what is measured, beside what is needed.
MEASURED_BY = (
    *("transfer_target", "estimator", "damping", "search_tokens", "replay_batch_tokens"),
    *("budget", "latency_prompt_tokens", "latency_new_tokens", "latency_batch_size"),
)
LATENCY = {"prefill_seconds": "prefill_spread", "decode_seconds_per_token": "decode_spread"}


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``preset:option=value,option=value``; several values of one option are joined by +."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        values = [_json_or_text(part) for part in value.split("+")]
        options[key] = values if key in ("granularities", "protected_layers") else values[0]
    return name, options


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def score(model: PreTrainedModel, text: Scored) -> tuple[list[float], list[int]]:
    """Return summed NLL (nats, to four decimals) and scored tokens of each document or stretch."""
    documents: dict[int, dict[int, list[torch.Tensor]]] = {}
    for owner, window in zip(text.owner, text.windows, strict=True):
        documents.setdefault(owner, {}).setdefault(len(window), []).append(window)
    device = next(model.parameters()).device
    results = []
    for by_length in documents.values():
        batches = [
            {"input_ids": torch.stack(windows[start : start + 8]).to(device)}
            for windows in by_length.values()
            for start in range(0, len(windows), 8)
        ]
        results.append(perplexity_of(model, batches))
    return [round(r.mean_nll * r.num_tokens, 4) for r in results], [r.num_tokens for r in results]


@dataclass(frozen=True)
class Statistics:
    """A calibration, and what it cost in seconds and bytes."""

    calibration: Calibration
    seconds: float
    peak: int | None


class Harness:
    """Runs cells and remembers them in a JSON file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        self.kept: dict[tuple[object, ...], Statistics] = {}
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        dtype = getattr(torch, options.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        self.model.to(options.device).eval()
        self.texts = read_texts(options, self.tokenizer)
        conditions = {
            "model": Path(options.model).name,  # where it lies is no condition
            "weights": weights_digest(self.model),
            "context": options.context,
            "calibration_rows": options.rows,
            **self.texts.describe(),
            "dtype": options.dtype,
            "device": options.device,
            "clock": "CPU time" if options.cpu_time else "wall clock",
            "search_tokens": options.search_tokens,
        }
        if options.tasks:
            conditions["tasks"] = [*options.tasks]
            conditions["questions_of_each"] = options.limit or "all"
        asked = {name: getattr(options, name) for name in ("methods", "ratios", "seeds")}
        self.found = Found(conditions, asked)
        self.found.surroundings = surroundings()
        before = [options.out] if options.out.exists() else []
        for path in (*before, *options.also):
            self.found.take(path)
        for method in options.methods:
            for ratio in options.ratios:
                if (reached := self.reachable(method, ratio)) != ratio:
                    self.found.moved[f"{method}|{ratio:g}"] = reached

    def config(self, method: str, ratio: float, seed: int) -> PruningConfig:
        name, extra = parse_method(method)
        common = {"seed": seed, "search_tokens": self.options.search_tokens}
        config = PruningConfig(preset=name, pruning_ratio=ratio, **{**common, **extra})
        return preset(name).resolve(config)

    def reachable(self, method: str, ratio: float) -> float:
        """Return the ratio to run a depth-only method at; others reach what they are asked for."""
        if method in RIVALS:
            return ratio
        config = self.config(method, ratio, 0)
        if {"kv_group", "channel"} & set(config.granularities):
            return ratio
        spec = spec_for(self.model)
        protected = {*config.protected_layers}
        if config.preset == "sleb":  # by its own rule
            protected |= {0, len(spec.blocks) - 1}
        config = replace(config, pruning_ratio=0.0, protected_layers=tuple(sorted(protected)))
        budget = make_budget(spec, config)
        totals, whole = ReachableTotals(budget), spec.decoder_parameters
        near = [
            budget.removed(totals.counts(total, all_kept(spec))) / whole
            for total in totals.nearest(ratio * whole)
            if total is not None
        ]
        nearest = min(near, key=lambda reached: abs(reached - ratio), default=ratio)
        return ratio if abs(nearest - ratio) <= RATIO_TOLERANCE else round(nearest, 4)

    def ratios_of(self, method: str) -> list[float]:
        """Return where a method is run; the first also at all ratios that others had to move to."""
        found = self.found
        ratios = [found.run_at(method, ratio) for ratio in self.options.ratios]
        if method == found.first:
            ratios += [r for ratio in self.options.ratios for r in found.moved_ratios(ratio)]
        if method in MASKED:
            ratios = [ratio for ratio in ratios if ratio == MASKED[method]]
        return list(dict.fromkeys(ratios))

    def run(self) -> None:
        """Fill in every cell that is not there yet."""
        if DENSE not in self.found.cells:
            self.found.cells[DENSE] = self.measure(self.model, achieved=0.0)
            self.found.store(self.options.out)
        for seed in self.options.seeds:
            for method in self.options.methods:
                wanted = {
                    key: ratio
                    for ratio in self.ratios_of(method)
                    if (key := f"{method}|{ratio:g}|{seed}") not in self.found.cells
                }
                if not wanted:
                    continue
                work = (Rival if method in RIVALS else Preset)(self, method, seed)
                for key, ratio in wanted.items():
                    try:
                        cell = self.measure(**work.pruned(ratio))
                    except BudgetError as error:
                        cell = {"not_reached": str(error)}
                    except LitPruneError as error:
                        cell = {"error": f"{type(error).__name__}: {error}"}
                    self.found.cells[key] = cell
                    self.found.store(self.options.out)
                    print(f"{method} {ratio:g} seed {seed}: {_words(cell)}", flush=True)

    def rows(self, seed: int) -> RowSet:
        return self.texts.rows(seed, self.options.rows)

    def calibrated(self, config: PruningConfig) -> Statistics:
        """Measure what a (resolved) request needs; the last two kinds of statistics are kept.

        Methods that need the same share it, and each is told the seconds that it took.
        """
        needs = preset(config.preset).all_needs(config)
        bypasses = frozenset(needed_bypasses(self.model, config))
        key = (config.seed, needs, bypasses, *(getattr(config, name, None) for name in MEASURED_BY))
        found = self.kept.pop(key, None)
        if found is None:
            rows = self.rows(config.seed)
            while len(self.kept) > 1:
                del self.kept[next(iter(self.kept))]
            rise, started = Rise(self.model.device), self.clock()
            calibration = calibrate(self.model, rows, config, progress=False)
            found = Statistics(calibration, self.clock() - started, rise.stop())
        self.kept[key] = found
        return found

    def measure(self, model: PreTrainedModel, **facts: Any) -> dict[str, Any]:
        """Score a model and measure what it costs; ``facts`` are what is known of its pruning."""
        nll, tokens = score(model, self.texts.main)
        other = score(model, self.texts.other) if self.texts.other else ([], [])
        context, tasks = self.options.context, self.options.tasks
        size = footprint_of(model, context_length=context, peak_ids=self.texts.window)
        dense, latency = self.latencies(self.model, model)
        return asdict(
            Cell(
                nll=nll,
                tokens=tokens,
                other_nll=other[0],
                other_tokens=other[1],
                decoder_parameters=size.decoder_parameters,
                flops_per_token=size.flops_per_token,
                kv_cache_bytes_per_token=size.kv_cache_bytes_per_token,
                peak_forward_bytes=size.peak_forward_bytes,
                **latency,
                dense_latency=dense,
                accuracy=self.accuracies(model) if tasks else {},
                **facts,
            )
        )

    def accuracies(self, model: PreTrainedModel) -> dict[str, float]:
        options = self.options
        return accuracies(
            model, self.tokenizer, options.tasks, limit=options.limit, folder=options.task_folder
        )

    def latencies(self, *models: PreTrainedModel) -> list[dict[str, float]]:
        """Measure models in turns, so that a machine that gets slower slows all of them.

        Returns:
            For each model the medians over turns; a spread is the range over turns, or the largest
            interquartile range within one if that is more.
        """
        prompt = min(PROMPT_TOKENS, self.options.context // 2)
        turns = [
            [
                measure_latency(
                    model,
                    self.texts.window[:, :prompt],
                    new_tokens=min(NEW_TOKENS, self.options.context - prompt),
                    warmup=1,
                    repetitions=REPETITIONS,
                    clock=self.clock,
                )
                for model in models
            ]
            for _ in range(TURNS)
        ]
        found = []
        for of_one in zip(*turns, strict=True):
            numbers: dict[str, float] = {}
            for seconds, spread in LATENCY.items():
                values = [getattr(turn, seconds) for turn in of_one]
                within = max(getattr(turn, spread) for turn in of_one)
                numbers[seconds] = statistics.median(values)
                numbers[spread] = max(max(values) - min(values), within)
            found.append(numbers)
        return found


class Preset:
    """One preset at several ratios: drafts that were judged once stay judged."""

    def __init__(self, harness: Harness, method: str, seed: int) -> None:
        self.harness, self.method, self.seed = harness, method, seed
        self.judged: dict[Any, float] = {}

    def pruned(self, ratio: float) -> dict[str, Any]:
        """Return the pruned model, and what its pruning cost, as keywords of `Harness.measure`."""
        harness = self.harness
        config = harness.config(self.method, ratio, self.seed)
        measured = harness.calibrated(config)
        pruned = copy.deepcopy(harness.model)
        rise, started = Rise(pruned.device), harness.clock()
        planned = make_plan(pruned, measured.calibration, config, judged=self.judged)
        planned = compensated(pruned, planned, measured.calibration, config)
        apply_plan(pruned, planned.plan, planned.compensation)
        seconds, peak = harness.clock() - started, rise.stop()
        peaks = [bytes_ for bytes_ in (measured.peak, peak) if bytes_ is not None]
        return {
            "model": pruned,
            "achieved": planned.plan.provenance["achieved_ratio"],
            "calibrate_seconds": round(measured.seconds, 2),
            "plan_seconds": round(seconds, 2),
            "prune_peak_bytes": max(peaks, default=None),
        }


class Rival:
    """One rival that is no preset: every ratio from the start."""

    def __init__(self, harness: Harness, method: str, seed: int) -> None:
        self.harness, self.method, self.seed = harness, method, seed

    def pruned(self, ratio: float) -> dict[str, Any]:
        """Return what `Preset.pruned` does."""
        model, rows = self.harness.model, self.harness.rows(self.seed)
        rise, started = Rise(model.device), self.harness.clock()
        pruned, facts = RIVALS[self.method](model, rows, ratio)
        seconds, peak = self.harness.clock() - started, rise.stop()
        return {
            "model": pruned,
            "plan_seconds": round(seconds, 2),
            "prune_peak_bytes": peak,
            **facts,
        }


def _words(cell: dict[str, Any]) -> str:
    if "nll" not in cell:
        return next(iter(cell.values()))
    mean = sum(cell["nll"]) / sum(cell["tokens"])
    return f"{mean:.4f} nats per token, removed {cell['achieved']:.2%}"
