"""Streaming covariance of a hidden state, for the joint Gaussian entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_prune.calibration.moments import _BLOCK_ELEMENTS, mean_over_ranks, same_dtype
from lit_prune.errors import CalibrationError
from lit_prune.ranks import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lit_prune.ranks import Ranks

Moments = tuple[Tensor, Tensor, Tensor]


class ChannelCovariance(Metric):
    """Count, mean and covariance of channels over the tokens that it was shown.

    Args:
        channels: Number of channels; memory is ``8 * channels ** 2`` bytes.

    Example:
        >>> covariance = ChannelCovariance(2)
        >>> covariance.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> covariance.compute()
        tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64)
    """

    full_state_update = False
    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx=None)
        self.add_state("mean", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state(
            "m2", torch.zeros(channels, channels, dtype=torch.float64), dist_reduce_fx=None
        )

    def set_dtype(self, dst_type: str | torch.dtype) -> ChannelCovariance:
        """Keep float64, as `ChannelMoments` does."""
        return self

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> ChannelCovariance:
        super()._apply(same_dtype(fn), exclude_state)
        return self

    def update(self, x: Tensor | Moments) -> None:
        """Add activations ``[tokens, channels]``, or what `measure` returned for them."""
        part = self.measure(x) if isinstance(x, Tensor) else x
        if self.mean.device != part[1].device:
            self.to(part[1].device)
        self.count, self.mean, self.m2 = _merge((self.count, self.mean, self.m2), part)

    def measure(self, x: Tensor) -> Moments:
        """Return count, mean and centred second moments of ``[tokens, channels]``; add nothing."""
        channels, tokens = x.shape[-1], len(x)
        m2 = torch.zeros(channels, channels, dtype=torch.float64, device=x.device)
        if not tokens:
            return torch.zeros((), dtype=torch.int64, device=x.device), m2.diagonal().clone(), m2
        # about a centre near the mean, so that little is taken off again
        centre = x[:64].double().mean(0)
        shift = torch.zeros_like(centre)
        for block in x.split(max(1, _BLOCK_ELEMENTS // channels)):
            centred = block.double() - centre
            shift += centred.sum(0)
            m2.addmm_(centred.T, centred)
        shift /= tokens
        m2.addr_(shift, shift, alpha=-tokens)
        return torch.tensor(tokens, device=x.device), centre + shift, m2

    def compute(self) -> Tensor:
        """Return the population covariance, ``[channels, channels]``.

        Call on every rank: it synchronises.

        Raises:
            CalibrationError: If no token was seen.
        """
        return self.here()

    def here(self) -> Tensor:
        """Return what `compute` does of this process alone; it does not synchronise.

        Raises:
            CalibrationError: If no token was seen.
        """
        channels = self.mean.shape[-1]
        parts = zip(
            self.count.reshape(-1),
            self.mean.reshape(-1, channels),
            self.m2.reshape(-1, channels, channels),
            strict=True,
        )
        whole = next(parts)
        for part in parts:
            whole = _merge(whole, part)
        if whole[0] == 0:
            raise CalibrationError(
                "no token reached the covariance. Is the calibration loader empty?"
            )
        covariance: Tensor = whole[2] / whole[0]
        return covariance

    def result(self, ranks: Ranks = ALONE) -> Tensor | None:
        """Return the population covariance on the CPU, ``[channels, channels]``.

        Args:
            ranks: Merge what these have seen; call on all of them then. Only rank 0 has the
                result, the others None: it is large.

        Raises:
            CalibrationError: If no token was seen.
        """
        if ranks.size == 1:
            return self.here().cpu()
        count, mean = self.count.cpu(), self.mean.cpu()
        total, grand = mean_over_ranks(count, mean, ranks)
        about = torch.addr(self.m2.cpu(), mean - grand, mean - grand, alpha=int(count))
        m2 = ranks.sum_on_first(about)
        return None if m2 is None else m2.div_(total)


def _merge(a: Moments, b: Moments) -> Moments:
    count = a[0] + b[0]
    weight = b[0].double() / count.clamp_min(1)
    delta = b[1] - a[1]
    m2 = torch.add(a[2], b[2]).addr_(delta * (a[0].double() * weight), delta)
    return count, a[1] + weight * delta, m2
