"""What a plan did to each layer, as far as plan and report alone can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_prune.decoder import SubBlockKind
    from lit_prune.plan import PruningPlan

NAMES: dict[SubBlockKind, str] = {"attention": "attention", "mlp": "MLP"}


@dataclass(frozen=True, slots=True)
class Part:
    """The attention or the MLP of one layer.

    Attributes:
        total: Units before; 0 where there was no such sub-block.
        kept: Kept units, ascending.
    """

    total: int
    kept: tuple[int, ...]

    @property
    def removed(self) -> bool:
        """Whether it went whole."""
        return self.total > 0 and not self.kept

    @property
    def share(self) -> float:
        """Of its units, what is kept."""
        return len(self.kept) / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class Outline:
    """All layers before and after.

    Attributes:
        parts: For each kind one `Part` a layer.
        exact: Whether the plan says how many units there were. Otherwise there were at least as
            many as the highest kept one tells.
    """

    parts: dict[SubBlockKind, tuple[Part, ...]]
    exact: bool

    @classmethod
    def of(cls, plan: PruningPlan) -> Outline:
        """Read a plan."""
        sizes = _sizes(plan)
        parts: dict[SubBlockKind, tuple[Part, ...]] = {}
        for kind in KINDS:
            kept = [layer.kept(kind) for layer in plan.layers]
            least = max((units[-1] + 1 for units in kept if units), default=0)
            totals = sizes[kind] if sizes else [least] * len(kept)
            parts[kind] = tuple(Part(*pair) for pair in zip(totals, kept, strict=True))
        return cls(parts, exact=sizes is not None)

    @property
    def num_layers(self) -> int:
        """Layers of the model before pruning."""
        return len(self.parts["attention"])

    def counts(self, kind: SubBlockKind) -> tuple[int, int]:
        """Return units cut, and units before."""
        total = sum(part.total for part in self.parts[kind])
        return total - sum(len(part.kept) for part in self.parts[kind]), total

    def whole_layers(self) -> list[int]:
        """Return the layers that lost everything that they had."""
        pairs = zip(*(self.parts[kind] for kind in KINDS), strict=True)
        return [i for i, two in enumerate(pairs) if _gone(two)]

    def removed(self, kind: SubBlockKind) -> list[int]:
        """Return the layers that lost this sub-block whole, and kept the other."""
        whole = set(self.whole_layers())
        return [i for i, part in enumerate(self.parts[kind]) if part.removed and i not in whole]


def _gone(parts: Sequence[Part]) -> bool:
    return any(part.removed for part in parts) and not any(part.kept for part in parts)


def _sizes(plan: PruningPlan) -> dict[str, list[int]] | None:
    """Return the sizes that the plan states; None where it does not, or they cannot be meant."""
    found: Any = plan.provenance.get("sizes")
    if not isinstance(found, dict):
        return None
    for kind in KINDS:
        sizes = found.get(kind)
        if not isinstance(sizes, list) or len(sizes) != len(plan.layers):
            return None
        for size, layer in zip(sizes, plan.layers, strict=True):
            least = max(layer.kept(kind), default=-1) + 1
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                return None
    return found
