"""Preset ``sleb``: blocks leave one by one, each time the one that the loss misses least.

References:
    Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks", ICML 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.allocation import require_met
from lit_prune.decoder import all_kept
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.removal import PASSED_OVER, blocks_of, remove_by_loss

if TYPE_CHECKING:
    from lit_prune.methods.decision import Case


def decide(case: Case) -> Decision:
    """Remove blocks by measured loss; the first and the last stay, as in its code."""
    whole = Decision.whole(case.spec)
    if not case.config.pruning_ratio:
        return whole
    last = len(case.spec.blocks) - 1
    inner = [piece for piece in blocks_of(case) if piece[0][0] not in (0, last)]
    counts, steps = remove_by_loss(case, inner, all_kept(case.spec), whole.kept)
    require_met(case.budget, counts)
    return Decision.whole(case.spec, counts, {"steps": steps})


METHOD = Method(
    name="sleb",
    rule="blocks leave one by one, each time the one without which the loss is least",
    source="Song et al., SLEB, ICML 2024",
    decide=decide,
    granularities=("block",),
    allocators=("greedy",),
    deviations=(
        PASSED_OVER,
        "Drafts are judged on the first search_tokens of the calibrate side; its code uses all of "
        "its text.",
    ),
)
