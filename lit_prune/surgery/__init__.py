"""The only place that changes a model."""

from lit_prune.surgery.apply import applied, apply_plan, tried
from lit_prune.surgery.compensation import (
    Compensation,
    compensated_inputs,
    fitted_inputs,
    mean_compensation,
    unit_columns,
    weights_digest,
)
from lit_prune.surgery.edits import Replaced, StagedEdits
from lit_prune.surgery.least_squares import (
    DAMPING_FACTORS,
    fallback_notes,
    least_squares_compensation,
)
from lit_prune.surgery.mask import Instead, masked
from lit_prune.surgery.resume import Resumed
from lit_prune.surgery.slicing import stage
from lit_prune.surgery.structure import take_structure

__all__ = [
    "DAMPING_FACTORS",
    "Compensation",
    "Instead",
    "Replaced",
    "Resumed",
    "StagedEdits",
    "applied",
    "apply_plan",
    "compensated_inputs",
    "fallback_notes",
    "fitted_inputs",
    "least_squares_compensation",
    "masked",
    "mean_compensation",
    "stage",
    "take_structure",
    "tried",
    "unit_columns",
    "weights_digest",
]
