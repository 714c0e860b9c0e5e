"""Every method under one harness: same model, same text, same budget, same scoring.

Run, offline, on the shipped model (about a quarter of an hour for the defaults on two CPU cores)::

    python recipes/compare.py --out runs/compare.json
    python recipes/compare.py --methods conditional flap --ratios 0.3 --out runs/quick.json
    python recipes/compare.py --model my-model --train books/a*.txt --test books/b*.txt

Text: by default the sources of Python's standard library, calibrated on training text, scored on
packages that the shipped model never saw; or your own files, one document each. A method is a
preset of `lit_prune`, perhaps with options, which makes an ablation a method of its own::

    --methods "flap:allocator=uniform,granularities=channel,compensation=least_squares"

What is reported: perplexity, and excess negative log-likelihood over the dense model with a 95 %
interval from a bootstrap over documents. Every cell is stored in ``--out`` when it is done, so that
an interrupted run goes on where it was; from the same file come the table, a CSV and a figure.
Methods that remove whole blocks reach few ratios: where one cannot reach a ratio its cell says what
is nearest.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from benchmark import quiet_down, surroundings
from corpus import pack, stdlib_documents
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_prune import PruningConfig, apply_plan
from lit_prune.calibration import RowSet, collect_rows
from lit_prune.errors import BudgetError, LitPruneError
from lit_prune.methods import PRESETS, preset
from lit_prune.metrics import footprint_of, perplexity_of
from lit_prune.planning import calibrate, make_plan

ROOT = Path(__file__).resolve().parents[1]
# Controls that must not go missing: channels only, uniform, with FLAP's score.
MLP_UNIFORM = "flap:allocator=uniform,granularities=channel"
CONTROLS = (MLP_UNIFORM, f"{MLP_UNIFORM},compensation=least_squares")
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Documents:
    """Scored text: windows of token ids, and which document each belongs to."""

    windows: list[torch.Tensor]
    owner: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


@dataclass(frozen=True)
class Cell:
    """One method at one ratio from one calibration set; ``nll`` and ``tokens`` by document."""

    achieved: float
    nll: list[float]
    tokens: list[int]
    decoder_parameters: int
    flops_per_token: float
    kv_cache_bytes_per_token: float
    calibrate_seconds: float
    plan_seconds: float


def documents_of(files: list[Path] | None, split: str) -> Dataset:
    """Return texts with their names: the given files, or a split of the standard library.

    A file is one document; a ``.jsonl`` file has one in the field ``text`` of each line.
    """
    if files is None:
        return stdlib_documents(split)
    found: dict[str, list[str]] = {"path": [], "text": []}
    for file in sorted(files):
        whole = file.read_text(encoding="utf-8")
        lines = whole.splitlines() if file.suffix == ".jsonl" else []
        texts = [json.loads(line)["text"] for line in lines] or [whole]
        found["text"] += texts
        found["path"] += [file.name] * len(texts)
    return Dataset.from_dict(found)


def scored_windows(text: Dataset, tokenizer: Any, context: int, most: int) -> Documents:
    """Cut each document into windows of its own, evenly spaced ones if there are too many."""
    windows, owner = [], []
    for number, document in enumerate(text["text"]):
        ids = torch.tensor(tokenizer.encode(document, add_special_tokens=False, verbose=False))
        for window in ids.split(context):
            if len(window) > context // 4:  # a short tail has little context
                windows.append(window)
                owner.append(number)
    step = max(1, -(-sum(len(w) for w in windows) // most))
    return Documents(windows[::step], owner[::step])


def score(model: PreTrainedModel, text: Documents) -> tuple[list[float], list[int]]:
    """Return summed NLL (nats) and scored tokens of each document."""
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
    return [r.mean_nll * r.num_tokens for r in results], [r.num_tokens for r in results]


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


class Harness:
    """Runs cells and remembers them in a JSON file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        dtype = getattr(torch, options.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        self.model.to(options.device)
        train = documents_of(options.train, "train")
        test = documents_of(options.test, options.split)
        self.train = pack(train, self.tokenizer, options.context).with_format("torch")
        self.text = scored_windows(test, self.tokenizer, options.context, options.score_tokens)
        self.conditions = {
            "model": str(options.model),
            "context": options.context,
            "calibration_rows": options.rows,
            "scored_tokens": self.text.num_tokens,
            "scored_documents": len(set(self.text.owner)),
            "test": [file.name for file in options.test] if options.test else options.split,
            "dtype": options.dtype,
            "search_tokens": options.search_tokens,
        }
        self.cells: dict[str, dict[str, Any]] = {}
        if options.out.exists():
            stored = json.loads(options.out.read_text())
            if stored["conditions"] != self.conditions:
                raise SystemExit(
                    f"{options.out} holds cells of other conditions:\n{stored['conditions']}\n"
                    f"asked for:\n{self.conditions}\nChoose another --out."
                )
            self.cells = stored["cells"]

    def store(self) -> None:
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "conditions": self.conditions,
            "surroundings": surroundings(),
            "cells": self.cells,
        }
        beside = self.options.out.with_suffix(".tmp")
        beside.write_text(json.dumps(whole) + "\n")
        beside.replace(self.options.out)

    def run(self) -> None:
        """Fill in every cell that is not there yet."""
        if "dense" not in self.cells:
            self.cells["dense"] = self.measure(self.model, 0.0, 0.0, 0.0)
        for seed in self.options.seeds:
            for method in self.options.methods:
                wanted = [
                    ratio
                    for ratio in self.options.ratios
                    if f"{method}|{ratio:g}|{seed}" not in self.cells
                ]
                calibration, seconds, judged = None, 0.0, {}
                for ratio in wanted:
                    name, extra = parse_method(method)
                    config = PruningConfig(
                        preset=name,
                        pruning_ratio=ratio,
                        **{"seed": seed, "search_tokens": self.options.search_tokens, **extra},
                    )
                    config = preset(name).resolve(config)
                    try:
                        if calibration is None:
                            started = time.perf_counter()
                            calibration = calibrate(self.model, self.rows(seed), config)
                            seconds = time.perf_counter() - started
                        pruned = copy.deepcopy(self.model)
                        started = time.perf_counter()
                        planned = make_plan(pruned, calibration, config, judged=judged)
                        apply_plan(pruned, planned.plan, planned.compensation)
                        spent = time.perf_counter() - started
                        achieved = planned.plan.provenance["achieved_ratio"]
                        cell = self.measure(pruned, achieved, seconds, spent)
                    except BudgetError as error:
                        cell = {"not_reached": str(error)}
                    except LitPruneError as error:
                        cell = {"error": f"{type(error).__name__}: {error}"}
                    self.cells[f"{method}|{ratio:g}|{seed}"] = cell
                    self.store()
                    print(f"{method} {ratio:g} seed {seed}: {self.words(cell)}", flush=True)

    def rows(self, seed: int) -> RowSet:
        chosen = self.train.shuffle(seed=seed).select(range(self.options.rows))
        rows, _ = collect_rows(self.model, DataLoader(chosen, batch_size=8), 2**40)
        return rows

    def measure(
        self, model: PreTrainedModel, achieved: float, calibrated: float, planned: float
    ) -> dict[str, Any]:
        nll, tokens = score(model, self.text)
        size = footprint_of(model, context_length=self.options.context)
        return asdict(
            Cell(
                achieved,
                nll,
                tokens,
                size.decoder_parameters,
                size.flops_per_token,
                size.kv_cache_bytes_per_token,
                round(calibrated, 2),
                round(planned, 2),
            )
        )

    def words(self, cell: dict[str, Any]) -> str:
        if "nll" not in cell:
            return next(iter(cell.values()))
        return f"perplexity {perplexity(cell):.2f}, removed {cell['achieved']:.2%}"


