"""Knowing that a forward belongs to ``generate``: what a model writes calibrates nothing."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


class GenerateWatch:
    """Knows whether a model's ``generate`` is running, until it is removed.

    With a KV cache such forwards would be known by it; without one each looks like a sample that
    has grown by a token. The instance's ``generate`` is wrapped for the time; nothing else tells.

    Args:
        model: The language model.

    Attributes:
        running: Calls of ``generate`` that run at this moment, one inside the other.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.running = 0
        self._model = model
        self._watched: Callable[..., Any] | None = None
        self._own = vars(model).get("generate")  # one that the user hung on the instance
        generate: Callable[..., Any] | None = getattr(model, "generate", None)
        if generate is None:  # not every PreTrainedModel has it
            return

        @wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - what `generate` returns
            self.running += 1
            try:
                return generate(*args, **kwargs)
            finally:
                self.running -= 1

        self._watched = watched
        vars(model)["generate"] = watched

    def remove(self) -> None:
        """Put back what was there. Safe to call twice."""
        if self._watched is not None and vars(self._model).get("generate") is self._watched:
            if self._own is None:
                del vars(self._model)["generate"]
            else:
                vars(self._model)["generate"] = self._own
        # who holds this watch can be pickled again
        self._watched = self._own = None
