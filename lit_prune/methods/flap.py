"""Preset ``flap``: fluctuation of a column times its weight norm, one threshold for all layers.

``flap_ls`` keeps the same units and compensates by least squares.

References:
    An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024:
    WIFV metric, structure AL-AM, and its code for the order of squaring, standardising and
    averaging. GRAIL, arXiv 2602.23795, for ``flap_ls``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lit_prune.methods.decision import Method
from lit_prune.methods.scored import WITH_EXPERTS, by_score, column_squares
from lit_prune.methods.wanda import GRAIL_DEVIATIONS

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case


def score(case: Case) -> dict[SubBlock, Tensor]:
    """Return the standardised ``Var(x_j) * ||W_:j||^2``, averaged over the columns of each unit.

    In attention the metric is squared before it is standardised over the columns of its layer.
    What an expert adds to the stream is its columns, as they are.
    """
    units = {(index, part.kind): part.num_units for index, part in case.spec.sub_blocks}
    found: dict[SubBlock, Tensor] = {}
    for place, squares in column_squares(case).items():
        metric = case.calibration.units[place][1] * squares
        if place[1] == "attention":
            metric = metric.square()
        spread = metric.std() if len(metric) > 1 else metric.new_tensor(1.0)
        standard = (metric - metric.mean()) / spread.clamp_min(1e-300)
        found[place] = standard.reshape(units[place], -1).mean(1)
    return found


METHOD = Method(
    name="flap",
    rule="units that fluctuate least, times their weights, leave first, by one threshold "
    "for all layers",
    source="An et al., Fluctuation-based Adaptive Structured Pruning for LLMs (FLAP), AAAI 2024",
    decide=by_score(score),
    granularities=WITH_EXPERTS,
    allocators=("global", "uniform"),
    compensation="mean",
    deviations=(
        "The variance is over all tokens; its code adds squared deviations from a running mean, "
        "row k weighted (k - 1) / k (the first by 0), so that it depends on the order of rows.",
        "A unit is weighed by the parameters that leave with it (its code: 512/3 channels to a "
        "head, true of multi-head attention with heads of 128 only).",
        "Counts are rounded to channel_multiple and settled on the ratio, against which the added "
        "biases count; every sub-block keeps at least one unit.",
    ),
)
METHOD_LS = replace(
    METHOD,
    name="flap_ls",
    source=f"{METHOD.source}, with the Gram compensation of GRAIL (arXiv 2602.23795)",
    compensation="least_squares",
    deviations=(*METHOD.deviations, *GRAIL_DEVIATIONS),
)
