"""Running out of memory, in words that say what to lower."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def out_of_memory_in(place: str, batch_tokens: int) -> Iterator[None]:
    """Turn an `torch.OutOfMemoryError` into one that names place and remedy.

    Args:
        place: Where, e.g. ``replayed batch 3 ([4, 512] rows x tokens)``.
        batch_tokens: Tokens of one forward.

    Raises:
        CalibrationError: With the original error as its cause.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            f"out of memory in {place}: {error}. Lower replay_batch_tokens (now {batch_tokens}) or "
            "max_calibration_tokens. The model is unchanged."
        ) from error
