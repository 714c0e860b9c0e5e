"""A config that all layers share, as one layer sees it whose head count is its own."""

from __future__ import annotations

from typing import Any


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
