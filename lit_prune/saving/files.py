"""Files that a stranger may have written: strict JSON, safe names, hashes; fsync for our own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

from lit_prune.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

MAX_JSON_BYTES = 64 * 2**20
_NAME = re.compile(r"[\w.-]+", re.ASCII)
# What unpickles, or is code: reading one can run whatever its author wanted.
_RISKY = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".joblib",
    ".npy",
    ".npz",
    ".py",
    ".pyc",
    ".so",
)


def is_risky(name: str) -> bool:
    """Return whether a file of this name is code, or a pickle that may carry code.

    Example:
        >>> is_risky("pytorch_model.bin"), is_risky("model.safetensors")
        (True, False)
    """
    return name.lower().endswith(_RISKY)


def inside(directory: Path, name: str) -> Path:
    """Return the path of a file that lies in ``directory``, links followed.

    Raises:
        ArtifactError: If the name is not a plain one, or a link leads out of the directory.
    """
    if not _NAME.fullmatch(name) or not name.strip("."):
        raise ArtifactError(
            f"{directory}: {name!r:.80} is not a plain file name ([A-Za-z0-9_.-]); refused."
        )
    path = directory / name
    try:
        lies_in = path.resolve().parent
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise ArtifactError(f"{path} cannot be followed: {error}.") from error
    if lies_in != directory.resolve():
        raise ArtifactError(
            f"{path} is a link that leads out of its directory, to {lies_in}; refused."
        )
    return path


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object: bounded in size, no key twice, no NaN.

    Raises:
        ArtifactError: If the file is missing, too large, or something else.
    """
    return parse_json(read_text(path, max_bytes=max_bytes), path)


def read_text(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Read UTF-8 text of a bounded size.

    Raises:
        ArtifactError: If the file is missing, too large, or not text.
    """
    if not path.is_file():  # also keeps us from waiting on a pipe
        raise ArtifactError(f"{path} is missing (or not a regular file).")
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise ArtifactError(f"{path} is larger than {max_bytes} bytes; refused before parsing.")
        return raw.decode()
    except ValueError as error:
        raise ArtifactError(f"{path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise _typed(error, path) from error


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        ArtifactError: If it is anything else, a key occurs twice, or a number is not finite.
    """
    try:
        whole = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not the JSON that save_pruned writes: {error!s:.200}."
        ) from error
    if not isinstance(whole, dict):
        raise ArtifactError(f"{path} must hold a JSON object, got {type(whole).__name__}.")
    return whole


def write_json(path: Path, whole: dict[str, Any]) -> None:
    """Write a JSON object. Not atomic: the directory around it is."""
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Ask the disk to keep a file, or the entries of a directory, through a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _typed(error: OSError, path: Path) -> ArtifactError:
    return (
        error
        if isinstance(error, ArtifactError)
        else ArtifactError(f"{path} cannot be read: {error}.")
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) != len(pairs):
        raise ValueError("a key occurs twice")
    return whole


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
