"""Show a pruned model, a plan or a run again: what was cut, what it cost, whether it is faster.

  lit-prune report --of pruned
  lit-prune report --of runs/lightning_logs/version_0/pruning --to report.html
  lit-prune report --of pruned --sweep sweep --to pruned/report.html --overwrite

The table goes to the screen, the page with pictures to --to. What is read is plan.json and
report.json; no model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lit_prune.cli.swept import add_sweep, points_of
from lit_prune.report import PruningReport
from lit_prune.whole_file import refuse_file, write_text

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

name, usage = "report", "--of DIRECTORY"


def add_options(parser: ArgumentParser) -> None:
    """Add what the command reads."""
    parser.add_argument(
        "--of",
        type=str,
        required=True,
        help="what prune, plan or save_pruned wrote, or pruning/ of a run",
    )
    parser.add_argument("--to", type=str | None, default=None, help="new file for the page (HTML)")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    add_sweep(parser)


def run(options: Namespace) -> None:
    """Read, print, write."""
    from lit_prune.saving.page import html_of_directory

    directory = Path(options.of)
    target = None if options.to is None else Path(options.to)
    if target is not None:
        refuse_file(target, overwrite=options.overwrite)
    page = html_of_directory(directory, sweep=points_of(options.sweep))
    if target is not None:
        write_text(target, page)
    print(PruningReport.from_json((directory / "report.json").read_text(encoding="utf-8")))
    if target is not None:
        print(f"\npage: {target}")
