"""What a unit writes that the units which stay cannot tell: conditional entropy and mean.

An output projection reads ``x`` with covariance ``S [n, n]`` and writes ``W x``, ``W [out, n]`` as
in `torch.nn.Linear.weight`. Units own ``unit_width`` neighbouring columns each. ``C`` is the
*damped* covariance ``S + lambda * I``, as if every input carried independent noise of variance
``lambda``. Everything is computed in float64, on the device of the arguments.

References:
    Hassibi & Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS
    1992 (published 1993): score and update. Kurtic et al., "ZipLM", NeurIPS 2023, and Meng et al.,
    "OSSCAR", ICML 2024: the same for groups of columns. GRAIL, arXiv 2602.23795: least squares from
    the Gram matrix. We differ: moments are about the mean (the rest is a bias), the ridge pulls
    towards the original weights instead of zero (nothing cut, nothing changed), and the score is
    read as a conditional entropy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_prune.errors import ScoreError
from lit_prune.importance.columns import (
    checked,
    checked_columns,
    checked_covariance,
    checked_finite,
    factored,
    gram_blocks,
    own_blocks,
    solved,
    unit_damage,
)

# Stands in for no variance at all; its inverse, and the square of that, are finite.
_TINY = 1e-30


def damped(covariance: Tensor, damping: float) -> Tensor:
    """Add independent noise to every input: ``S + damping * mean(diag S) * I``.

    Args:
        covariance: ``S``, ``[n, n]``, symmetric (squared activation units).
        damping: Noise variance as a fraction of the mean variance, finite and >= 0.

    Returns:
        ``C``, ``[n, n]``, float64. Inputs that are all constant get a tiny variance, so that
        everything downstream is finite.

    Raises:
        ScoreError: If the covariance is not square or not finite, or the damping invalid.

    Example:
        >>> damped(torch.diag(torch.tensor([1.0, 3.0])), 0.5)
        tensor([[2., 0.],
                [0., 4.]], dtype=torch.float64)
    """
    if not 0.0 <= damping < math.inf:  # also false for NaN
        raise ScoreError(f"damping is {damping}; expected finite and >= 0, such as 0.01.")
    added = checked_covariance(covariance).clone()
    diagonal = added.diagonal()
    diagonal += (damping * diagonal.mean()).clamp_min(_TINY)
    return added


def condition_bound(noisy: Tensor, covariance: Tensor) -> float:
    """Bound the condition number of ``C = S + lambda * I`` from above, without a spectrum.

    The largest row sum, which no eigenvalue exceeds, over ``lambda``, which none falls below.

    Args:
        noisy: ``C``, ``[n, n]``, from `damped`.
        covariance: ``S``, what was damped.

    Example:
        >>> covariance = torch.diag(torch.tensor([1.0, 3.0]))
        >>> condition_bound(damped(covariance, 0.5), covariance)
        4.0
    """
    added = float((noisy.diagonal() - covariance.diagonal().double()).min())
    return float(noisy.abs().sum(1).max()) / added


def conditional_entropy(
    covariance: Tensor, weight: Tensor, unit_width: int = 1, *, floor: float = _TINY
) -> Tensor:
    """Entropy of what each unit writes, given all other units, in nats.

    ``0.5 * log(2 * pi * e * ||w_j||^2 / (C^-1)_jj)`` for one column: ``1 / (C^-1)_jj`` is the
    variance that the other inputs leave unexplained. For a group of columns
    ``tr(W_g [(C^-1)_gg]^-1 W_g^T)``, their expected squared output, takes its place.

    Args:
        covariance: ``C``, ``[n, n]``, positive definite.
        weight: ``W``, ``[out, n]``.
        unit_width: Columns that one unit owns.
        floor: Least variance inside the logarithm: a unit without weight ranks low and finite.

    Returns:
        ``[units]``, float64.

    Raises:
        ScoreError: If shapes do not fit, a value is not finite, or ``C`` not positive definite.

    Example:
        >>> covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
        >>> conditional_entropy(covariance, torch.eye(2)).round(decimals=4)
        tensor([0.9081, 0.9081], dtype=torch.float64)
        >>> conditional_entropy(torch.eye(2), torch.eye(2)).round(decimals=4)
        tensor([1.4189, 1.4189], dtype=torch.float64)
    """
    covariance, weight = checked(covariance, weight, unit_width)
    inverse = torch.cholesky_inverse(factored(covariance))
    variance = unit_damage(own_blocks(inverse, unit_width), gram_blocks(weight, weight, unit_width))
    return 0.5 * torch.log(2 * math.pi * math.e * variance.clamp_min(floor))


def conditional_mean(covariance: Tensor, weight: Tensor, kept_columns: Tensor) -> Tensor:
    """Weights of the kept columns that also write the conditional mean of the cut ones.

    ``W'_k = W_k + W_c C_ck C_kk^-1``: ridge regression towards the original weights. Exactly
    ``W_k`` if all columns are kept; with infinite damping only the mean is left to compensate.

    Args:
        covariance: ``C``, ``[n, n]``, positive definite.
        weight: ``W``, ``[out, n]``.
        kept_columns: Ascending column indices, ``[kept]``, integers.

    Returns:
        ``[out, kept]``, float64.

    Raises:
        ScoreError: If shapes or columns do not fit, a value is not finite, or ``C`` is not positive
            definite.

    Example:
        >>> covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
        >>> conditional_mean(covariance, torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
        tensor([[2.6000]], dtype=torch.float64)
    """
    covariance, weight = checked(covariance, weight)
    kept_columns = checked_columns(kept_columns, weight)
    if len(kept_columns) in (0, weight.shape[1]):
        return weight[:, kept_columns]
    new, _ = solved(covariance, weight, kept_columns)
    if not bool(torch.isfinite(new).all()):
        raise ScoreError(
            "the compensated weights are not finite: the covariance is too ill-conditioned. Raise "
            "the damping, or calibrate on more tokens."
        )
    return new


def output_error(
    covariance: Tensor, weight: Tensor, new_weight: Tensor, kept_columns: Tensor
) -> float:
    """Expected squared output error of compensated weights: ``tr(D S D^T)``, ``D`` their change.

    Args:
        covariance: Any covariance, ``[n, n]``: of other text for a held-out error, undamped for the
            error without the noise.
        weight: ``W``, ``[out, n]``.
        new_weight: ``W'_k``, ``[out, kept]``.
        kept_columns: Ascending column indices, ``[kept]``, integers.

    Returns:
        Per token, summed over the outputs (squared output units).

    Raises:
        ScoreError: If shapes or columns do not fit, or a value is not finite.

    Example:
        >>> covariance, kept = torch.tensor([[1.0, 0.8], [0.8, 1.0]]), torch.tensor([0])
        >>> weight = torch.tensor([[1.0, 2.0]])
        >>> new = conditional_mean(covariance, weight, kept)
        >>> round(output_error(covariance, weight, new, kept), 4)
        1.44
    """
    covariance, weight = checked(covariance, weight)
    kept_columns = checked_columns(kept_columns, weight)
    if new_weight.shape != (len(weight), len(kept_columns)):
        raise ScoreError(
            f"new_weight has shape {list(new_weight.shape)}; expected [out, kept] = "
            f"[{len(weight)}, {len(kept_columns)}]."
        )
    change = weight.clone()
    change[:, kept_columns] -= checked_finite("new_weight", new_weight)
    return max(float(((change @ covariance) * change).sum()), 0.0)
