"""What the calibration text is called, where its data set knows."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset


def data_notes(loaders: Any) -> tuple[str, ...]:  # noqa: ANN401 - whatever a user iterates over
    """Return a note for each named data set: one of `datasets`, with its configuration and split.

    Args:
        loaders: A data loader, several, or anything else (then there is none).

    Example:
        >>> data_notes([[1, 2, 3]])
        ()
    """
    found: dict[str, None] = {}
    several = list(loaders.values()) if isinstance(loaders, dict) else loaders
    for loader in several if isinstance(several, list | tuple) else [several]:
        dataset = getattr(loader, "dataset", loader)
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        info = getattr(dataset, "info", None)
        name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
        if isinstance(name, str) and name:
            config, split = getattr(info, "config_name", None), getattr(dataset, "split", None)
            words = [name, f"({config})" if config else "", f"split {split}" if split else ""]
            found[f"calibration data: {' '.join(word for word in words if word)}"] = None
    return tuple(found)
