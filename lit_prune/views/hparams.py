"""The request and what came of it, for TensorBoard's HPARAMS tab."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

# What the tab shows as results. The values are the scalars of the same tags.
METRICS = (
    "prune/achieved_ratio",
    "quality/perplexity/before",
    "quality/perplexity/after",
    "quality/mean_nll/after",
    "quality/accuracy/after",
    "cost/total_parameters/ratio",
    "cost/flops_per_token/ratio",
    "cost/weight_bytes/ratio",
    "cost/kv_cache_bytes_per_token/ratio",
    "cost/prefill_seconds/ratio",
    "cost/decode_seconds_per_token/ratio",
)
# The tab shows five options and sorts them by name, but those that "differ" come first.
_FIRST = {f"prune/{name}" for name in ("pruning_ratio", "preset", "budget")}


def log_request(
    loggers: Iterable[object],
    request: Mapping[str, object],
    of_module: object = None,
) -> None:
    """Write the request, as ``prune/<option>``, with the hyperparameters of the module.

    TensorBoard reads only the first hparams of a run, and Lightning writes the module's own
    (``save_hyperparameters``) right after ``setup``. Called in ``setup``, this shows both; called
    at the end, only a run whose module has none shows it. Later calls for a run change nothing.

    It lands in the run itself; `SummaryWriter.add_hparams` would open a second run beside it.

    Args:
        loggers: ``trainer.loggers``; all but TensorBoard's are passed over.
        request: `PruningConfig.to_dict`.
        of_module: Hyperparameters of the LightningModule; what is not a mapping is passed over.
    """
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_hparams") and hasattr(writer, "_get_file_writer"):
            file = writer._get_file_writer()
            if file is not None:  # None: the placeholder of a fast_dev_run
                _write(file, request, of_module if isinstance(of_module, Mapping) else {})


def _write(file: Any, request: Mapping[str, object], of_module: Mapping[str, object]) -> None:  # noqa: ANN401
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    options = {name: _primitive(value) for name, value in of_module.items()}
    options |= {f"prune/{name}": _primitive(value) for name, value in request.items()}
    experiment, *session = hparams(options, dict.fromkeys(METRICS, 0.0))  # the tab wants names only
    plugin = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in _FIRST
    plugin.content = content.SerializeToString()
    for summary in (experiment, *session):
        file.add_summary(summary)


def _primitive(value: object) -> bool | int | float | str:
    if isinstance(value, (bool, int, float, str)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
