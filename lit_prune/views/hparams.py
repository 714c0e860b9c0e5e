"""The request and what came of it, for TensorBoard's HPARAMS tab."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_prune.report import PruningReport

_log = logging.getLogger(__name__)


def write_hparams(
    writer: Any,  # noqa: ANN401 - a SummaryWriter, or something that looks like it
    report: PruningReport,
    scalars: Mapping[str, float],
    of_module: object,
    step: int,
) -> None:
    """Write the request as ``prune/<option>``, with achieved ratio, qualities and costs as metrics.

    It lands in the run itself; `SummaryWriter.add_hparams` would open a second run beside it.
    TensorBoard reads only the first hparams of a run: where the module's own were written when training
    began (``save_hyperparameters``), the tab goes on showing those, and a notice says so.

    Args:
        writer: ``experiment`` of a TensorBoard logger.
        report: Its config is the request.
        scalars: What was logged as scalars; the metrics point to these tags.
        of_module: ``hparams`` of the logger: the module's own, shown beside ours where they are plain.
        step: Global step of the trainer.
    """
    from torch.utils.tensorboard.summary import hparams

    file = writer._get_file_writer() if hasattr(writer, "_get_file_writer") else None
    if file is None:  # the placeholder of a fast_dev_run
        return
    theirs = of_module if isinstance(of_module, dict) else {}
    if theirs:
        _log.info("HPARAMS shows what the module saved first; the request is in plan/json")
    plain = {str(k): v for k, v in theirs.items() if isinstance(v, (bool, int, float, str))}
    own = {f"prune/{name}": _primitive(value) for name, value in report.config.items()}
    metrics = {tag: value for tag, value in scalars.items() if _is_final(tag)}
    for summary in hparams({**plain, **own}, metrics):
        file.add_summary(summary, step)


def _is_final(tag: str) -> bool:
    place, last = tag.split("/")[0], tag.split("/")[-1]
    return tag == "prune/achieved_ratio" or (place, last) in (
        ("quality", "after"),
        ("cost", "ratio"),
    )


def _primitive(value: object) -> bool | int | float | str:
    if isinstance(value, (bool, int, float, str)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
