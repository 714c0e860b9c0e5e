"""Columns of an output projection: blocks that units own, least squares, and what is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.errors import ScoreError


def unit_damage(own: Tensor, gram: Tensor) -> Tensor:
    """What the loss of each unit alone would cost: ``tr(gram_i own_i^-1)``, ``[units]``, never < 0.

    ``own`` are the units' blocks of ``C^-1``, ``gram`` those of ``W^T W``, each ``[units, width,
    width]``.
    """
    if own.shape[-1] == 1:
        return (gram / own).reshape(-1).clamp_min(0)
    solved = torch.cholesky_solve(gram, torch.linalg.cholesky_ex(own).L)
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)


def own_blocks(matrix: Tensor, width: int) -> Tensor:
    """Diagonal blocks of ``[n, n]``, as ``[units, width, width]``."""
    units = len(matrix) // width
    blocks = matrix.reshape(units, width, units, width).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).clone()


def gram_blocks(left: Tensor, right: Tensor, width: int) -> Tensor:
    """Diagonal blocks of ``left^T right``, both ``[k, n]``, as ``[units, width, width]``."""
    if width == 1:
        return (left * right).sum(0).reshape(-1, 1, 1)
    by_unit = (x.T.reshape(-1, width, len(x)) for x in (left, right))
    return next(by_unit) @ next(by_unit).mT


def columns_of(units: Tensor, width: int) -> Tensor:
    """Columns that units own: ``[k]`` to ``[k * width]``."""
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).reshape(-1)


def solved(covariance: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return compensated weights ``[out, kept]`` and the Cholesky factor of ``C_kk``."""
    cut = torch.ones(len(covariance), dtype=torch.bool, device=covariance.device)
    cut[kept] = False
    factor = factored(covariance[kept][:, kept])
    shared = covariance[kept][:, cut] @ weight[:, cut].T
    new = weight[:, kept] + torch.cholesky_solve(shared, factor).T
    return new, factor


def factored(covariance: Tensor) -> Tensor:
    """Lower Cholesky factor, or a `ScoreError` with the remedy."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise ScoreError(
            f"the covariance of {len(covariance)} columns is not positive definite (leading minor "
            f"{int(failed)}): too few tokens, or duplicated inputs. Raise damping (0.01, say)."
        )
    return factor


def checked(covariance: Tensor, weight: Tensor, unit_width: int = 1) -> tuple[Tensor, Tensor]:
    """Both in float64; `ScoreError` where they do not fit each other or the units."""
    covariance = checked_covariance(covariance)
    width = len(covariance)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ScoreError(
            f"weight has shape {list(weight.shape)}; expected [out, {width}], as the covariance is "
            f"[{width}, {width}]."
        )
    if unit_width < 1 or width % unit_width:
        raise ScoreError(f"{width} columns are no multiple of unit_width {unit_width}.")
    if weight.device != covariance.device:
        raise ScoreError(
            f"covariance is on {covariance.device}, weight on {weight.device}; move one of them."
        )
    return covariance, checked_finite("weight", weight)


def checked_covariance(covariance: Tensor) -> Tensor:
    """In float64; `ScoreError` unless square and finite."""
    if covariance.ndim != 2 or len(covariance) != covariance.shape[-1] or not len(covariance):
        raise ScoreError(
            f"covariance has shape {list(covariance.shape)}; expected [n, n] with n > 0."
        )
    return checked_finite("covariance", covariance)


def checked_finite(name: str, values: Tensor) -> Tensor:
    """In float64, without gradient; `ScoreError` that names the first value that is not finite."""
    invalid = ~torch.isfinite(values)
    if bool(invalid.any()):
        where = tuple(int(i) for i in invalid.nonzero()[0])
        raise ScoreError(f"{name} at {where} is {values[where].item()}; expected finite.")
    return values.detach().double()


def checked_columns(kept_columns: Tensor, weight: Tensor) -> Tensor:
    """In int64, on the weight's device; `ScoreError` unless ascending columns of ``weight``."""
    columns = kept_columns.to(weight.device)
    if columns.ndim != 1 or columns.is_floating_point() or columns.dtype == torch.bool:
        raise ScoreError(
            f"kept_columns is {columns.dtype} {list(columns.shape)}; expected integers [kept]."
        )
    width = weight.shape[1]
    inside = bool(((columns >= 0) & (columns < width)).all())
    if not inside or not bool((columns.diff() > 0).all()):
        raise ScoreError(f"kept_columns must ascend, without repeats, within [0, {width}).")
    return columns.long()
