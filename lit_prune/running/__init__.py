"""What the callback does with a Trainer."""

from lit_prune.running.artifacts import Artifacts
from lit_prune.running.checkpoint_files import (
    Weights,
    refuse_no_best,
    refuse_weights,
    save_pruned_checkpoint,
)
from lit_prune.running.loops import (
    forget_averages,
    is_rehearsal,
    load_validation,
    makes_its_model,
    validate_within_fit,
)
from lit_prune.running.optimizers import carried_over
from lit_prune.running.pruning import prune_within, tell
from lit_prune.running.refusals import (
    refuse_compiled,
    refuse_loaders,
    refuse_no_validation,
    refuse_nothing_seen,
    refuse_stale_optimizers,
    refuse_strategy,
)
from lit_prune.running.schedule import Schedule, When, is_pruned
from lit_prune.running.seen import Seen

__all__ = [
    "Artifacts",
    "Schedule",
    "Seen",
    "Weights",
    "When",
    "carried_over",
    "forget_averages",
    "is_pruned",
    "is_rehearsal",
    "load_validation",
    "makes_its_model",
    "prune_within",
    "refuse_compiled",
    "refuse_loaders",
    "refuse_no_best",
    "refuse_no_validation",
    "refuse_nothing_seen",
    "refuse_stale_optimizers",
    "refuse_strategy",
    "refuse_weights",
    "save_pruned_checkpoint",
    "tell",
    "validate_within_fit",
]
