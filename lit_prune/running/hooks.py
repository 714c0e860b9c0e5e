"""Everything of ours that hangs on a user's module while a run goes on, to be taken off as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.calibration import Observer
from lit_prune.checkpoints import follow_checkpoints

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class Hooks:
    """What follows checkpoints that are loaded, and what observes a validation."""

    def __init__(self) -> None:
        self._following: RemovableHandle | None = None
        self._observer: Observer | None = None

    def follow(self, module: nn.Module, language_model: str | None) -> None:
        """Let the module take the structure of what is loaded into it; see `follow_checkpoints`."""
        self._following = follow_checkpoints(module, language_model)

    def observe(
        self, model: PreTrainedModel, max_tokens: int, *, alone: bool, probes: bool
    ) -> None:
        """Observe what passes through the model from now on; see `Observer`."""
        self._observer = Observer(
            model, max_tokens=max_tokens, keeps_error=not alone, probes=probes
        )
        self._observer.open()

    def pause(self, *, paused: bool) -> None:
        """Pass over forwards, or no longer."""
        if self._observer is not None:
            self._observer.paused = paused

    def observed(self) -> Observer | None:
        """Stop observing; return what was observed, None where nothing was asked for."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.close()
        return observer

    def remove(self) -> None:
        """Take everything off. Safe to call twice."""
        self.observed()
        if self._following is not None:
            self._following.remove()
            self._following = None
