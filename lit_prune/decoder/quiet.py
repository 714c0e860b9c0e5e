"""Our own forwards leave no trace on the model that they run."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


@contextmanager
def quiet(model: PreTrainedModel) -> Iterator[None]:
    """Evaluate without traces: modes, ``use_cache`` and random state come back as they were.

    Inside, the model is in eval mode (dropout and gradient checkpointing are off by that), no
    gradient is recorded, no cache is built, and autocast is off, so that the same rows give the
    same numbers whatever precision plugin surrounds the call.
    """
    training = [module for module in model.modules() if module.training]
    use_cache = getattr(model.config, "use_cache", None)
    device = next(model.parameters()).device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            model.eval()
            model.config.use_cache = False
            yield
        finally:
            model.config.use_cache = use_cache
            for module in training:
                module.training = True
