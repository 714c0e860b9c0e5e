"""Reference row ``wanda_2_4``: of every four weights of a row, the two of least ``|W| ‖x‖`` are 0.

Shapes stay; half of the linear weights of the decoder are zero. Nothing gets smaller or faster
without kernels for this pattern, and none are used here: a row to compare quality with, no more.

Deviations: none known; layer by layer, on inputs behind the pruned prefix, as in its code.

References:
    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    arXiv 2306.11695.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rivals.masks import by_layer, lowest_two_of_four

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet


def masked_weight(weight: Tensor, second_moment: Tensor) -> Tensor:
    """Return the weight with its zeros, from the sum of ``x xᵀ`` over its inputs."""
    norm = second_moment.diagonal().sqrt()
    zero = lowest_two_of_four(weight.double().abs() * norm)
    return weight.masked_fill(zero, 0.0)


@torch.no_grad()
def pruned(
    model: PreTrainedModel, rows: RowSet, ratio: float
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a copy with half of the decoder's linear weights zero, whatever ``ratio`` is."""
    del ratio
    return by_layer(model, rows, masked_weight)
