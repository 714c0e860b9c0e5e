"""Preset ``layerdrop``: every n-th block leaves, evenly spaced, whatever the text says.

References:
    Fan et al., "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020: the rule
    "every other" for pruning at inference. Their models are trained with layers dropped; yours is
    not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.removal import PASSED_OVER, blocks_of, remove_in_order

if TYPE_CHECKING:
    from lit_prune.methods.decision import Case


def decide(case: Case) -> Decision:
    """Remove evenly spaced blocks."""
    if not case.config.pruning_ratio:
        return Decision.whole(case.spec)
    pieces = blocks_of(case)
    wanted = max(1, round(case.config.ratio * len(case.spec.blocks)))
    # the middles of equal stretches, then what lies next to them should one not fit
    middles = [(2 * i + 1) * len(pieces) / (2 * wanted) - 0.5 for i in range(wanted)]
    even = [pieces[round(middle)] for middle in middles if round(middle) < len(pieces)]
    rest = [piece for piece in pieces if piece not in even]
    return Decision.whole(case.spec, remove_in_order(case, [*dict.fromkeys(even), *rest]))


METHOD = Method(
    name="layerdrop",
    rule="every n-th block leaves, evenly spaced, whatever the text says",
    source="Fan et al., Reducing Transformer Depth on Demand (LayerDrop), ICLR 2020",
    decide=decide,
    granularities=("block",),
    allocators=("greedy",),
    deviations=("The model was not trained with layers dropped.", PASSED_OVER),
)
