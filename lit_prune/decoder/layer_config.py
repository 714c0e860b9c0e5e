"""What an attention reads of its head count: its own numbers, or those of the shared config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_prune.decoder.family import HeadCount


class LayerConfig:
    """A few fields are this layer's; every other one is the shared config's, as it is when read.

    For attentions whose code asks their config how many heads there are. What is set on the shared
    config later (an attention implementation, say) is seen here too.

    Args:
        shared: The model's config.
        own: What differs here, by name.

    Example:
        >>> from transformers import Phi3Config
        >>> shared = Phi3Config(num_attention_heads=32)
        >>> mine = LayerConfig(shared, {"num_attention_heads": 24})
        >>> shared.attention_dropout = 0.5
        >>> mine.num_attention_heads, mine.attention_dropout, shared.num_attention_heads
        (24, 0.5, 32)
    """

    def __init__(self, shared: object, own: dict[str, Any]) -> None:
        self._shared, self._own = shared, own

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a config holds
        """Return what is not found here: this layer's, or the shared one's."""
        # a copy in the making has neither yet, and protocols of Python are its own
        if name in ("_shared", "_own") or name.startswith("__"):
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._shared, name)


def numbers_for(
    counts: Mapping[str, HeadCount], shared: object, *, head_dim: int, groups: int, queries: int
) -> dict[str, object]:
    """Return what an attention's code reads of its heads, by attribute: its config too, if need be.

    Args:
        counts: `Family.head_counts`.
        shared: The config that the attention has now.
        head_dim: Width of a head.
        groups: KV groups.
        queries: Query heads of a group.

    Example:
        >>> numbers_for({"num_heads": "queries"}, None, head_dim=8, groups=2, queries=3)
        {'num_heads': 6}
    """
    counted = {"queries": groups * queries, "groups": groups, "width": groups * queries * head_dim}
    found: dict[str, object] = {}
    own: dict[str, Any] = {}
    for name, what in counts.items():
        owner, _, leaf = name.rpartition(".")
        (own if owner else found)[leaf] = counted[what]
    return {**found, "config": LayerConfig(shared, own)} if own else found
