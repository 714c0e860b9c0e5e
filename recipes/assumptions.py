"""What the methods assume: Gaussian activations, predictable damage, enough calibration text.

Run, offline, on the shipped model (about a quarter of an hour on one idle CPU core)::

    OMP_NUM_THREADS=1 python recipes/assumptions.py --out runs/assumptions.json
    python recipes/assumptions.py --model my-model --train books/a*.txt --test books/b*.txt
    python recipes/assumptions.py --quick            # tiny: proves that it runs

1. *Gaussian?* Excess kurtosis of what every unit feeds into its output projection (0 if Gaussian),
   and whether the Gaussian entropy ranks units as estimates do that assume no distribution: a
   histogram, and spacings of order statistics (Vasicek).
2. *Does a sensitivity predict damage?* Every sub-block is replaced by its mean: what the model
   loses on held-out text, against what each sensitivity said on calibration text. And of whole
   plans (at random, near the chosen one, chosen at several ratios): predicted damage against
   measured loss.
3. *How much text, and which?* Perplexity at 30 % against the number of calibration rows, from text
   like the model's own and from another source.

Held-out text is the *choose* packages, or ``--test``; nothing here reads the score split. Answers
go to ``--out`` as JSON when they are found (an interrupted run goes on where it was), a summary in
Markdown to the screen, a figure beside the JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from assumptions_shown import figure, spearman, summary
from benchmark import quiet_down, surroundings
from corpus import fine_tuning_documents, pack
from harness import score
from scipy.stats import differential_entropy, kurtosis
from texts import Scored, Texts, read_files, read_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_prune import PruningConfig, apply_plan
from lit_prune.allocation import Ranking, settled
from lit_prune.calibration import (
    SENSITIVITIES,
    Row,
    RowSet,
    Unit,
    measure_sensitivities,
    replay,
)
from lit_prune.decoder import DecoderParts, quiet, spec_for
from lit_prune.errors import BudgetError
from lit_prune.importance import channel_entropy
from lit_prune.measuring import calibrate
from lit_prune.methods import plan_of
from lit_prune.planning import compensated, make_plan
from lit_prune.surgery import least_squares_compensation

if TYPE_CHECKING:
    from collections.abc import Callable

    from lit_prune.allocation import Budget
    from lit_prune.decoder import SubBlock
    from lit_prune.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[1]
# Preset -> compensation.
METHODS = {"conditional": "sequential", "paper": "mean"}
# Where many calibrations are compared, each measures its sensitivities on so many tokens.
SEARCH_TOKENS = 4096
BINS = 64
RATIO = 0.3
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    entropy_rows: int = 32  # of the calibration text
    plans: int = 40
    counts: tuple[int, ...] = (8, 32, 128)
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Size(entropy_rows=4, plans=4, counts=(8, 12), seeds=(0, 1))


# ---- 1. is it Gaussian? ----


def histogram_entropy(x: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return the entropy of each column of ``x [samples, channels]`` from equal bins, nats."""
    found = []
    for column in x.T:
        counts, edges = np.histogram(column, bins)
        p = counts[counts > 0] / counts.sum()
        found.append(-(p * np.log(p / (edges[1] - edges[0]))).sum())
    return np.array(found)


