"""Fitting a projection anew to a target, on inputs that are not those it was trained on.

References:
    The dense-target form of layer-wise reconstruction: what GPTQ's heirs (GPTAQ, Qronos) do for
    quantisation behind an already quantised prefix. We differ: affine, ridged towards the original
    weights, from moments alone, the damping chosen on other text.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    weight: Tensor
    damping: float | None
    condition: float | None
    refused: bool


def affine_refit(
    covariance: Tensor, other: Tensor, weight: Tensor, dampings: Sequence[float]
) -> AffineRefit:
    """Choose the weights that bring ``W x`` nearest to a target ``t``, up to a constant.

    ``W' = W + (C_tx - W C_xx) (C_xx + lambda I)^-1``: ridge regression of the target on the inputs,
    towards ``W``. Each damping is judged by ``E ||t - W' x||^2`` on the other text, and so is ``W``
    itself. With moments about the means a constant that brings the mean right is the caller's; with
    moments about zero there is none.

    Args:
        covariance: Joint second moments of inputs and target, ``[kept + out, kept + out]``, about
            their means or about zero.
        other: The same on other text, about the same point.
        weight: ``W``, ``[out, kept]``.
        dampings: Fractions of the mean input variance to try.

    Raises:
        ScoreError: If shapes do not fit, or a value is not finite.

    Example:
        >>> joint = torch.tensor([[1.0, 2.0], [2.0, 4.0]])  # the target is twice the input
        >>> found = affine_refit(joint, joint, torch.tensor([[1.0]]), (1e-12,))
        >>> found.weight.round(decimals=4), found.damping
        (tensor([[2.]], dtype=torch.float64), 1e-12)
    """
    covariance, other = checked_covariance(covariance), checked_covariance(other)
    weight = checked_finite("weight", weight)
    out, kept = weight.shape
    for name, moments in (("covariance", covariance), ("other", other)):
        if len(moments) != kept + out:
            raise ScoreError(
                f"{name} is {list(moments.shape)}; expected [kept + out] twice, {kept} + {out}."
            )
    inputs = covariance[:kept, :kept]
    missing = covariance[kept:, :kept] - weight @ inputs  # covariance of what W does not say yet
    best, least, refused = AffineRefit(weight, None, None, False), _error(other, weight), False
    for damping in dampings:
        noisy = damped(inputs, damping)
        try:
            new = weight + torch.cholesky_solve(missing.T, factored(noisy)).T
        except ScoreError:  # ill-conditioned beyond float64: more damping, or the old weights
            refused = True
            continue
        error = _error(other, new)
        if error < least:
            least = error
            best = AffineRefit(new, damping, condition_bound(noisy, inputs), False)
    return AffineRefit(best.weight, best.damping, best.condition, refused)


def _error(moments: Tensor, weight: Tensor) -> float:
    """Return ``E ||t - W x||^2`` from the joint second moments; NaN never wins a comparison."""
    kept = weight.shape[1]
    inputs, cross, target = moments[:kept, :kept], moments[kept:, :kept], moments[kept:, kept:]
    explained = ((weight @ inputs) * weight).sum() - 2 * (weight * cross).sum()
    return float(target.diagonal().sum() + explained)
