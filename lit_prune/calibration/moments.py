"""Streaming moments of activations: bounded memory, exact merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_prune.errors import CalibrationError
from lit_prune.ranks import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lit_prune.ranks import Ranks

BlockMoments = tuple[int, Tensor, Tensor]

# Elements of one float32 block: bounds the memory of a copy.
_BLOCK_ELEMENTS = 2**22
# Inside a run of this many tokens sums are float32 about a centre near the mean; runs are added in
# float64. The relative error of a variance is then below 128 * 2**-24 < 1e-5 (tested, also where
# mean = 100 standard deviations).
_RUN = 128


def merge_moments(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge partial moments exactly.

    Args:
        count: Samples of each part, ``[parts]``.
        mean: Mean of each part, ``[parts, channels]``.
        m2: Sum of squared deviations of each part, ``[parts, channels]``.

    Returns:
        The same three for all samples: ``[]``, ``[channels]``, ``[channels]``.

    Example:
        >>> n, mean, m2 = torch.tensor([1, 1]), torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1)
        >>> [x.tolist() for x in merge_moments(n, mean, m2)]
        [2, [1.0], [2.0]]

    References:
        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
    """
    total = count.sum()
    weight = (count.double() / total.clamp_min(1)).unsqueeze(-1)  # int / int would be float32
    grand = (weight * mean).sum(0)
    return total, grand, (m2 + count.unsqueeze(-1) * (mean - grand).square()).sum(0)


def block_moments(x: Tensor, centre: Tensor | None = None) -> BlockMoments:
    """Return count, mean and sum of squared deviations of the rows of ``x``.

    Args:
        x: Activations, ``[tokens, channels]``, any float dtype.
        centre: Something near the mean, ``[channels]``; keeps the float32 sums free of
            cancellation. By default the mean of the first rows.

    Returns:
        Count, mean ``[channels]`` and m2 ``[channels]`` in float64.

    Example:
        >>> block_moments(torch.tensor([[1.0], [3.0]]))
        (2, tensor([2.], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    """
    tokens, channels = x.shape
    if not tokens:
        zeros = torch.zeros(channels, dtype=torch.float64, device=x.device)
        return 0, zeros, zeros.clone()
    centre = (x[:64].float().mean(0) if centre is None else centre.float()).to(x.device)
    step = max(1, _BLOCK_ELEMENTS // channels)
    total = torch.zeros(channels, dtype=torch.float64, device=x.device)
    squares = torch.zeros_like(total)
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in bfloat16
        for start in range(0, tokens, step):
            shifted = x[start : start + step].float() - centre
            total += _column_sums(shifted)
            squares += _column_sums(shifted.square_())
    offset = total / tokens
    return tokens, centre.double() + offset, (squares - total * offset).clamp_min(0)


def _column_sums(x: Tensor) -> Tensor:
    """Sum float32 ``[tokens, channels]`` over tokens, ``[channels]`` in float64."""
    runs, rest = divmod(len(x), _RUN)
    # A product with ones sums columns several times faster than sum(0). Its dtype is stated because
    # Lightning's precision plugins set the default dtype.
    ones = torch.ones(1, _RUN, dtype=torch.float32, device=x.device)
    whole = ones @ x[: runs * _RUN].reshape(runs, _RUN, x.shape[1])
    return whole.double().sum((0, 1)) + (ones[:, :rest] @ x[runs * _RUN :]).double().sum(0)


def same_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Turn what `nn.Module.to` does to a tensor into a move to its device alone.

    torchmetrics keeps its states through ``.half()``, but not through ``.to(torch.bfloat16)``.
    """
    return lambda state: state.to(fn(torch.zeros(1, device=state.device)).device)


class ChannelMoments(Metric):
    """Count, mean and variance of each channel over the real (unpadded) tokens that it was shown.

    Args:
        channels: Number of channels.
        name: What is observed, for messages.

    Example:
        >>> moments = ChannelMoments(1)
        >>> moments.update(torch.tensor([[1.0], [3.0]]))
        >>> moments.result()
        (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """

    full_state_update = False
    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, channels: int, name: str = "this probe") -> None:
        super().__init__()
        self.name = name
        # `None` stacks the ranks, `compute` merges them; "mean" would ignore unequal token counts
        # per rank.
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx=None)
        self.add_state("mean", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("m2", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx=None)

    def set_dtype(self, dst_type: str | torch.dtype) -> ChannelMoments:
        """Keep float64: a module cast to bfloat16 must not cast its statistics."""
        return self

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> ChannelMoments:
        super()._apply(same_dtype(fn), exclude_state)
        return self

    def update(self, x: Tensor | BlockMoments) -> None:
        """Add activations ``[tokens, channels]``, or what `measure` returned for them."""
        count, mean, m2 = self.measure(x) if isinstance(x, Tensor) else x
        if self.mean.device != mean.device:
            self.to(mean.device)
        self.count, self.mean, self.m2 = merge_moments(
            torch.stack([self.count, self.count.new_tensor(count)]),
            torch.stack([self.mean, mean]),
            torch.stack([self.m2, m2]),
        )

    def measure(self, x: Tensor) -> BlockMoments:
        """Return the moments of a batch ``[tokens, channels]`` without adding them."""
        return block_moments(x, self.mean if self.count else None)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return mean and population variance, ``[channels]`` each.

        Call on every rank: it synchronises.

        Raises:
            CalibrationError: If no token was seen.
        """
        return self._of_states()

    def _of_states(self) -> tuple[Tensor, Tensor]:
        channels = self.mean.shape[-1]
        count, mean, m2 = merge_moments(
            self.count.reshape(-1), self.mean.reshape(-1, channels), self.m2.reshape(-1, channels)
        )
        if count == 0:
            raise CalibrationError(
                f"no token reached {self.name}. Is the calibration loader empty, or the module "
                "unused?"
            )
        return mean, m2 / count

    def result(self, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        """Return mean and population variance on the CPU, ``[channels]`` each.

        Unlike `compute` it does not synchronise by itself (rank 0 works alone, too), and does not
        turn what has one element into a scalar.

        Args:
            ranks: Merge what these have seen; call on all of them then.

        Raises:
            CalibrationError: If no token was seen.
        """
        if ranks.size > 1:
            self.count, self.mean, self.m2 = _over_ranks(self.count, self.mean, self.m2, ranks)
        mean, variance = self._of_states()
        return mean.cpu(), variance.cpu()


def _over_ranks(
    count: Tensor, mean: Tensor, m2: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `merge_moments` does with the parts of all ranks."""
    count, mean, m2 = count.cpu(), mean.cpu(), m2.cpu()
    total, grand = mean_over_ranks(count, mean, ranks)
    return total, grand, ranks.sum(m2 + count * (mean - grand).square())


def mean_over_ranks(count: Tensor, mean: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return count and mean of what all ranks have seen, on the CPU of all."""
    total = ranks.sum(count)
    return total, ranks.sum(count.cpu().double() / total.clamp_min(1) * mean.cpu())
