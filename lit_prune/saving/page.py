"""``report.html`` made again, from the files of a saved model or of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.errors import ArtifactError
from lit_prune.plan import PruningPlan
from lit_prune.report import PruningReport
from lit_prune.saving.files import inside, parse_json, read_json, read_text
from lit_prune.saving.load import PLAN, REPORT
from lit_prune.saving.manifest import MANIFEST
from lit_prune.views.html import page_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_prune.sweep import SweepPoint


def html_of_directory(directory: str | Path, *, sweep: Sequence[SweepPoint] = ()) -> str:
    """Return the page about a directory that holds ``plan.json`` and ``report.json``.

    That is what `save_pruned` writes, or ``pruning/`` of a run. Only these two are read, and of a
    saved model its manifest, for how to load it.

    Args:
        directory: Where they lie.
        sweep: Where a sweep was run, its points.

    Raises:
        ArtifactError: If one of them is missing, or not what lit_prune writes; says which.
        PlanMismatchError: If plan and report do not belong together.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(
            f"{directory} is not a directory; pass what save_pruned returned, or pruning/ of a run."
        )
    missing = [name for name in (PLAN, REPORT) if not (directory / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{directory} has no {' and no '.join(missing)}: there is nothing to tell of. They are "
            "written by save_pruned where the model was pruned by lit_prune, and by the callback "
            "into pruning/ of its run."
        )
    plan = PruningPlan.load(inside(directory, PLAN))
    text = read_text(inside(directory, REPORT))
    parse_json(text, directory / REPORT)
    report = PruningReport.from_json(text)
    name = directory.resolve().name
    try:
        return page_of(report, plan, name=name, sweep=sweep, load=_ways(directory))
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        # a value of another kind than lit_prune writes, somewhere inside
        raise ArtifactError(f"{directory / REPORT} cannot be shown: {error!r:.200}.") from error


def _ways(directory: Path) -> list[tuple[str, list[str]]]:
    if not (directory / MANIFEST).is_file():
        return []
    architecture: Any = read_json(inside(directory, MANIFEST)).get("architecture")
    found = architecture.get("load", []) if isinstance(architecture, dict) else []
    return [(str(words), [str(line) for line in lines]) for words, lines in found]
