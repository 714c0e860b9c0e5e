"""What goes to the terminal: results to stdout, what happens to stderr if somebody looks."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def watched() -> bool:
    """Whether somebody looks: stderr is a terminal."""
    return sys.stderr.isatty()


def say(words: str) -> None:
    """Say what happens now, to who looks."""
    if watched():
        print(f"lit-prune: {words}", file=sys.stderr)


def quiet_down() -> None:
    """Leave the terminal to us: no loading bars, no advice of the libraries underneath."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.getLogger("lit_prune").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not watched():
        from datasets import disable_progress_bars

        disable_progress_bars()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows, the first one the header: the first column left, the others right.

    Example:
        >>> print(table([["ratio", "perplexity"], ["0.3", "12.1"]]))
        ratio  perplexity
        0.3          12.1
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)
