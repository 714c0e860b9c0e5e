"""What travels on a pruned model: the plan that made it, and the report about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport


@dataclass(frozen=True, slots=True)
class PruningRecord:
    """``model.pruning_record``: set by the pruner and by `load_pruned`, written by `save_pruned`.

    Attributes:
        plan: What stayed, in indices of the model that was pruned.
        report: Before and after, where it was measured.

    Example:
        >>> from lit_prune.plan import PruningPlan
        >>> PruningRecord(PruningPlan("abc", ())).report is None
        True
    """

    plan: PruningPlan
    report: PruningReport | None = None
