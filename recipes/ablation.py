"""Which part earns the gain: every part of ``conditional`` exchanged, one at a time and together.

Run, offline, on the shipped model::

    python recipes/ablation.py --out runs/ablation.json
    python recipes/ablation.py --ratios 0.3 --seeds 0 1 2 --out runs/ablation3.json

Options as in `compare.py`, but scored on the *choose* packages, not on the test text: defaults are
chosen here, and what is reported elsewhere must not have been looked at. The parts:

- what weighs the curves (``sensitivity``), against equal weights;
- in which order units leave (``unit_score``): conditional entropy, the paper's entropy, FLAP's
  fluctuation, or at random, all under the same allocation;
- what compensates (``compensation``);
- how the budget is distributed: over everything, without depth, equal widths, MLPs only;
- the choices of ``paper`` that its authors ablate.
"""

from __future__ import annotations

from compare import MLP_UNIFORM, main

CONDITIONAL = [
    "conditional",
    *(f"conditional:sensitivity={name}" for name in ("nll", "frobenius", "transfer_entropy")),
    "conditional:sensitivity=none",
    *(f"conditional:unit_score={name}" for name in ("entropy", "fluctuation", "random")),
    *(f"conditional:compensation={name}" for name in ("mean", "none")),
    "conditional:unit_score=entropy,compensation=mean",
    "conditional:unit_score=random,compensation=mean",
    "conditional:sensitivity=none,compensation=mean",
    "conditional:granularities=kv_group+channel",
    "conditional:granularities=channel",
    "conditional:allocator=uniform_widths",
    f"{MLP_UNIFORM},compensation=least_squares",
]
PAPER = [
    "paper",
    "paper:allocator=greedy",
    "paper:allocator=uniform",
    "paper:compensation=none",
    "paper:compensation=least_squares",
    "paper:granularities=kv_group+channel",
    "paper:cap_clusters=false",
]

if __name__ == "__main__":
    main(__doc__.splitlines()[0], [*CONDITIONAL, *PAPER], "choose", "ablation.json")
