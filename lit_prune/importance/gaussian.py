"""Entropy of Gaussian activations, from their moments."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_prune.errors import ScoreError

Estimator = Literal["logstd_sum", "std_sum", "logdet"]


def channel_entropy(variance: Tensor, *, floor: float = 1e-6) -> Tensor:
    """Differential entropy of each channel under a Gaussian assumption, in nats.

    ``H_j = log(sigma_j + floor) + 0.5 * log(2 * pi * e)``. A constant channel has no density: the
    floor makes its entropy low, finite and equal on every device.

    Args:
        variance: Variance of each channel, ``[..., channels]``, finite and non-negative.
        floor: Added to the standard deviation before the logarithm (activation units).

    Returns:
        Entropy in nats, ``[..., channels]``, float64.

    Raises:
        ScoreError: If a variance is negative, NaN or infinite; names the first such position.

    Example:
        >>> channel_entropy(torch.tensor([1.0, 4.0])).round(decimals=4)
        tensor([1.4189, 2.1121], dtype=torch.float64)

    References:
        Yang et al., "Let LLM Tell What to Prune and How Much to Prune", ICML 2025, Eq. 3. Their
        exact floor is not published; 1e-6 is our reconstruction.
    """
    _refuse_invalid(variance)
    return torch.log(variance.double().sqrt() + floor) + 0.5 * math.log(2 * math.pi * math.e)


def state_entropy(
    moments: Tensor, *, estimator: Estimator = "logstd_sum", floor: float = 1e-6
) -> Tensor:
    """Entropy of a hidden state, from the second moments of its channels.

    ``logstd_sum`` is the sum of `channel_entropy` (independent channels); ``std_sum`` the sum of
    the standard deviations (what the first author's later code uses; not in nats); ``logdet`` the
    joint Gaussian entropy ``0.5 * log det(2 * pi * e * (Sigma + floor^2 * I))``.

    Args:
        moments: Variances ``[..., channels]``, or for ``logdet`` covariances ``[..., channels,
            channels]``.
        estimator: Which of the three forms. The published text does not settle it: the default is
            our reconstruction from the authors' earlier code.
        floor: As in `channel_entropy`.

    Returns:
        Entropy, ``[...]``, float64 (nats; activation units for ``std_sum``).

    Raises:
        ScoreError: If a moment is not finite, or a variance negative.

    Example:
        >>> state_entropy(torch.tensor([[1.0, 4.0]])).round(decimals=4)
        tensor([3.5310], dtype=torch.float64)
        >>> covariance = torch.diag(torch.tensor([1.0, 4.0]))
        >>> state_entropy(covariance, estimator="logdet").round(decimals=4)
        tensor(3.5310, dtype=torch.float64)
    """
    if estimator == "logstd_sum":
        return channel_entropy(moments, floor=floor).sum(-1)
    if estimator == "std_sum":
        _refuse_invalid(moments)
        return moments.double().sqrt().sum(-1)
    _refuse_invalid(moments.diagonal(dim1=-2, dim2=-1))
    if not bool(torch.isfinite(moments).all()):
        where = tuple(int(i) for i in (~torch.isfinite(moments)).nonzero()[0])
        raise ScoreError(f"covariance at {where} is {moments[where].item()}; expected finite.")
    channels = moments.shape[-1]
    damped = moments.double() + floor**2 * torch.eye(
        channels, dtype=torch.float64, device=moments.device
    )
    # eigenvalues rather than Cholesky: a rank-deficient covariance (fewer tokens than channels)
    # stays finite
    spectrum = torch.linalg.eigvalsh(damped).clamp_min(floor**2)
    entropy: Tensor = 0.5 * (spectrum.log().sum(-1) + channels * math.log(2 * math.pi * math.e))
    return entropy


def unit_entropy(
    variance: Tensor,
    unit_width: int,
    *,
    floor: float = 1e-6,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Entropy of each unit: of the channels that it feeds into the output projection.

    The channels are taken as independent.

    Args:
        variance: Variance of the projection's input, ``[units * unit_width]``.
        unit_width: Columns that one unit owns (1 for an MLP channel, query heads x head_dim for a
            KV group).
        floor: As in `channel_entropy`.
        reduction: ``sum`` or ``mean`` over the unit's channels. For units of equal width both rank
            alike.

    Returns:
        Entropy in nats, ``[units]``, float64.

    Raises:
        ScoreError: If a variance is invalid, or their number is no multiple of ``unit_width``.

    Example:
        >>> unit_entropy(torch.tensor([1.0, 1.0, 4.0, 4.0]), 2).round(decimals=4)
        tensor([2.8379, 4.2242], dtype=torch.float64)
    """
    if variance.ndim != 1 or variance.numel() % unit_width:
        raise ScoreError(
            f"variance has shape {list(variance.shape)}; expected [units * {unit_width}]."
        )
    per_unit = channel_entropy(variance, floor=floor).reshape(-1, unit_width)
    return per_unit.sum(-1) if reduction == "sum" else per_unit.mean(-1)


def transfer_entropy(full: Tensor, bypassed: Tensor) -> Tensor:
    """How much the output's entropy changes when a unit is bypassed, in nats.

    ``TE_u = |H(F_out) - H(F_out | u bypassed)|``: the operational form of the authors' earlier
    code; the exact typography of the paper's Eqs. 1-2 is reconstructed.

    Args:
        full: Entropy of the final hidden state of the whole model, scalar.
        bypassed: The same with each unit bypassed, ``[units]``; NaN where there is no such unit.

    Returns:
        Transfer entropy, ``[units]``, float64, NaN where ``bypassed`` is.

    Example:
        >>> transfer_entropy(torch.tensor(3.0), torch.tensor([2.5, 4.0]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    return (full.double() - bypassed.double()).abs()


def _refuse_invalid(variance: Tensor) -> None:
    invalid = ~torch.isfinite(variance) | (variance < 0)
    if invalid.any():
        where = tuple(int(i) for i in invalid.nonzero()[0])
        raise ScoreError(
            f"variance at {where} is {variance[where].item()}; expected finite and >= 0."
        )
