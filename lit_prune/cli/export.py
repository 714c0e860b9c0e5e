"""Save a model, pruned or not, in another format.

  lit-prune export --model pruned --to pruned-gguf --format gguf
  lit-prune export --model pruned --to pruned-padded --format padded

stock: plain transformers, vLLM and the like; needs layers that are alike.
heterogeneous: transformers with lit_prune, or with trust_remote_code; every layer its own size.
padded: as stock, for any plan, at the cost of the zeros that are put back.
gguf: one file for llama.cpp; needs pip install 'lit-prune[gguf]'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.cli.console import quiet_down
from lit_prune.cli.options import add_model
from lit_prune.cli.saved import add_saved, save, target_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

name, usage = "export", "--model MODEL --to DIRECTORY --format FORMAT"


def add_options(parser: ArgumentParser) -> None:
    """Add what the command reads."""
    add_model(parser)
    add_saved(parser)


def run(options: Namespace) -> None:
    """Load, and save."""
    from lit_prune.cli.loading import load

    quiet_down()
    target = target_of(options)
    loaded = load(options.model, dtype=options.dtype, device=options.device)
    notes = save(options, loaded)
    files = sorted(target.iterdir())
    size = sum(file.stat().st_size for file in files)
    named = ", ".join(file.name for file in files)
    print(f"saved: {target} ({size / 1e6:.1f} MB: {named})", *notes, sep="\n")
