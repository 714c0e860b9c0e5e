"""Reading the tensors of a batch, whatever holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lit_prune.errors import ConfigError


def tensor_field(batch: object, name: str, device: torch.device) -> torch.Tensor | None:
    """Return a tensor of a mapping or of an object's attributes, on ``device``.

    Raises:
        ConfigError: If it is something else.

    Example:
        >>> tensor_field({"input_ids": torch.ones(2)}, "input_ids", torch.device("cpu"))
        tensor([1., 1.])
    """
    value = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"{name} of a batch is a {type(value).__name__}; expected a tensor.")
    return value.to(device)
