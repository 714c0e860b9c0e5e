"""Parse, run, and end every error in one line with its remedy."""

from __future__ import annotations

import contextlib
import sys
import traceback
from typing import TYPE_CHECKING

from lit_prune.cli.parser import make_parser
from lit_prune.cli.wording import plainly
from lit_prune.errors import ConfigError, LitPruneError

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE, FAILED, INTERRUPTED = 2, 1, 130


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status.

    Args:
        arguments: What follows ``lit-prune``; by default of this process.
    """
    from jsonargparse import ArgumentError

    words = list(sys.argv[1:] if arguments is None else arguments)
    verbose = "--verbose" in words
    words = [_spelled(word) for word in words if word != "--verbose"]
    command = None
    try:
        parser, command = make_parser(words)
        namespace = parser.parse_args(words)
        if command is None:
            parser.print_help()
            return 0
        options = namespace[command.name]
        if empty := [name for name, value in vars(options).items() if value == ""]:
            # the empty path is the folder that one is in: nobody means that
            raise ConfigError(f"--{empty[0]} is empty; is it of a variable that is not set?")
        command.run(options)
    except ArgumentError as error:
        text = plainly(str(error), None if command is None else command.name)
        return _refused(text, USAGE, verbose=verbose)
    except ConfigError as error:
        return _refused(str(error), USAGE, verbose=verbose)
    except (LitPruneError, OSError) as error:
        return _refused(str(error), FAILED, verbose=verbose)
    except KeyboardInterrupt:
        return _refused("interrupted: nothing was written.", INTERRUPTED, verbose=False)
    except SystemExit as end:  # --help, --print_config
        return end.code if isinstance(end.code, int) else FAILED
    except Exception as error:  # what is left is ours: say so, in one line too
        words_of_it = f"{type(error).__name__}: {error}. This should not happen"
        hint = "" if verbose else "; run it again with --verbose, and report what it prints"
        return _refused(f"{words_of_it}{hint}.", FAILED, verbose=verbose)
    return 0


def _refused(text: str, status: int, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    # the library speaks of arguments of functions
    line = " ".join(text.split()).replace("Pass overwrite=True", "Pass --overwrite")
    with contextlib.suppress(BrokenPipeError):
        print(f"lit-prune: error: {line}", file=sys.stderr)
    return status


def _spelled(word: str) -> str:
    """Return ``--pruning-ratio`` as ``--pruning_ratio``, which config files say, too."""
    name, equals, value = word.partition("=")
    return (
        name.replace("-", "_").replace("__", "--", 1) + equals + value if name[:2] == "--" else word
    )
