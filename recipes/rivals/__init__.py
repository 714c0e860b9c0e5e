"""Rivals that are no presets: they keep shapes or change the residual stream, so only compared.

Each is one file with one function ``pruned(model, rows, ratio)``, which returns a pruned copy and
what should be known of it: ``achieved`` (fraction of decoder parameters removed) and ``notes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rivals import slicegpt, sparsegpt_2_4, wanda_2_4

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet

    Pruned = Callable[[PreTrainedModel, RowSet, float], tuple[PreTrainedModel, dict[str, Any]]]

RIVALS: dict[str, Pruned] = {
    "slicegpt": slicegpt.pruned,
    "sparsegpt_2_4": sparsegpt_2_4.pruned,
    "wanda_2_4": wanda_2_4.pruned,
}
# They zero half of the linear weights, whatever is asked: nothing is removed, nothing gets faster
# without kernels for it. They stand in the column of 50 %.
MASKED = {"sparsegpt_2_4": 0.5, "wanda_2_4": 0.5}

__all__ = ["MASKED", "RIVALS"]
