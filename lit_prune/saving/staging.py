"""A directory appears whole or not at all, even when the power fails."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lit_prune.errors import ArtifactError
from lit_prune.saving.files import sync
from lit_prune.saving.manifest import MANIFEST, Manifest
from lit_prune.whole_file import in_the_way

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_log = logging.getLogger(__name__)
_SLACK_BYTES = 32 * 2**20  # config, tokenizer, plan, report


@contextmanager
def staged(
    directory: Path, *, overwrite: bool, num_bytes: int, known: Collection[str] | None = None
) -> Iterator[Path]:
    """Yield an empty directory beside ``directory``, which it becomes when the block ends well.

    Args:
        directory: The target. Links are followed.
        overwrite: Replace what an earlier `save_pruned` wrote there; the old one stays until the
            new one is in place.
        num_bytes: Expected size, checked against the free space first.
        known: Names of files that may be replaced; by default what the manifest there lists.

    Raises:
        ArtifactError: If the target is in the way, cannot be written, or the disk is too small:
            before any work, if it can be known. Whatever fails, the target is as it was and the
            temporary directory is gone.
    """
    target = Path(os.path.realpath(directory))
    refuse_target(target, overwrite=overwrite, known=known)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise ArtifactError(f"{target.parent} cannot hold a saved model: {error}.") from error
    if free < num_bytes + _SLACK_BYTES:
        raise ArtifactError(
            f"{target.parent} has {free / 1e6:.0f} MB free; saving needs "
            f"{(num_bytes + _SLACK_BYTES) / 1e6:.0f} MB. Nothing was written."
        )
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
    except FileExistsError as error:
        raise ArtifactError(
            f"{temporary} exists: another save_pruned of this process writes the same target, or "
            "one was killed. Wait for it, or delete that directory."
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"{target.parent} cannot be written: {error}. Nothing was written."
        ) from error
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        _put_in_place(temporary, target, overwrite=overwrite)
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(
            f"saving to {target} failed: {error}. The target is as it was."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where all went well


def refuse_target(target: Path, *, overwrite: bool, known: Collection[str] | None = None) -> None:
    """Refuse a directory that could not be written, before any work; arguments as of `staged`.

    Raises:
        ArtifactError: Says what is in the way.
    """
    if not os.path.lexists(target):
        there = next(path for path in target.absolute().parents if os.path.exists(path))
        if (what := in_the_way(there)) is not None:
            raise ArtifactError(f"{target} cannot be made: {there} {what}. Choose another place.")
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} exists and is not a directory. Choose another name.")
    if not overwrite:
        raise ArtifactError(
            f"{target} exists. Pass overwrite=True to replace it, or choose another name."
        )
    present = {path.name for path in target.iterdir()}
    if not present:
        return
    try:
        ours = known if known is not None else {MANIFEST, *Manifest.read(target).files}
    except ArtifactError as error:
        raise ArtifactError(
            f"{target} was not written by save_pruned ({error}) overwrite=True would delete it: "
            "delete it yourself, or choose another name."
        ) from error
    if foreign := sorted(present - set(ours)):
        raise ArtifactError(
            f"{target} holds {', '.join(foreign[:4])}, which were not written with it and "
            "overwrite=True would delete. Move it away first."
        )


def _put_in_place(temporary: Path, target: Path, *, overwrite: bool) -> None:
    if not overwrite or not target.exists():
        try:
            temporary.rename(target)  # onto anything but an empty directory this fails
        except OSError as error:
            raise ArtifactError(
                f"{target} appeared while it was being saved ({error}); it was left as it is."
            ) from error
        sync(target.parent)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            old.rename(target)
        raise
    sync(target.parent)
    try:
        shutil.rmtree(old)
    except OSError as error:  # the new one is in place: no reason to fail
        _log.warning("%s could not be deleted (%s): delete it yourself.", old, error)