def mean_nll(cell: dict[str, Any]) -> float:
    return sum(cell["nll"]) / sum(cell["tokens"])


def perplexity(cell: dict[str, Any]) -> float:
    return float(np.exp(mean_nll(cell)))


def interval(cells: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the 95 % interval of the paired difference in NLL per token, over documents.

    The same documents are drawn for both; seeds are averaged (their spread is shown apart).
    """
    rng = np.random.default_rng(0)
    tokens = np.array(cells[0]["tokens"])
    one = np.mean([cell["nll"] for cell in cells], axis=0)
    other = np.mean([cell["nll"] for cell in others], axis=0)
    draws = rng.integers(len(tokens), size=(BOOTSTRAPS, len(tokens)))
    differences = (one - other)[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def table(harness: Harness) -> str:
    """Return perplexities (mean over seeds, spread if there are several) as Markdown."""
    options, cells = harness.options, harness.cells
    dense = cells["dense"]
    lines = [
        "| method | " + " | ".join(f"{ratio:.0%}" for ratio in options.ratios) + " |",
        "|---|" + "---:|" * len(options.ratios),
    ]
    for method in options.methods:
        row = []
        for ratio in options.ratios:
            found = [cells[f"{method}|{ratio:g}|{seed}"] for seed in options.seeds]
            if not all("nll" in cell for cell in found):
                row.append("–")
                continue
            values = [perplexity(cell) for cell in found]
            low, high = interval(found, [dense] * len(found))
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            row.append(f"{np.mean(values):.2f}{spread} (+{low:.3f} … {high:.3f})")
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    lines += ["", f"Dense: {perplexity(dense):.2f}. In brackets: excess nats per token, 95 %."]
    return "\n".join(lines)


def duels(harness: Harness) -> str:
    """Compare the first method with the best other one at each ratio, paired."""
    options, cells = harness.options, harness.cells
    first, *others = options.methods
    lines = []
    for ratio in options.ratios:
        found = {
            method: [cells[f"{method}|{ratio:g}|{seed}"] for seed in options.seeds]
            for method in (first, *others)
        }
        there = [m for m in others if all("nll" in cell for cell in found[m])]
        if not there or not all("nll" in cell for cell in found[first]):
            continue
        best = min(there, key=lambda m: float(np.mean([mean_nll(cell) for cell in found[m]])))
        low, high = interval(found[first], found[best])
        verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
        lines.append(
            f"- {ratio:.0%}: `{first}` against the best other, `{best}`: {verdict} "
            f"({low:+.4f} … {high:+.4f} nats per token)"
        )
    return "\n".join(lines)


def write_csv(harness: Harness, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [name for name in Cell.__dataclass_fields__ if name not in ("nll", "tokens")]
        writer.writerow(["method", "ratio", "seed", "mean_nll", "perplexity", *names])
        for key, cell in harness.cells.items():
            if "nll" in cell:
                method, ratio, seed = key.rsplit("|", 2) if "|" in key else (key, "0", "")
                numbers = [mean_nll(cell), perplexity(cell), *(cell[name] for name in names)]
                writer.writerow([method, ratio, seed, *numbers])


def figure(harness: Harness, path: Path) -> None:
    """Draw excess NLL against the ratio that was really removed."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    options, cells = harness.options, harness.cells
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    dense = mean_nll(cells["dense"])
    for number, method in enumerate(options.methods):
        points = [
            (cell["achieved"], mean_nll(cell) - dense)
            for ratio in options.ratios
            for seed in options.seeds
            if "nll" in (cell := cells[f"{method}|{ratio:g}|{seed}"])
        ]
        if points:
            style = "-" if number < 10 else "--" if number < 20 else ":"
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, style, marker="o", markersize=3, label=method)
    axes.set(xlabel="decoder parameters removed", ylabel="excess NLL (nats per token)")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def parse_arguments(words: str, methods: list[str], split: str, out: str) -> argparse.Namespace:
    """Read the command line; `ablation.py` has the same with other defaults."""
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("--model", default=ROOT / "checkpoints" / "python-4.8m")
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="calibration sets")
    parser.add_argument("--train", type=Path, nargs="+", help="text files to calibrate on")
    parser.add_argument(
        "--test", type=Path, nargs="+", help="text files to score, one document each"
    )
    parser.add_argument(
        "--split", default=split, choices=["choose", "score"], help="without --test"
    )
    parser.add_argument("--rows", type=int, default=128, help="windows of calibration text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--score-tokens", type=int, default=60_000, help="at most")
    parser.add_argument(
        "--search-tokens", type=int, default=8192, help="to judge drafts and measure sensitivities"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / out)
    return parser.parse_args()


def main(words: str, methods: list[str], split: str, out: str) -> None:
    """Fill in all cells, then show them."""
    quiet_down()
    harness = Harness(parse_arguments(words, methods, split, out))
    harness.run()
    harness.store()
    print("\n" + table(harness) + "\n\n" + duels(harness))
    write_csv(harness, harness.options.out.with_suffix(".csv"))
    figure(harness, harness.options.out.with_suffix(".png"))


if __name__ == "__main__":
    main(__doc__.splitlines()[0], [*PRESETS, *CONTROLS], "score", "compare.json")
