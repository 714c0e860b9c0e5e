"""Streaming moments of inputs and a target: what a linear regression of one on the other needs."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.calibration.moments import _BLOCK_ELEMENTS
from lit_prune.errors import CalibrationError

# Means of inputs and target, or their second moments ``E[x x^T]`` and ``E[t x^T]``.
Pair = tuple[Tensor, Tensor]


class RegressionMoments:
    """Means and second moments of inputs with themselves and of a target with them, in float64.

    A covariance of both together would hold the target's own as well, which no regression asks for,
    and it takes as long to add up as all the rest where the target is wide.

    Memory: ``8 * inputs * (inputs + target)`` bytes, where the tokens are.

    Example:
        >>> moments = RegressionMoments()
        >>> moments.update(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [6.0]]))
        >>> [x.tolist() for x in moments.means]
        [[2.0], [4.0]]
        >>> [x.tolist() for x in moments.about(moments.means)]
        [[[1.0]], [[2.0]]]
    """

    def __init__(self) -> None:
        self._count = 0
        self._centre: Pair | None = None

    def update(self, inputs: Tensor, target: Tensor) -> None:
        """Add tokens, ``[tokens, inputs]`` and ``[tokens, target]``."""
        if not len(inputs):
            return
        if self._centre is None:
            # near the means, so that little is taken off again
            self._centre = inputs[:64].double().mean(0), target[:64].double().mean(0)
            self._sums = tuple(torch.zeros_like(centre) for centre in self._centre)
            width, out = inputs.shape[1], target.shape[1]
            self._own = self._sums[0].new_zeros(width, width)
            self._cross = self._sums[0].new_zeros(out, width)
        step = max(1, _BLOCK_ELEMENTS // (inputs.shape[1] + target.shape[1]))
        for block in zip(inputs.split(step), target.split(step), strict=True):
            x, t = (part.double() - at for part, at in zip(block, self._centre, strict=True))
            for total, part in zip(self._sums, (x, t), strict=True):
                total += part.sum(0)
            self._own.addmm_(x.T, x)
            self._cross.addmm_(t.T, x)
        self._count += len(inputs)

    @property
    def means(self) -> Pair:
        """Means, ``[inputs]`` and ``[target]``.

        Raises:
            CalibrationError: If no token was seen.
        """
        centre = self._seen()
        x, t = (at + total / self._count for at, total in zip(centre, self._sums, strict=True))
        return x, t

    def about(self, point: Pair | None = None) -> Pair:
        """Return second moments about a point, or about zero.

        Args:
            point: For inputs and target, ``[inputs]`` and ``[target]``.

        Returns:
            ``[inputs, inputs]`` and ``[target, inputs]``.

        Raises:
            CalibrationError: If no token was seen.
        """
        centre = self._seen()
        at = tuple(torch.zeros_like(x) for x in centre) if point is None else point
        x, t = (total / self._count for total in self._sums)  # means, from the centre
        far_x, far_t = (mean - p for mean, p in zip(self.means, at, strict=True))
        own = (self._own / self._count).addr_(x, x, alpha=-1).addr_(far_x, far_x)
        cross = (self._cross / self._count).addr_(t, x, alpha=-1).addr_(far_t, far_x)
        return own, cross

    def _seen(self) -> Pair:
        if self._centre is None:
            raise CalibrationError(
                "no token reached the regression. Is the calibration loader empty?"
            )
        return self._centre
