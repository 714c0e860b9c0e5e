"""How a module was called: what it transforms, and everything else by name."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn


def call_of(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the hidden state of a call, and its other arguments by name, for another call.

    Args:
        module: A decoder layer, or a sub-block.
        args: What it got by position: the hidden state first, if anything.
        kwargs: What it got by name.

    Example:
        >>> import torch
        >>> class Block(torch.nn.Module):
        ...     def forward(self, hidden_states, mask=None, **others): ...
        >>> call_of(Block(), (torch.ones(1), "m"), {"cache": 2})
        (tensor([1.]), {'mask': 'm', 'cache': 2})
    """
    others = dict(kwargs)
    if not args:
        return others.pop("hidden_states"), others
    names = list(inspect.signature(type(module).forward).parameters)[2:]  # self, the hidden state
    return args[0], {**dict(zip(names, args[1:], strict=False)), **others}
