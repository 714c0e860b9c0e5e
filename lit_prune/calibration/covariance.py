"""Streaming covariance: of the final state for the joint entropy, of what projections read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_prune.calibration.moments import _BLOCK_ELEMENTS, mean_over_ranks
from lit_prune.errors import CalibrationError
from lit_prune.ranks import ALONE

if TYPE_CHECKING:
    from lit_prune.ranks import Ranks

Moments = tuple[Tensor, Tensor, Tensor]


def joint_moments(x: Tensor) -> Moments:
    """Return count, mean ``[channels]`` and centred second moments of ``[tokens, channels]``.

    Example:
        >>> count, mean, m2 = joint_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> mean.tolist(), m2.tolist()
        ([2.0, 0.0], [[2.0, 0.0], [0.0, 0.0]])
    """
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


class ChannelCovariance:
    """Count, mean and covariance of channels over the tokens that it was shown, in float64.

    No torchmetrics metric, as `ChannelMoments` is: that would keep a second matrix, of what it
    began with, and move it along.

    Args:
        channels: Number of channels; memory is ``8 * channels ** 2`` bytes, where the tokens are.

    Example:
        >>> covariance = ChannelCovariance(2)
        >>> covariance.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> covariance.here()
        tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64)
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._seen: Moments | None = None

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, ``[channels]``; zero where nothing was seen."""
        nothing = torch.zeros(self.channels, dtype=torch.float64)
        return nothing if self._seen is None else self._seen[1]

    def update(self, x: Tensor | Moments) -> None:
        """Add activations ``[tokens, channels]``, or what `measure` returned for them."""
        part = self.measure(x) if isinstance(x, Tensor) else x
        self._seen = part if self._seen is None else _merge(self._seen, part)

    def measure(self, x: Tensor) -> Moments:
        """Return what `joint_moments` does; add nothing."""
        return joint_moments(x)

    def here(self) -> Tensor:
        """Return the population covariance of what this process saw, where the tokens are.

        Raises:
            CalibrationError: If no token was seen.
        """
        if self._seen is None or self._seen[0] == 0:
            raise CalibrationError(
                "no token reached the covariance. Is the calibration loader empty?"
            )
        covariance: Tensor = self._seen[2] / self._seen[0]
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
        if self._seen is None:  # a rank without a batch takes part in the sums
            self.update(torch.empty(0, self.channels))
        assert self._seen is not None  # noqa: S101 - narrows the type
        count, mean, own = (part.cpu() for part in self._seen)
        total, grand = mean_over_ranks(count, mean, ranks)
        about = torch.addr(own, mean - grand, mean - grand, alpha=int(count))
        m2 = ranks.sum_on_first(about)
        return None if m2 is None else m2.div_(total)


def _merge(a: Moments, b: Moments) -> Moments:
    count = a[0] + b[0]
    weight = b[0].double() / count.clamp_min(1)
    delta = b[1] - a[1]
    m2 = torch.add(a[2], b[2]).addr_(delta * (a[0].double() * weight), delta)
    return count, a[1] + weight * delta, m2
