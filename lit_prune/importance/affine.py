"""Fitting a projection anew to a target, on inputs that are not those it was trained on.

References:
    The dense-target form of layer-wise reconstruction: what GPTQ's heirs (GPTAQ, Qronos) do for
    quantisation behind an already quantised prefix. We differ: affine, ridged towards the original
    weights, from moments alone, the damping chosen on other text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_prune.errors import ScoreError
from lit_prune.importance.columns import checked_covariance, checked_finite, factored
from lit_prune.importance.conditional import condition_bound, damped

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class AffineRefit:
    """The choice for one projection.

    Attributes:
        weight: New weights, ``[out, kept]``, float64; the old ones where nothing was better.
        damping: The damping that won on the other text; None: the old weights did.
        condition: Bound on the condition number of the system that was solved.
        refused: Whether the system could not be solved at some damping.
        error: ``E ||t - W x||^2`` on the other text, less the part of ``t`` alone: of two refits to
            one target, the one of less is better.
    """

    weight: Tensor
    damping: float | None
    condition: float | None
    refused: bool
    error: float


def affine_refit(
    moments: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    weight: Tensor,
    dampings: Sequence[float],
) -> AffineRefit:
    """Choose the weights that bring ``W x`` nearest to a target ``t``, up to a constant.

    ``W' = W + (C_tx - W C_xx) (C_xx + lambda I)^-1``: ridge regression of the target on the inputs,
    towards ``W``. Each damping is judged by ``E ||t - W' x||^2`` on the other text, and so is ``W``
    itself. With moments about the means a constant that brings the mean right is the caller's; with
    moments about zero there is none.

    Args:
        moments: Second moments of the inputs, ``[kept, kept]``, and of the target with them,
            ``[out, kept]``, about their means or about zero.
        other: The same on other text, about the same point.
        weight: ``W``, ``[out, kept]``.
        dampings: Fractions of the mean input variance to try.

    Raises:
        ScoreError: If shapes do not fit, or a value is not finite.

    Example:
        >>> twice = torch.tensor([[1.0]]), torch.tensor([[2.0]])  # the target is twice the input
        >>> found = affine_refit(twice, twice, torch.tensor([[1.0]]), (1e-12,))
        >>> found.weight.round(decimals=4), found.damping
        (tensor([[2.]], dtype=torch.float64), 1e-12)
    """
    weight = checked_finite("weight", weight)
    inputs, cross = _checked("moments", moments, weight)
    held_out = _checked("other", other, weight)
    missing = cross - weight @ inputs  # covariance of what W does not say yet
    least, refused = _error(*held_out, weight), False
    best = AffineRefit(weight, None, None, False, least)
    for damping in dampings:
        noisy = damped(inputs, damping)
        try:
            new = weight + torch.cholesky_solve(missing.T, factored(noisy)).T
        except ScoreError:  # ill-conditioned beyond float64: more damping, or the old weights
            refused = True
            continue
        error = _error(*held_out, new)
        if error < least:
            least = error
            best = AffineRefit(new, damping, condition_bound(noisy, inputs), False, error)
    return replace(best, refused=refused)


def _checked(name: str, moments: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    inputs, cross = checked_covariance(moments[0]), checked_finite(f"{name}[1]", moments[1])
    if cross.shape != weight.shape or len(inputs) != weight.shape[1]:
        raise ScoreError(
            f"{name} are {list(inputs.shape)} and {list(cross.shape)}; expected [kept, kept] and "
            f"[out, kept], of a weight {list(weight.shape)}."
        )
    return inputs, cross


def _error(inputs: Tensor, cross: Tensor, weight: Tensor) -> float:
    """Return ``E ||t - W x||^2`` less the part of ``t`` alone; NaN never wins a comparison."""
    return float(((weight @ inputs) * weight).sum() - 2 * (weight * cross).sum())
