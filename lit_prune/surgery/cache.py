"""Which KV-cache slot each attention uses: the cache must count positions right."""

from __future__ import annotations

from collections.abc import Sequence


def cache_slots(
    types: Sequence[str], attends: Sequence[bool]
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Give every remaining attention a cache slot of its own type, the first slots first.

    A Hugging Face cache reads its length from slot 0, and the mask of a type from that type's first
    slot. A layer that lost its attention never fills its slot: if it is the first, length and
    positions read 0 and decoding goes silently wrong. So layers without attention take the type of
    the first layer that attends (no mask is applied there, any label is right), and the attentions
    of each type move to that type's first slots.

    Args:
        types: Attention type of each layer that stays.
        attends: Whether it still has its attention; at least one does.

    Returns:
        The new type of each layer, and the slot of each attending layer by position.

    Example:
        >>> cache_slots(["full", "slide", "slide"], [False, True, True])
        (('slide', 'slide', 'slide'), {1: 0, 2: 1})
        >>> cache_slots(["full", "full", "full"], [True, False, True])
        (('full', 'full', 'full'), {0: 0, 2: 1})
    """
    first = next(kind for kind, here in zip(types, attends, strict=True) if here)
    labels = tuple(kind if here else first for kind, here in zip(types, attends, strict=True))
    free = {
        kind: [slot for slot, label in enumerate(labels) if label == kind] for kind in set(labels)
    }
    slots = {
        position: free[labels[position]].pop(0) for position, here in enumerate(attends) if here
    }
    return labels, slots
