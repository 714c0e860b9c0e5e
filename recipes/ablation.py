"""Which part earns the gain: every part of ``conditional`` exchanged, one at a time and together.

Run, offline, on the shipped model::

    python recipes/ablation.py --out runs/ablation.json
    python recipes/ablation.py --ratios 0.3 --seeds 0 1 2 --out runs/ablation3.json
    python recipes/ablation.py --factorial --ratios 0.3 --out runs/factorial.json

Options as in `compare.py`, but scored on the *choose* packages, not on the test text: defaults are
chosen here, and what is reported elsewhere must not have been looked at. The parts of
``conditional``:

- what weighs the curves (``sensitivity``), against equal weights;
- in which order units leave (``unit_score``): conditional entropy, the paper's entropy, FLAP's
  fluctuation, or at random, all under the same allocation;
- what compensates (``compensation``);
- how the budget is distributed: over everything, without depth, equal widths, MLPs only.

And what the authors of ``paper`` compare in their rebuttal: depth-first search or greedy; K-means
or a threshold at the mean; entropy or the magnitude of activations or gradients; transfer entropy
or the Frobenius norm of the change; all structures or rows and columns only; ratios by transfer
entropy or the same for all; with a bias or without. How each was done exactly is not published.

``--factorial`` crosses score, compensation, allocation and sensitivity of ``conditional`` (80
methods) and shows, for each level of each part, the mean over everything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from compare import MLP_UNIFORM, main, parse_arguments

CHANNELS_ALIKE = "allocator=uniform_widths,granularities=channel"
CONDITIONAL = [
    "conditional",
    *(f"conditional:sensitivity={name}" for name in ("nll", "frobenius", "transfer_entropy")),
    "conditional:sensitivity=none",
    *(f"conditional:unit_score={name}" for name in ("entropy", "fluctuation", "random")),
    *(f"conditional:compensation={name}" for name in ("least_squares", "mean", "none")),
    "conditional:verify_rounds=3",
    "conditional:unit_score=entropy,compensation=mean",
    "conditional:unit_score=random,compensation=mean",
    "conditional:sensitivity=none,compensation=mean",
    "conditional:granularities=kv_group+channel",
    "conditional:granularities=channel",
    "conditional:allocator=uniform_widths",
    f"conditional:{CHANNELS_ALIKE}",
    MLP_UNIFORM,
    f"{MLP_UNIFORM},compensation=least_squares",
    # the same fit behind other choices of units: what is left is what choosing them brings
    f"{MLP_UNIFORM},compensation=sequential",
    *(f"{name}:compensation=sequential" for name in ("random", "flap", "osscar", "slimgpt")),
]
PAPER = [
    "paper",
    "paper:allocator=greedy",
    "paper:clustering=mean_threshold",
    "paper:clustering=mean_threshold,cap_clusters=false",
    "paper:cap_clusters=false",
    "paper:unit_score=activation",
    "paper:unit_score=gradient",
    "paper:sensitivity=frobenius",
    "paper:granularities=kv_group+channel",
    "paper:granularities=channel",
    "paper:ratio_map=rank,ratio_strength=0",  # the same ratio for every block, then as always
    "paper:allocator=uniform",
    "paper:compensation=none",
    "paper:compensation=least_squares",
]
# Level -> options. MLPs alone, all alike, leave nothing to weigh: no sensitivity.
FACTORS: dict[str, dict[str, str]] = {
    "score": {
        name: f"unit_score={name}" for name in ("conditional", "entropy", "fluctuation", "random")
    },
    "compensation": {
        name: f"compensation={name}" for name in ("sequential", "least_squares", "mean", "none")
    },
    "allocation": {
        "joint": "allocator=joint",
        "uniform widths": "allocator=uniform_widths",
        "MLP only, uniform": CHANNELS_ALIKE,
    },
    "sensitivity": {name: f"sensitivity={name}" for name in ("kl", "none")},
}


def factorial() -> dict[str, dict[str, str]]:
    """Return every combination: as a method, and its level of each factor."""
    methods = {}
    for levels in product(*FACTORS.values()):
        chosen = dict(zip(FACTORS, levels, strict=True))
        if chosen["allocation"].startswith("MLP"):
            del chosen["sensitivity"]
        options = ",".join(FACTORS[factor][level] for factor, level in chosen.items())
        methods[f"conditional:{options}"] = chosen
    return methods


def effects(cells: dict[str, Any], ratio: float, seeds: list[int]) -> str:
    """Return, as Markdown, the mean excess NLL of each level over the levels of the other factors.

    The effect of a sensitivity is over the allocations that have one.
    """
    dense = _mean_nll(cells["dense"])
    excess = {}
    for method in factorial():
        found = [cells.get(f"{method}|{ratio:g}|{seed}", {}) for seed in seeds]
        if all("nll" in cell for cell in found):
            excess[method] = fmean(map(_mean_nll, found)) - dense
    lines = [f"| part, at {ratio:.0%} | excess nats per token, mean | least | most |"]
    lines.append("|---|---:|---:|---:|")
    for factor, levels in FACTORS.items():
        for level in levels:
            values = [
                excess[m]
                for m, at in factorial().items()
                if at.get(factor) == level and m in excess
            ]
            if values:
                numbers = f"{fmean(values):.3f} | {min(values):.3f} | {max(values):.3f}"
                lines.append(f"| {factor}: {level} | {numbers} |")
    best = min(excess, key=lambda method: excess[method], default="none")
    return "\n".join([*lines, "", f"{len(excess)} combinations; least excess: `{best}`."])


def _mean_nll(cell: dict[str, Any]) -> float:
    return sum(cell["nll"]) / sum(cell["tokens"])


def run() -> None:
    """Hand the methods to the harness of `compare.py`; for the cross, show the effects after it."""
    words = __doc__.splitlines()[0]
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--factorial", action="store_true")
    chosen, sys.argv[1:] = own.parse_known_args()
    if not chosen.factorial:
        main(words, [*CONDITIONAL, *PAPER], "choose", "ablation.json")
        return
    arguments = (words, [*factorial()], "choose", "factorial.json")
    main(*arguments)
    options = parse_arguments(*arguments)
    cells = json.loads(Path(options.out).read_text())["cells"]
    for ratio in options.ratios:
        print("\n" + effects(cells, ratio, options.seeds))


if __name__ == "__main__":
    run()
