"""The files that a run leaves in ``pruning/`` beside its logs, each whole or not at all."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from safetensors import SafetensorError

from lit_prune.errors import ArtifactError
from lit_prune.running.loops import is_rehearsal
from lit_prune.views.html import REPORT_PAGE, page_of
from lit_prune.whole_file import in_the_way, whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lightning.pytorch import Trainer

    from lit_prune.calibration import Calibration
    from lit_prune.plan import PruningPlan
    from lit_prune.planning import Planned
    from lit_prune.report import PruningReport

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Artifacts:
    """Where a run's files go.

    Attributes:
        folder: ``pruning/`` in the run's folder; None where no files are left: a ``fast_dev_run``,
            a ``barebones`` Trainer, ranks other than zero.
    """

    folder: Path | None

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """Find the folder; call it on every rank, before the run starts.

        Nothing stays written for that.

        Raises:
            ArtifactError: If it could not be written to. Names what is in the way.
        """
        root = trainer.log_dir or trainer.default_root_dir  # Lightning broadcasts it: on every rank
        if is_rehearsal(trainer) or trainer.barebones or not trainer.is_global_zero:
            return cls(None)
        folder = Path(root) / "pruning"
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
        if (what := in_the_way(there)) is not None:
            raise ArtifactError(
                f"calibration, plan and report go to {folder}, and {there} {what}. Make it "
                "writable, or give the Trainer another default_root_dir (or its logger another "
                "save_dir)."
            )
        return cls(folder)

    def inside(self, name: str) -> Self:
        """Return where the files of one stage go."""
        return type(self)(None if self.folder is None else self.folder / name)

    def whole_plan(self, plan: PruningPlan) -> None:
        """Write what several stages come to. A failure is a warning: it travels on the model."""
        with _told():
            self._write({"plan.json": partial(_save_text, plan.to_json())})

    def calibration(self, calibration: Calibration) -> None:
        """Write what a validation has left. A failure is a warning: the training goes on."""
        with _told():
            self._write({"calibration.safetensors": calibration.save})

    def plan(self, calibration: Calibration, planned: Planned) -> None:
        """Write what was decided, before anything is cut.

        Raises:
            ArtifactError: If a file cannot be written; says what is where it was.
        """
        files: dict[str, Callable[[Path], None]] = {
            "calibration.safetensors": calibration.save,
            "plan.json": partial(_save_text, planned.plan.to_json()),
        }
        if planned.compensation is not None:
            files["compensation.safetensors"] = planned.compensation.save
        self._write(files)

    def report(self, report: PruningReport, plan: PruningPlan) -> None:
        """Write the report as JSON and as a page, whole or not at all.

        A failure is a warning: the model is pruned, the report in hand.
        """
        with _told():
            self._write(
                {
                    "report.json": partial(_save_text, report.to_json()),
                    REPORT_PAGE: lambda path: _save_text(page_of(report, plan), path),
                }
            )

    def _write(self, files: Mapping[str, Callable[[Path], None]]) -> None:
        if self.folder is None:
            return
        for name, save in files.items():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save(self.folder / name)
            except (OSError, SafetensorError) as error:
                raise ArtifactError(
                    f"{self.folder / name} could not be written: {error}. A file that was there "
                    "before is whole. Is the disk full?"
                ) from error


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        _log.warning("%s", error)


def _save_text(text: str, path: Path) -> None:
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")
