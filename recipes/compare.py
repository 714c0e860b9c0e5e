"""Every method under one harness: same model, same text, same budget, same scoring.

Run, offline, on the shipped model (two to three hours for the defaults on one CPU core)::

    OMP_NUM_THREADS=1 python recipes/compare.py --out runs/compare.json
    python recipes/compare.py --methods conditional flap --ratios 0.3 --out runs/quick.json
    python recipes/compare.py --model my-model --train books/a*.txt --test books/b*.txt
    python recipes/compare.py --model runs/novels-deep --text-of runs/novels-deep
    python recipes/compare.py --table-only --out runs/compare.json
    python recipes/compare.py --also runs/one.json runs/other.json --out runs/compare.json

Text: by default the sources of Python's standard library, calibrated on training text, scored on
packages that the shipped model never saw and, as other text, on Python's help topics; or your own
files, one document each; or what a model of `train_benchmark.py` was trained on and what it was
not. A method is one of ``rivals/`` or a preset of `lit_prune`, perhaps with options, which makes an
ablation a method of its own::

    --methods "flap:allocator=uniform,granularities=channel,compensation=least_squares"

What is reported: perplexity on both texts; whether a method differs from the first one named, by a
95 % interval of the paired difference in negative log-likelihood from a bootstrap over documents;
parameters, FLOPs, KV-cache bytes, latency beside the dense model's, memory of a forward; seconds of
pruning, and how far the memory of this process rose meanwhile. Every cell is stored in ``--out``
when it is done, so that an interrupted run goes on where it was; from the same file come the
tables, a CSV and a figure. Several processes share the work by ``--methods`` or ``--ratios``, each
with an ``--out`` of its own, and a last run takes their cells over by ``--also``.

Methods that remove whole blocks reach few ratios: one that cannot reach a ratio within half a
percentage point is run at the nearest that it reaches (``@19.6%`` in the table), and the first
method once more at exactly that ratio, for a fair pair.

The published protocol, where there is a network (not run offline; see `published.py` and
`zero_shot.py` for what was tried)::

    python recipes/compare.py --model meta-llama/Llama-2-7b-hf --dtype bfloat16 --device cuda
        --data wikitext2 --other-data c4 --tasks --out runs/llama2-7b.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmark import CPU_TIME, quiet_down
from cells import Found
from harness import Harness
from published import SOURCES
from rivals import RIVALS
from tables import (
    CONTROLS,
    MLP_UNIFORM,
    accuracy_table,
    caption,
    costs,
    duels,
    figure,
    summary,
    table,
    write_csv,
)
from zero_shot import TASKS

from lit_prune.methods import PRESETS

ROOT = Path(__file__).resolve().parents[1]
OURS = ("conditional", "conditional:allocator=uniform_widths")
METHODS = list(dict.fromkeys((*OURS, *PRESETS, *RIVALS, *CONTROLS)))

__all__ = ["MLP_UNIFORM", "Harness", "main", "parse_arguments"]


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
    parser.add_argument("--other", type=Path, nargs="+", help="text files of another kind to score")
    parser.add_argument("--text-of", type=Path, help="folder of train_benchmark.py: its own text")
    parser.add_argument(
        "--split", default=split, choices=["choose", "score"], help="without --test"
    )
    parser.add_argument("--data", choices=sorted(SOURCES), help="the published protocol's text")
    parser.add_argument("--other-data", choices=sorted(SOURCES), help="with --data: score this too")
    parser.add_argument(
        "--data-files", nargs="+", default=[], help="train=FILE test=FILE in place of the Hub's"
    )
    parser.add_argument("--tasks", nargs="*", help="zero-shot by lm-eval; by default the papers'")
    parser.add_argument("--task-folder", type=Path, help="YAML of tasks of your own")
    parser.add_argument("--limit", type=int, help="questions of each task, for trying out")
    parser.add_argument("--rows", type=int, default=128, help="windows of calibration text")
    parser.add_argument("--context", type=int, help="tokens; 512, with --data 2048")
    parser.add_argument("--score-tokens", type=int, help="at most; 60,000, with --data no limit")
    parser.add_argument("--other-tokens", type=int, default=20_000, help="at most; 0: no other")
    parser.add_argument(
        "--search-tokens", type=int, default=8192, help="to judge drafts and measure sensitivities"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(CPU_TIME, action="store_true", help="latency on busy machines, one thread")
    parser.add_argument("--table-only", action="store_true", help="show --out, run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / out)
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], help="take over the cells of these other --out"
    )
    options = parser.parse_args()
    if options.also and options.table_only:
        parser.error("--table-only shows --out as it is: leave it out to take over cells by --also")
    options.context = options.context or (2048 if options.data else 512)
    options.score_tokens = options.score_tokens or (10**12 if options.data else 60_000)
    options.tasks = TASKS if options.tasks == [] else options.tasks
    return options


def show(found: Found, out: Path) -> None:
    """Print tables, write CSV and figure."""
    for text in ("", "other_") if found.dense["other_nll"] else ("",):
        print("\n" + table(found, text) + "\n\n" + caption(found, text))
    if "tasks" in found.conditions:
        print("\n" + accuracy_table(found))
    print("\n" + costs(found) + "\n\n" + duels(found))
    write_csv(found, out.with_suffix(".csv"))
    figure(found, out.with_suffix(".png"))


def main(words: str, methods: list[str], split: str, out: str) -> None:
    """Fill in all cells, then show them."""
    quiet_down()
    options = parse_arguments(words, methods, split, out)
    if options.table_only:
        show(Found.read(options.out), options.out)
        return
    harness = Harness(options)
    harness.run()
    harness.found.store(options.out, summary(harness.found))
    show(harness.found, options.out)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], METHODS, "score", "compare.json")
