"""Preset ``blockpruner``: attentions and MLPs leave one by one, by measured loss.

References:
    Zhong et al., "BlockPruner: Fine-grained Pruning for Large Language Models", arXiv 2406.10594.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.allocation import require_met
from lit_prune.decoder import all_kept
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.removal import PASSED_OVER, remove_by_loss, sub_blocks_of

if TYPE_CHECKING:
    from lit_prune.methods.decision import Case


def decide(case: Case) -> Decision:
    """Remove sub-blocks by measured loss."""
    whole = Decision.whole(case.spec)
    if not case.config.pruning_ratio:
        return whole
    counts, steps = remove_by_loss(case, sub_blocks_of(case), all_kept(case.spec), whole.kept)
    require_met(case.budget, counts)
    return Decision.whole(case.spec, counts, {"steps": steps})


METHOD = Method(
    name="blockpruner",
    rule="attentions and MLPs leave one by one, each time the one without which the loss is least",
    source="Zhong et al., BlockPruner, arXiv 2406.10594",
    decide=decide,
    granularities=("sub_block",),
    allocators=("greedy",),
    deviations=(
        PASSED_OVER,
        "Drafts are judged on the first search_tokens of the calibrate side, by the mean over "
        "tokens; the paper takes 256 samples, its code the mean over samples.",
    ),
)
