"""Structured pruning of fine-tuned Hugging Face causal language models, as one Lightning callback."""

from lit_prune.callback import EntropyPruningCallback
from lit_prune.calibration import Calibration
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import LitPruneError
from lit_prune.plan import PruningPlan
from lit_prune.pruner import PruningResult, prune
from lit_prune.report import PruningReport
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.surgery import apply_plan

__all__ = [
    "Calibration",
    "EntropyPruningCallback",
    "LitPruneError",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningResult",
    "apply_plan",
    "load_pruned",
    "prune",
    "save_pruned",
    "spec_for",
]