@torch.no_grad()
def activations(model: PreTrainedModel, rows: RowSet) -> dict[SubBlock, np.ndarray]:
    """Return what enters each output projection, ``[tokens, width]``."""
    parts = DecoderParts(model)
    found: dict[SubBlock, list[np.ndarray]] = {}

    def keep(place: SubBlock, _module: Any, args: tuple[torch.Tensor]) -> None:
        found.setdefault(place, []).append(args[0].flatten(0, 1).float().cpu().numpy())

    places = [(index, part.kind) for index, part in spec_for(model).sub_blocks]
    handles = [parts.output(*p).module.register_forward_pre_hook(partial(keep, p)) for p in places]
    try:
        with quiet(model):
            for row in rows.rows:
                model(input_ids=row.ids[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {place: np.concatenate(batches) for place, batches in found.items()}


def gaussian(model: PreTrainedModel, rows: RowSet) -> list[dict[str, Any]]:
    """Return kurtosis and rank correlations of each sub-block, over its channels."""
    results = []
    for (layer, kind), raw in activations(model, rows).items():
        x = raw[:, raw.std(0) > 1e-9].astype(np.float64)  # a dead channel has no shape
        entropy = channel_entropy(torch.from_numpy(x.var(0))).numpy()
        free = {
            "histogram": histogram_entropy(x),
            "vasicek": differential_entropy(x, method="vasicek", axis=0),
        }
        results.append(
            {
                "layer": layer,
                "kind": kind,
                "tokens": len(x),
                "excess_kurtosis": np.percentile(kurtosis(x, axis=0), [25, 50, 75]).tolist(),
                "entropy_overstated_by": float(np.median(entropy - free["vasicek"])),
                **{name: spearman(entropy, h) for name, h in free.items()},
            }
        )
    return results


# ---- 2. does it predict damage? ----


def mean_nll(model: PreTrainedModel, text: Scored) -> float:
    nll, tokens = score(model, text)
    return sum(nll) / sum(tokens)


def counts_of(plan: PruningPlan) -> dict[SubBlock, int]:
    counts: dict[SubBlock, int] = {}
    for layer in plan.layers:
        counts[layer.index, "attention"] = len(layer.kv_groups)
        counts[layer.index, "mlp"] = len(layer.channels)
    return counts


def predicted(
    curves: dict[SubBlock, torch.Tensor],
    worth: dict[str, dict[SubBlock, float]],
    counts: dict[SubBlock, int],
) -> dict[str, float]:
    """Return the damage of a plan under each sensitivity, and without any."""
    totals = dict.fromkeys((*worth, "none"), 0.0)
    for place, curve in curves.items():
        lost, whole = float(curve[len(curve) - 1 - counts[place], 1]), float(curve[-1, 1])
        for name, of_place in worth.items():
            totals[name] += max(of_place[place], 0.0) * lost / max(whole, 1e-300)
        totals["none"] += lost
    return totals


def drafts(
    budget: Budget, chosen: dict[SubBlock, int], number: int
) -> list[tuple[str, dict[SubBlock, int]]]:
    """Draw counts that meet the budget: every second near the chosen ones, the others anywhere."""
    rng, whole = np.random.default_rng(0), {p: max(a) for p, a in budget.allowed.items()}
    found: list[tuple[str, dict[SubBlock, int]]] = []
    for _ in range(50 * number):
        near, counts = len(found) % 2 == 0, {}
        for place, units in whole.items():
            start, shift = (chosen[place] / units, 0.15) if near else (1 - RATIO, 0.7)
            wanted = units * (start + rng.uniform(-shift, shift))
            counts[place] = min(budget.allowed[place], key=lambda c, w=wanted: abs(c - w))
        # where units are then added or given back is drawn, too
        tilt = {place: np.full(units, rng.random()) for place, units in whole.items()}
        try:
            counts = settled(budget, counts, Ranking(tilt, dict.fromkeys(whole, 1)))
        except BudgetError:
            continue
        if any(count for (_, kind), count in counts.items() if kind == "attention"):
            found.append(("near the chosen" if near else "random", counts))
        if len(found) == number:
            break
    return found


def damage(model: PreTrainedModel, rows: RowSet, text: Scored, plans: int) -> dict[str, Any]:
    """Measure what sub-blocks and plans cost on held-out text, beside what was predicted."""
    config = PruningConfig(pruning_ratio=RATIO, compensation="least_squares")
    calibration = calibrate(model, rows, config, progress=False)
    bypassed = replay(model, rows, [Unit(*place) for place in calibration.units])
    calibration = replace(calibration, full=bypassed.full, bypassed=bypassed.bypassed)
    chosen = make_plan(model, calibration, config)
    worth = {"transfer_entropy": {p: chosen.scores.transfer[Unit(*p)] for p in calibration.units}}
    for column, name in enumerate(SENSITIVITIES):
        measured = calibration.sensitivities or {}
        worth[name] = {place: float(values[column]) for place, values in measured.items()}
    held_out = replace(RowSet.of(map(Row.of, text.windows)), split=False)  # all of it
    means = {place: mean for place, (mean, _) in calibration.units.items()}
    true = measure_sensitivities(model, held_out, means, max_tokens=2**40)
    sub_blocks = [
        {
            "layer": place[0],
            "kind": place[1],
            "measured": float(values[SENSITIVITIES.index("nll")]),
            "predicted": {name: of_place[place] for name, of_place in worth.items()},
        }
        for place, values in true.items()
    ]
    planned = [
        (f"chosen at {r:.0%}", make_plan(model, calibration, replace(config, pruning_ratio=r)).plan)
        for r in RATIOS
    ]
    curves = calibration.curves or {}
    for group, counts in drafts(chosen.budget, counts_of(chosen.plan), plans):
        kept = {}
        for place, curve in curves.items():
            order = curve[1:, 0].long().tolist()  # as they leave
            kept[place] = tuple(sorted(order[len(order) - counts[place] :]))
        planned.append((group, plan_of(spec_for(model), kept)))
    dense, found = mean_nll(model, text), []
    for group, plan in planned:
        pruned = copy.deepcopy(model)
        covariances, beside = calibration.covariances or {}, calibration.held_out
        compensation = least_squares_compensation(
            model, plan, calibration.units, covariances, beside
        )
        apply_plan(pruned, plan, compensation)
        loss = mean_nll(pruned, text) - dense
        totals = predicted(curves, worth, counts_of(plan))
        found.append({"group": group, "measured": loss, "predicted": totals})
    return {"dense_mean_nll": dense, "sub_blocks": sub_blocks, "plans": found}


# ---- 3. how much text, and which? ----


def pruned_perplexity(
    model: PreTrainedModel, method: str, rows: RowSet, text: Scored, seed: int
) -> float:
    config = PruningConfig(
        preset=method,
        pruning_ratio=RATIO,
        compensation=METHODS[method],
        seed=seed,
        search_tokens=SEARCH_TOKENS,
    )
    calibration = calibrate(model, rows, config, progress=False)
    pruned = copy.deepcopy(model)
    planned = compensated(pruned, make_plan(pruned, calibration, config), calibration, config)
    apply_plan(pruned, planned.plan, planned.compensation)
    return float(np.exp(mean_nll(pruned, text)))


def calibration_text(
    model: PreTrainedModel, sources: dict[str, Texts], size: Size, found: Answers
) -> None:
    """Store perplexity on held-out text by method, source, number of rows and seed."""
    # the cheap ones first: what an interrupted run has is whole for some counts
    for number, seed, (source, texts), method in product(
        size.counts, size.seeds, sources.items(), METHODS
    ):
        name = f"{method}|{source}|{number}|{seed}"
        rows = texts.rows(seed, number)
        found.ask(name, partial(pruned_perplexity, model, method, rows, texts.main, seed))


# ---- asking ----


class Answers:
    """What was found so far, as a file."""

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path, self.found = path, {"conditions": json.loads(json.dumps(conditions))}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["conditions"] != self.found["conditions"]:
                raise SystemExit(f"{path} holds answers under other conditions: choose another.")
            self.found = stored
        self.found["surroundings"] = surroundings()

    def ask(self, name: str, question: Callable[[], Any]) -> None:
        """Answer a question that has no answer yet, and store it."""
        if name in self.found:
            return
        self.found[name] = question()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.found) + "\n")
        beside.replace(self.path)
        print(f"{name}: done", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "checkpoints" / "python-4.8m")
    parser.add_argument("--train", type=Path, nargs="+", help="text files to calibrate on")
    parser.add_argument("--test", type=Path, nargs="+", help="text files held out")
    parser.add_argument("--source", type=Path, nargs="+", help="other text files to calibrate on")
    parser.add_argument("--text-of", type=Path, help="folder of train_benchmark.py: its own text")
    parser.add_argument("--rows", type=int, default=128, help="windows of calibration text")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--score-tokens", type=int, default=10_000, help="held out, at most")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "assumptions.json")
    parser.set_defaults(split="choose", other=None, other_tokens=0)
    return parser.parse_args()


def main() -> None:
    """Ask all three questions, then show the answers."""
    quiet_down()
    options = parse_arguments()
    size = QUICK if options.quick else Size()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    texts = read_texts(options, tokenizer)
    other = read_files(options.source) if options.source else fine_tuning_documents("train")
    blocks = torch.tensor(pack(other, tokenizer, options.context)["input_ids"][:])
    sources = {"own text": texts, "another source": replace(texts, blocks=blocks)}
    conditions = {
        "model": str(options.model),
        "calibration_rows": options.rows,
        "context": options.context,
        **texts.describe(),
        "size": asdict(size),
    }
    found = Answers(options.out, conditions)
    found.ask("gaussian", partial(gaussian, model, texts.rows(0, size.entropy_rows)))
    rows = texts.rows(0, options.rows)
    found.ask("damage", partial(damage, model, rows, texts.main, size.plans))
    calibration_text(model, sources, size, found)
    print(summary(found.found))
    figure(found.found, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
