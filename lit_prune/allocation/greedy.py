"""The greedy baseline: cheapest parameters first. It also seeds the exact search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.allocation.search import Candidate, Selection, checked, stable_order

if TYPE_CHECKING:
    from collections.abc import Sequence


def greedy(
    candidates: Sequence[Candidate],
    *,
    minimum: int,
    maximum: int | None = None,
    max_attention_removed: int | None = None,
) -> Selection | None:
    """Take the lowest cost per parameter until ``minimum``, then drop what was not needed.

    A block excludes its own sub-blocks and the reverse; nothing is taken back to make room.

    Args:
        candidates: Blocks and sub-blocks with their costs (nats) and sizes (parameters).
        minimum: Parameters to free, at least.
        maximum: Parameters to free, at most; candidates that would exceed it are passed over.
        max_attention_removed: Most layers that may lose their attention (a block counts).

    Returns:
        The selection, never marked optimal unless empty; or None where this order finds none.

    Raises:
        ScoreError: If a cost is negative or not finite.

    Example:
        >>> a = Candidate(name="layer 0", layer=0, kind="block", cost=1.0, size=10)
        >>> b = Candidate(name="layer 1", layer=1, kind="block", cost=3.0, size=20)
        >>> [c.name for c in greedy([a, b], minimum=15).chosen]
        ['layer 1']
    """
    ordered = checked(candidates)
    if minimum <= 0:
        return Selection.of((), optimal=True)
    most = sum(c.size for c in ordered) if maximum is None else maximum
    attention_left = len(ordered) if max_attention_removed is None else max_attention_removed
    chosen: list[Candidate] = []
    taken: dict[int, set[str]] = {}
    size = 0
    worth = (c for c in ordered if c.size > 0)
    for candidate in sorted(worth, key=lambda c: (c.cost / c.size, *stable_order(c))):
        if size >= minimum:
            break
        kinds = taken.setdefault(candidate.layer, set())
        clash = "block" in kinds or (candidate.kind == "block" and bool(kinds))
        loses_attention = int(candidate.kind != "mlp")
        if clash or size + candidate.size > most or loses_attention > attention_left:
            continue
        chosen.append(candidate)
        kinds.add(candidate.kind)
        size += candidate.size
        attention_left -= loses_attention
    if size < minimum:
        return None
    for candidate in sorted(chosen, key=lambda c: (-c.cost, *stable_order(c))):
        if size - candidate.size >= minimum:
            chosen.remove(candidate)
            size -= candidate.size
    return Selection.of(chosen)
