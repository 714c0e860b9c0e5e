"""The only place that changes a model."""

from lit_prune.surgery.apply import applied, apply_plan, stage
from lit_prune.surgery.compensation import Compensation, mean_compensation, weights_digest
from lit_prune.surgery.edits import StagedEdits
from lit_prune.surgery.least_squares import least_squares_compensation
from lit_prune.surgery.mask import masked

__all__ = [
    "Compensation",
    "StagedEdits",
    "applied",
    "apply_plan",
    "least_squares_compensation",
    "masked",
    "mean_compensation",
    "stage",
    "weights_digest",
]
