"""Stage everything, then commit; undo on any error. The model changes completely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()
_CONTIGUOUS = torch.contiguous_format


@dataclass(slots=True)
class _Edit:
    owner: Any
    name: str
    value: Any
    before: Any = _ABSENT


class StagedEdits:
    """Replacement parameters, modules and attributes prepared aside.

    Staging may fail or run out of memory and changes nothing. `commit` only assigns; if an
    assignment fails, or Ctrl-C arrives, the ones before it are taken back. `rollback` takes a whole
    commit back.

    Example:
        >>> linear, edits = nn.Linear(4, 2), StagedEdits()
        >>> edits.parameter(linear, "weight", linear.weight[:, :3])
        >>> edits.attribute(linear, "in_features", 3)
        >>> edits.commit()
        >>> linear
        Linear(in_features=3, out_features=2, bias=True)
        >>> edits.rollback()
        >>> linear
        Linear(in_features=4, out_features=2, bias=True)
    """

    def __init__(self) -> None:
        self._edits: list[_Edit] = []
        self._followers: list[Callable[[], None]] = []

    def __len__(self) -> int:
        """Return how many assignments are staged."""
        return len(self._edits)

    def parameter(
        self, owner: nn.Module, name: str, value: Tensor, *, like: nn.Parameter | None = None
    ) -> None:
        """Stage a parameter; dtype, device, ``requires_grad`` as ``like`` (default: the old)."""
        like = owner.get_parameter(name) if like is None else like
        # clone: a bare slice keeps the whole old storage alive, and a tensor made in inference mode
        # cannot be trained
        new = (
            value.detach().to(device=like.device, dtype=like.dtype).clone(memory_format=_CONTIGUOUS)
        )
        self._edits.append(_Edit(owner, name, nn.Parameter(new, requires_grad=like.requires_grad)))

    def attribute(self, owner: Any, name: str, value: Any) -> None:  # noqa: ANN401 - modules and configs alike
        """Stage a sub-module or a plain attribute."""
        self._edits.append(_Edit(owner, name, value))

    def follow(self, follower: Callable[[], None]) -> None:
        """Call ``follower`` after every change, a taken-back one too: it derives from the model."""
        self._followers.append(follower)

    def commit(self) -> None:
        """Assign everything, or nothing."""
        done = 0
        try:
            for edit in self._edits:
                edit.before = getattr(edit.owner, edit.name, _ABSENT)
                done += 1
                self._assign(edit)
            for follower in self._followers:
                follower()
        except BaseException:
            self._undo(done)
            raise

    def rollback(self) -> None:
        """Take a commit back."""
        self._undo(len(self._edits))

    def _undo(self, count: int) -> None:
        for edit in reversed(self._edits[:count]):
            if edit.before is _ABSENT:
                if hasattr(edit.owner, edit.name):
                    delattr(edit.owner, edit.name)
            else:
                setattr(edit.owner, edit.name, edit.before)
        for follower in self._followers:
            follower()

    @staticmethod
    def _assign(edit: _Edit) -> None:
        setattr(edit.owner, edit.name, edit.value)
