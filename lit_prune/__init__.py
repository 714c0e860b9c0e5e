"""Structured pruning of fine-tuned causal language models, as one Lightning callback."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The command `lit-prune` answers --help before torch is there: it imports what it needs by itself.
if TYPE_CHECKING or Path(*sys.argv[:1]).name not in ("lit-prune", "lit-prune.exe"):
    from lit_prune.calibration import Calibration
    from lit_prune.checkpoints import follow_checkpoints
    from lit_prune.config import PruningConfig
    from lit_prune.decoder import spec_for
    from lit_prune.errors import LitPruneError
    from lit_prune.plan import PruningPlan
    from lit_prune.pruner import PruningResult, prune
    from lit_prune.report import PruningReport
    from lit_prune.saving import load_pruned, save_pruned
    from lit_prune.surgery import apply_plan
    from lit_prune.sweep import sweep

if TYPE_CHECKING:
    from lit_prune.callback import EntropyPruningCallback

__all__ = [
    "Calibration",
    "EntropyPruningCallback",
    "LitPruneError",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningResult",
    "apply_plan",
    "follow_checkpoints",
    "load_pruned",
    "prune",
    "save_pruned",
    "spec_for",
    "sweep",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    # Lightning takes seconds to import, and loading a saved model does not need it
    if name == "EntropyPruningCallback":
        from lit_prune.callback import EntropyPruningCallback

        return EntropyPruningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
