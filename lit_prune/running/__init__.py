"""What the callback does with a Trainer."""

from lit_prune.running.artifacts import Artifacts
from lit_prune.running.loops import (
    forget_averages,
    is_rehearsal,
    load_validation,
    on_device,
    validate_within_fit,
)
from lit_prune.running.pruning import (
    Seen,
    calibrate_on,
    judge,
    seen_by_all,
    shows_progress,
    steps_since,
    tell,
)
from lit_prune.running.refusals import (
    STALE,
    refuse_compiled,
    refuse_loaders,
    refuse_no_validation,
    refuse_stale_checkpoint,
    refuse_stale_optimizers,
    refuse_strategy,
)

__all__ = [
    "STALE",
    "Artifacts",
    "Seen",
    "calibrate_on",
    "forget_averages",
    "is_rehearsal",
    "judge",
    "load_validation",
    "on_device",
    "refuse_compiled",
    "refuse_loaders",
    "refuse_no_validation",
    "refuse_stale_checkpoint",
    "refuse_stale_optimizers",
    "refuse_strategy",
    "seen_by_all",
    "shows_progress",
    "steps_since",
    "tell",
    "validate_within_fit",
]
