"""What the callback does with a Trainer."""

from lit_prune.running.artifacts import Artifacts
from lit_prune.running.checkpoint_files import (
    Weights,
    chosen_weights,
    refuse_no_best,
    save_pruned_checkpoint,
)
from lit_prune.running.loops import (
    forget_averages,
    is_rehearsal,
    load_validation,
    on_device,
    validate_within_fit,
)
from lit_prune.running.optimizers import carried_over
from lit_prune.running.pruning import Seen, calibrate_on, shows_progress, tell
from lit_prune.running.refusals import (
    refuse_compiled,
    refuse_loaders,
    refuse_no_validation,
    refuse_nothing_seen,
    refuse_stale_optimizers,
    refuse_strategy,
)

__all__ = [
    "Artifacts",
    "Seen",
    "Weights",
    "calibrate_on",
    "carried_over",
    "chosen_weights",
    "forget_averages",
    "is_rehearsal",
    "load_validation",
    "on_device",
    "refuse_compiled",
    "refuse_loaders",
    "refuse_no_best",
    "refuse_no_validation",
    "refuse_nothing_seen",
    "refuse_stale_optimizers",
    "refuse_strategy",
    "save_pruned_checkpoint",
    "shows_progress",
    "tell",
    "validate_within_fit",
]
