"""The model that a command leaves behind: where it goes, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.cli.console import say
from lit_prune.cli.options import add_target_directory

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lit_prune.cli.loading import Loaded


def add_saved(parser: ArgumentParser) -> None:
    """Add where a model goes, and in which format."""
    add_target_directory(parser, "the model")
    parser.add_argument(
        "--format", type=str, default="auto", help="auto, stock, heterogeneous, padded or gguf"
    )
    parser.add_argument(
        "--verify",
        type=bool,
        default=True,
        help="load it in a fresh process and compare, before it is put in place",
    )


def target_of(options: Namespace) -> Path:
    """Return where the model goes, before any work.

    Raises:
        ArtifactError: If it cannot be written there.
        ConfigError: If there is no such format, or what writes it is missing.
    """
    from lit_prune.saving import refuse_format, refuse_target

    target = Path(options.to)
    refuse_format(options.format)
    refuse_target(target, overwrite=options.overwrite)
    return target


def save(options: Namespace, loaded: Loaded, **more: Any) -> list[str]:
    """Save the model as the options say, with its tokenizer; return what to say of it.

    Args:
        options: Of the command line.
        loaded: The model, as it is now.
        **more: As for `lit_prune.save_pruned`.

    Raises:
        LitPruneError: As `lit_prune.save_pruned`.
    """
    from lit_prune.saving import save_pruned

    say(f"saving to {options.to}")
    save_pruned(
        loaded.model,
        options.to,
        format=options.format,
        tokenizer=loaded.tokenizer,
        overwrite=options.overwrite,
        verify=options.verify,
        **more,
    )
    notes = []
    if loaded.tokenizer is None:
        notes.append(f"note: {options.model} holds no tokenizer, and so {options.to} has none")
    now, stored = loaded.model.dtype, loaded.stored
    if stored is not None and now.itemsize > stored.itemsize:
        notes.append(
            f"note: saved in {now}, as it was loaded: {now.itemsize} bytes a number; "
            f"{options.model} is stored in {stored}, {stored.itemsize} bytes. lit-prune export "
            f"--dtype {str(stored).removeprefix('torch.')} rounds it to that"
        )
    return notes
