"""Preset ``shortgpt``: whole blocks whose output is most like their input.

References:
    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    arXiv 2403.03853: block influence ``1 - E cos(x_in, x_out)``, in one shot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.calibration import Needs
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.removal import PASSED_OVER, blocks_of, remove_in_order

if TYPE_CHECKING:
    from lit_prune.methods.decision import Case


def decide(case: Case) -> Decision:
    """Remove the blocks of least influence."""
    if not case.config.pruning_ratio:
        return Decision.whole(case.spec)
    assert case.calibration.similarities is not None  # noqa: S101 - `needs` asked for it
    influence = (1 - case.calibration.similarities).tolist()
    pieces = sorted(blocks_of(case), key=lambda piece: (influence[piece[0][0]], piece))
    counts = remove_in_order(case, pieces)
    return Decision.whole(case.spec, counts, {"block_influence": influence})


METHOD = Method(
    name="shortgpt",
    rule="whole blocks leave whose output is most like their input",
    source="Men et al., ShortGPT, arXiv 2403.03853",
    decide=decide,
    needs=lambda _config: Needs(residuals=True),
    granularities=("block",),
    allocators=("greedy",),
    deviations=(PASSED_OVER,),
)
