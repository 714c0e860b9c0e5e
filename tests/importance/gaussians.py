"""Correlated covariances of known condition, and weights that read them."""

import torch


def covariance_of(width, *, condition=100.0, seed=0):
    """Rotated, with eigenvalues spread evenly in their logarithm: ``[width, width]``, float64."""
    draw = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, -1, width, base=condition, dtype=torch.float64)
    covariance = rotation * spectrum @ rotation.T
    return (covariance + covariance.T) / 2


def random_weight(out, width, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=draw, dtype=torch.float64)
