"""What the callback does with a Trainer."""

from lit_prune.running.artifacts import Artifacts
from lit_prune.running.checkpoint_files import (
    Weights,
    refuse_no_best,
    refuse_weights,
    save_pruned_checkpoint,
)
from lit_prune.running.hooks import Hooks
from lit_prune.running.loops import (
    forget_averages,
    is_rehearsal,
    load_validation,
    makes_its_model,
    rewrap,
    validate_within_fit,
)
from lit_prune.running.optimizers import carried_over
from lit_prune.running.pruning import prune_copy, prune_within, tell
from lit_prune.running.refusals import (
    refuse_compiled,
    refuse_loaders,
    refuse_no_validation,
    refuse_stale_optimizers,
    refuse_strategy,
)
from lit_prune.running.schedule import Schedule, When, is_pruned
from lit_prune.running.seen import Seen, judge, seen_by_all
from lit_prune.running.sharded import is_sharded

__all__ = [
    "Artifacts",
    "Hooks",
    "Schedule",
    "Seen",
    "Weights",
    "When",
    "carried_over",
    "forget_averages",
    "is_pruned",
    "is_rehearsal",
    "is_sharded",
    "judge",
    "load_validation",
    "makes_its_model",
    "prune_copy",
    "prune_within",
    "refuse_compiled",
    "refuse_loaders",
    "refuse_no_best",
    "refuse_no_validation",
    "refuse_stale_optimizers",
    "refuse_strategy",
    "refuse_weights",
    "rewrap",
    "save_pruned_checkpoint",
    "seen_by_all",
    "tell",
    "validate_within_fit",
]
