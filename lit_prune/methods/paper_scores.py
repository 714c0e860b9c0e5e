"""What ``paper`` ranks by: entropies, or what its authors compare them with in their rebuttal.

The rebuttal's tables are not published; how magnitudes become comparable with entropies is ours:
as logarithms, so that clusters see their ratios.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.calibration import TAYLOR_SCORES
from lit_prune.importance import unit_magnitude
from lit_prune.methods.entropy import Scores, entropy_scores

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.calibration import Unit
    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case


def paper_scores(case: Case) -> Scores:
    """Return the scores of units and of what may go whole that the request asks for."""
    scores = entropy_scores(case.spec, case.calibration, case.config)
    units, transfer = scores.units, scores.transfer
    if case.config.unit_score == "activation":
        units = _activation(case)
    elif case.config.unit_score == "gradient":
        units = _gradient(case)
    if case.config.sensitivity == "frobenius":
        transfer = _frobenius(case)
    return Scores(units, transfer)


def _activation(case: Case) -> dict[SubBlock, Tensor]:
    config = case.config
    return {
        (index, part.kind): unit_magnitude(
            *case.calibration.units[index, part.kind],
            part.unit_width,
            floor=config.entropy_floor,
            reduction=config.kv_group_score,
        )
        for index, part in case.spec.sub_blocks
    }


def _gradient(case: Case) -> dict[SubBlock, Tensor]:
    """Return the logarithm of the sum of ``|g * w|`` over a unit's weights.

    For each column that it owns, as the other scores are. The floor is a fraction of the model's
    mean: gradients have no natural unit.
    """
    assert case.calibration.taylor is not None  # noqa: S101 - `needs` asked for it
    column = TAYLOR_SCORES.index("element_first")
    widths = {(index, part.kind): part.unit_width for index, part in case.spec.sub_blocks}
    raw = {
        place: case.calibration.taylor[place][:, column] / width for place, width in widths.items()
    }
    mean = sum(float(found.sum()) for found in raw.values()) / sum(map(len, raw.values()))
    floor = max(case.config.entropy_floor * mean, 1e-300)
    sums = case.config.kv_group_score == "sum"
    return {
        place: (found + floor).log() * (widths[place] if sums else 1)
        for place, found in raw.items()
    }


def _frobenius(case: Case) -> dict[Unit, float]:
    """Return the root mean squared norm of the change of the final hidden state by each bypass."""
    return {unit: float(change) ** 0.5 for unit, change in (case.calibration.changes or {}).items()}
