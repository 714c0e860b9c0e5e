"""The measured times of a report, read back and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_prune.metrics import LatencyComparison, LatencyResult, compare

if TYPE_CHECKING:
    from lit_prune.metrics import Speedup
    from lit_prune.report import PruningReport

PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Timed:
    """One batch size.

    Attributes:
        before: Of the dense model.
        after: Of the pruned model; None in a dry run.
        reasons: By phase, why no gain may be claimed, or why it is doubtful; else empty. And, as
            ``larger_batch``, what that tells about decoding for few sequences.
    """

    before: LatencyResult
    after: LatencyResult | None
    reasons: dict[str, str]

    @property
    def comparison(self) -> LatencyComparison | None:
        """Both phases compared; None in a dry run."""
        return None if self.after is None else compare(self.before, self.after)

    def phase(self, name: str) -> Speedup | None:
        """Return one phase compared; None in a dry run."""
        found = self.comparison
        if found is None:
            return None
        return found.prefill if name == "prefill" else found.decode


def times_of(report: PruningReport) -> list[Timed]:
    """Return what was measured, in the order of the report; nothing where it was switched off."""
    entries: Any = report.conditions.get("latency", [])
    return [
        Timed(
            LatencyResult(**entry["before"]),
            LatencyResult(**entry["after"]) if "after" in entry else None,
            dict(entry.get("reasons", {})),
        )
        for entry in entries
    ]
