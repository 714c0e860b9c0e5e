"""Size of activations, from their moments: the usual rival of their entropy."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_prune.errors import ScoreError


def unit_magnitude(
    mean: Tensor,
    variance: Tensor,
    unit_width: int,
    *,
    floor: float = 1e-6,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Logarithm of the root mean square of each unit's activations.

    ``M_j = log(sqrt(E[x_j^2]) + floor)``, ``E[x^2] = mean^2 + variance``. A channel of mean 0 has
    its entropy less a constant; one that is large and constant is large here and carries nothing
    there.

    Args:
        mean: Mean of the projection's input, ``[units * unit_width]``.
        variance: Its variance, ``[units * unit_width]``.
        unit_width: Columns that one unit owns.
        floor: Added before the logarithm (activation units).
        reduction: ``sum`` or ``mean`` over the unit's channels.

    Returns:
        Magnitude, ``[units]``, float64.

    Raises:
        ScoreError: If a moment is not finite, or the number of channels no multiple of
            ``unit_width``.

    Example:
        >>> unit_magnitude(torch.tensor([3.0, 0.0]), torch.tensor([16.0, 1.0]), 1).round(decimals=4)
        tensor([1.6094, 0.0000], dtype=torch.float64)
    """
    if mean.ndim != 1 or mean.shape != variance.shape or mean.numel() % unit_width:
        raise ScoreError(
            f"mean and variance have shapes {list(mean.shape)} and {list(variance.shape)}; "
            f"expected [units * {unit_width}] both."
        )
    square = mean.double().square() + variance.double()
    invalid = ~torch.isfinite(square) | (variance < 0)
    if invalid.any():
        channel = int(invalid.nonzero()[0])
        raise ScoreError(
            f"channel {channel} has mean {mean[channel].item()} and variance "
            f"{variance[channel].item()}; expected finite, and a variance >= 0."
        )
    per_unit = torch.log(square.sqrt() + floor).reshape(-1, unit_width)
    return per_unit.sum(-1) if reduction == "sum" else per_unit.mean(-1)
