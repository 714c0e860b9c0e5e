"""Importance as pure functions: tensors in, tensors out."""

from lit_prune.importance.gaussian import (
    Estimator,
    channel_entropy,
    state_entropy,
    transfer_entropy,
    unit_entropy,
)

__all__ = ["Estimator", "channel_entropy", "state_entropy", "transfer_entropy", "unit_entropy"]
