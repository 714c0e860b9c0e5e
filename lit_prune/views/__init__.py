"""What people look at: figures as values, and where they appear in TensorBoard."""

from lit_prune.views.before_after import before_after
from lit_prune.views.damage import damage_curves
from lit_prune.views.hparams import log_request
from lit_prune.views.kept_units import kept_units
from lit_prune.views.tensorboard import (
    MetricLogger,
    log_report,
    log_unit_entropy,
    report_scalars,
)
from lit_prune.views.trade_off import trade_off
from lit_prune.views.transfer import transfer_entropy
from lit_prune.views.unit_entropy import unit_entropy_heatmap

__all__ = [
    "MetricLogger",
    "before_after",
    "damage_curves",
    "kept_units",
    "log_report",
    "log_request",
    "log_unit_entropy",
    "report_scalars",
    "trade_off",
    "transfer_entropy",
    "unit_entropy_heatmap",
]
