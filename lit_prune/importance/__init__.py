"""Importance as pure functions: tensors in, tensors out."""

from lit_prune.importance.affine import AffineRefit, affine_refit
from lit_prune.importance.conditional import (
    condition_bound,
    conditional_entropy,
    conditional_mean,
    damped,
    output_error,
)
from lit_prune.importance.damage import DamageCurve, damage_curve
from lit_prune.importance.experts import experts_damage, experts_order
from lit_prune.importance.gaussian import (
    Estimator,
    channel_entropy,
    state_entropy,
    transfer_entropy,
    unit_entropy,
)
from lit_prune.importance.given_order import order_damage
from lit_prune.importance.magnitude import unit_magnitude

__all__ = [
    "AffineRefit",
    "DamageCurve",
    "Estimator",
    "affine_refit",
    "channel_entropy",
    "condition_bound",
    "conditional_entropy",
    "conditional_mean",
    "damage_curve",
    "damped",
    "experts_damage",
    "experts_order",
    "order_damage",
    "output_error",
    "state_entropy",
    "transfer_entropy",
    "unit_entropy",
    "unit_magnitude",
]
