"""The commands and their help.

A command imports what it needs when it runs: torch and transformers take seconds, which nobody
waits for to read a help or to learn of a misspelled option.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, DefaultHelpFormatter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

# Name of each command, which is the name of its module, and what it does.
COMMANDS = {
    "prune": "make a model smaller and save it",
    "plan": "say what would be cut and what it would cost; write the plan, change nothing",
    "apply": "make the pruned model from a base model and a plan",
    "sweep": "many ratios from one calibration: table, curve, CSV, JSON",
    "compare": "several methods on one text: what each comes to",
    "evaluate": "perplexity, latency and size of a model, or of two side by side",
    "report": "show again what was cut and what it cost; as a page, too",
    "export": "save a model in another format: for transformers, for llama.cpp",
}
_WORDS = """Make a Hugging Face causal language model smaller and faster, and see what it costs.

  lit-prune prune --model my-model --text my-text.txt --to pruned --pruning_ratio 0.3
  lit-prune evaluate --model pruned --against my-model --text other-text.txt
  lit-prune export --model pruned --to pruned-gguf --format gguf

Each command explains itself: lit-prune prune --help. Options may stand in a YAML file instead
(--config request.yaml); --print_config writes one with all of them. --verbose, anywhere, shows the
traceback of an error."""


class _Help(DefaultHelpFormatter):
    """Help with line breaks where they were written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


def make_parser(words: Sequence[str]) -> tuple[ArgumentParser, ModuleType | None]:
    """Return the parser, and the module of the command that is asked for, if one is.

    Args:
        words: The command line.
    """
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = ArgumentParser(
        prog="lit-prune",
        usage="lit-prune COMMAND [options]",
        description=_WORDS,
        formatter_class=_Help,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subcommands(required=False, dest="command")
    module = None
    for name, summary in COMMANDS.items():
        command = ArgumentParser(formatter_class=_Help, exit_on_error=False)
        if name == chosen:
            module = importlib.import_module(f"lit_prune.cli.{name}")
            command.usage = f"lit-prune {name} {module.usage} [options]"
            command.description = module.__doc__
            command.add_argument("--config", action="config", help="YAML file with these options")
            module.add_options(command)
        commands.add_subcommand(name, command, help=summary)
    return parser, module


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("lit-prune")
    except PackageNotFoundError:
        found = "(not installed)"
    return f"lit-prune {found}, Python {sys.version.split()[0]}"
