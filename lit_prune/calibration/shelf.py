"""Hidden states of a whole text: in memory while they are fewer than the weights, else in files."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_prune.errors import CalibrationError

_logger = logging.getLogger(__name__)
_KEY = "hidden"

Shelf: TypeAlias = MutableMapping[str, Tensor]


class FiledTensors(MutableMapping[str, Tensor]):
    """Tensors by name, each in a file of its own; what is read is read anew each time.

    Args:
        folder: Where to; it exists, is empty, and is nobody else's.
        device: Where the tensors are wanted.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def __getitem__(self, name: str) -> Tensor:
        path = self._folder / name
        if not path.exists():
            raise KeyError(name)
        return load_file(path, device=str(self._device))[_KEY]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        # beside it first: what was read before is a map of the old file, and must stay one
        beside = self._folder / f"{name}.new"
        try:
            save_file({_KEY: tensor.contiguous()}, beside)
            beside.replace(self._folder / name)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"hidden states of the calibration text cannot be kept in {self._folder}: {error}. "
                "Set TMPDIR to a directory with more room, or lower max_calibration_tokens. The "
                "model is unchanged."
            ) from error

    def __delitem__(self, name: str) -> None:
        (self._folder / name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._folder.iterdir())

    def __len__(self) -> int:
        return sum(1 for _ in self)


@contextmanager
def shelves(
    expected_bytes: int, memory_bytes: int, device: torch.device
) -> Iterator[Callable[[], Shelf]]:
    """Give a maker of empty shelves; their files are gone at the end.

    Args:
        expected_bytes: What all shelves together will hold.
        memory_bytes: Up to this much stays in memory.
        device: Where the tensors are wanted.

    Example:
        >>> with shelves(4_000, memory_bytes=1_000, device=torch.device("cpu")) as new_shelf:
        ...     shelf = new_shelf()
        ...     shelf["dense"] = torch.ones(2)
        ...     type(shelf).__name__, shelf["dense"]
        ('FiledTensors', tensor([1., 1.]))
    """
    if expected_bytes <= memory_bytes:
        yield dict
        return
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 2 * expected_bytes:
        _logger.warning(
            "hidden states of the calibration text stay in memory, %.1f GB: %s has %.1f GB free "
            "and twice as much is wanted; set TMPDIR to a directory with more room",
            expected_bytes / 1e9, tempfile.gettempdir(), free / 1e9,
        )  # fmt: skip
        yield dict
        return
    with tempfile.TemporaryDirectory(prefix="lit_prune-") as folder:

        def new_shelf() -> Shelf:
            return FiledTensors(Path(tempfile.mkdtemp(dir=folder)), device)

        yield new_shelf
