"""The points of a sweep, read back from what `lit-prune sweep` wrote: for the curve on a page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lit_prune.errors import ArtifactError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from lit_prune.sweep import SweepPoint

SWEEP = "sweep.json"


def add_sweep(parser: ArgumentParser) -> None:
    """Add which sweep, if any, to show."""
    parser.add_argument(
        "--sweep",
        type=str | None,
        default=None,
        help="what `lit-prune sweep` wrote: its curve goes into report.html",
    )


def points_of(directory: str | None) -> tuple[SweepPoint, ...]:
    """Return what a sweep measured, the dense model first; nothing where no sweep is named.

    Raises:
        ArtifactError: If there is no sweep, or the file is not what ``sweep`` writes.
    """
    if directory is None:
        return ()
    from lit_prune.sweep import SweepPoint

    file = Path(directory) / SWEEP
    if not file.is_file():
        raise ArtifactError(f"{file}: there is no such file. `lit-prune sweep --to` writes it.")
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        nll = float(whole["dense_nll"])
        dense = SweepPoint(0.0, 0.0, mean_nll=nll, dense_nll=nll)
        points = [
            SweepPoint(
                requested=float(row["requested"]),
                achieved=row["achieved"],
                predicted_damage=row["predicted_damage"],
                mean_nll=None if row["perplexity"] is None else math.log(row["perplexity"]),
                dense_nll=nll,
                note=str(row["note"]),
                budget=row["budget"],
            )
            for row in whole["points"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is not what `lit-prune sweep` writes: {error!r}.") from error
    return (dense, *points)
