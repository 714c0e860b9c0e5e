"""Stage everything, then commit; undo on any error. The model changes completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()
_CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Replaced:
    """Where one parameter went, or came from: what an optimizer must know to go on.

    Attributes:
        old: The parameter before; None where there was none.
        new: The parameter in its place; None where it left with its sub-block.
        dim: Along which dimension ``new`` is a part of ``old``; None where it is as large.
        index: Which positions of ``dim`` stayed, ``[kept]``.
        beside: The old parameter whose module a wholly new one belongs to.
    """

    old: nn.Parameter | None = None
    new: nn.Parameter | None = None
    dim: int | None = None
    index: Tensor | None = None
    beside: Tensor | None = None


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
        self._replaced: list[Replaced] = []

    def __len__(self) -> int:
        """Return how many assignments are staged."""
        return len(self._edits)

    def record(
        self, before: Iterable[nn.Parameter], after: Iterable[nn.Parameter]
    ) -> tuple[Replaced, ...]:
        """Say what became of the parameters that the model had before.

        Args:
            before: Of the model, before `commit`.
            after: Of the model, after it.
        """
        known = {id(parameter) for parameter in after}
        known |= {id(replaced.old) for replaced in self._replaced}
        left = (Replaced(old=parameter) for parameter in before if id(parameter) not in known)
        return (*self._replaced, *left)

    def parameter(
        self,
        owner: nn.Module,
        name: str,
        value: Tensor,
        *,
        like: nn.Parameter | None = None,
        kept: tuple[int, Tensor] | None = None,
    ) -> None:
        """Stage a parameter; dtype, device, ``requires_grad`` as ``like`` (default: the old).

        Args:
            owner: The module that holds it.
            name: Its name there.
            value: What it shall hold.
            like: What a new parameter stands beside, where there was none.
            kept: Dimension of the old parameter, and the positions in it that stay.
        """
        old = getattr(owner, name, None)
        like = owner.get_parameter(name) if like is None else like
        # clone: a bare slice keeps the whole old storage alive, and a tensor made in inference mode
        # cannot be trained
        new = (
            value.detach().to(device=like.device, dtype=like.dtype).clone(memory_format=_CONTIGUOUS)
        )
        parameter = nn.Parameter(new, requires_grad=like.requires_grad)
        self._edits.append(_Edit(owner, name, parameter))
        if old is None:
            self.added(parameter, beside=like)
        else:
            dim, index = kept or (None, None)
            self._replaced.append(Replaced(old=old, new=parameter, dim=dim, index=index))

    def added(self, parameter: nn.Parameter, *, beside: Tensor) -> None:
        """Remember a wholly new parameter, here or in a module that is staged."""
        self._replaced.append(Replaced(new=parameter, beside=beside))

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
