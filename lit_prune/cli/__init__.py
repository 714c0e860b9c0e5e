"""The shell: ``lit-prune``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lit-prune``; see `lit_prune.cli.run`.

    Args:
        arguments: What follows the command; by default of this process.

    Returns:
        The exit status: 0, 2 where what was asked cannot be meant, else 1.
    """
    from lit_prune.cli.run import run

    return run(arguments)
