"""Reference row ``sparsegpt_2_4``: two of every four weights are 0, the later ones make up for it.

Shapes stay; half of the linear weights of the decoder are zero. Nothing gets smaller or faster
without kernels for this pattern, and none are used here: a row to compare quality with, no more.

Column after column, all rows at once: what a column loses is made up for by the columns behind it,
by the update of optimal brain surgeon; which two of four go is decided when the first of them is
reached.

Deviations: float64, and columns one by one instead of in blocks of 128 (the same result).

References:
    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    ICML 2023, arXiv 2301.00774: algorithm 1, section 3.4 for 2:4, damping 1 % as in its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rivals.masks import by_layer, lowest_two_of_four

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet

DAMPING = 0.01


def masked_weight(weight: Tensor, second_moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the updated weight with its zeros, from the sum of ``x xᵀ`` over its inputs."""
    hessian, found = second_moment.clone(), weight.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    found[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    # row i of this factor is row i of the inverse of the Hessian without what lies before i, over
    # the root of its first element
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scale = factor.diagonal()
    for column in range(found.shape[1]):
        if column % 4 == 0:
            four = slice(column, column + 4)
            zero = lowest_two_of_four((found[:, four] / scale[four]).square())
        error = found[:, column].where(zero[:, column % 4], found.new_zeros(())) / scale[column]
        found[:, column:] -= error[:, None] * factor[column, column:]
        found[:, column].masked_fill_(zero[:, column % 4], 0.0)
    return found.to(weight.dtype)


@torch.no_grad()
def pruned(
    model: PreTrainedModel, rows: RowSet, ratio: float
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a copy with half of the decoder's linear weights zero, whatever ``ratio`` is."""
    del ratio
    return by_layer(model, rows, masked_weight)
