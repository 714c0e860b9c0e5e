"""A file that appears whole, or not at all, for who may read what is made beside it.

And where none could: seen before any work, not after it.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lit_prune.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it takes its place when the block ends well.

    A file that was there before is whole at every moment, and stays if the block fails. Who may
    read it is decided by the umask, as of any file: safetensors 0.8 lets only its owner.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder, "plan.json")) as beside:
        ...         _ = beside.write_text("{}")
        ...     [path.name for path in Path(folder).iterdir()]
        ['plan.json']
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text, whole or not at all.

    Args:
        path: The target.
        text: What it shall hold.

    Raises:
        ArtifactError: If the file cannot be written; one that was there before is whole.
    """
    try:
        with whole_file(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{path} could not be written: {error}.") from error


def in_the_way(folder: Path) -> str | None:
    """Return why nothing can be made in a folder; None where it can.

    It is tried, for a moment: permissions do not tell of file systems that refuse all, and root is
    above them.

    Args:
        folder: One that is there.

    Example:
        >>> from pathlib import Path
        >>> in_the_way(Path(__file__))
        'is no directory'
    """
    if not folder.is_dir():
        return "is no directory"
    try:
        with TemporaryDirectory(prefix=".lit_prune-", dir=folder):
            return None
    except OSError:
        return "cannot be written to"


def refuse_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that could not be written, before any work.

    Args:
        path: The target.
        overwrite: Replace a file that is there.

    Raises:
        ArtifactError: Says what is in the way.
    """
    parent = path.absolute().parent
    if path.is_dir():
        raise ArtifactError(f"{path} is a directory; name a file.")
    if (what := in_the_way(parent)) is not None:
        raise ArtifactError(f"{path} cannot be written: {parent} {what}. Choose another place.")
    if os.path.lexists(path) and not overwrite:
        raise ArtifactError(f"{path} exists. Pass overwrite=True to replace it, or name another.")
