"""What is measured of the units of a sub-block, and where in a forward it is seen.

Of projections it is the input of the output projection, of which every unit owns columns. Experts
have none that they share: there it is what each *adds* to the stream, ``g_e(x) * f_e(x)``, zero for
the tokens that were not routed to it. That is one vector for each expert, ``hidden_size`` columns
that it owns, as if an output projection of identities added them up. A covariance of all those
columns would be far too large, and is not needed: nothing is fitted to them, so that inner products
of whole contributions, ``E[<c_e, c_f>]``, tell all there is to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_prune.calibration.covariance import joint_moments
from lit_prune.calibration.inputs import by_token
from lit_prune.calibration.moments import block_moments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_prune.calibration.covariance import Moments
    from lit_prune.calibration.moments import BlockMoments, ChannelMoments
    from lit_prune.decoder import DecoderParts, Routed, SubBlock

# Numbers in the contributions that are held at once (64 MB in float32).
_MOST_ELEMENTS = 2**24


class Probe(ABC):
    """One sub-block under observation, by a pre-hook of its ``module``.

    Attributes:
        module: What is hooked; its arguments are measured.
        name: Its full path, for messages.
        width: How many numbers have moments.
        joint_width: How many rows their matrix of second moments has.
    """

    module: nn.Module
    name: str
    width: int
    joint_width: int

    @abstractmethod
    def sees(self, args: tuple[Any, ...], mask: Tensor) -> bool:
        """Return whether the arguments are those of the tokens of a mask ``[batch, tokens]``."""

    @abstractmethod
    def measure(
        self, args: tuple[Any, ...], mask: Tensor, *, near: ChannelMoments | None, joint: bool
    ) -> tuple[BlockMoments, Moments | None]:
        """Return moments ``[width]``, and second moments ``[joint_width, joint_width]`` if asked.

        Args:
            args: Arguments of the module.
            mask: Tokens that count, ``[batch, tokens]``.
            near: What was measured before, if its mean may serve as a centre.
            joint: Whether second moments are asked for.
        """


class _Projection(Probe):
    """The input of an output projection."""

    def __init__(self, parts: DecoderParts, place: SubBlock) -> None:
        output = parts.output(*place)
        self.module, self.name = output.module, parts.output_name(*place)
        self.width = self.joint_width = output.in_features

    @override
    def sees(self, args: tuple[Any, ...], mask: Tensor) -> bool:
        return bool(by_token(args[0], mask).shape[:-1] == mask.shape)

    @override
    def measure(
        self, args: tuple[Any, ...], mask: Tensor, *, near: ChannelMoments | None, joint: bool
    ) -> tuple[BlockMoments, Moments | None]:
        x = by_token(args[0].detach(), mask)[mask.to(args[0].device)]
        moments = block_moments(x) if near is None else near.measure(x)
        return moments, joint_moments(x) if joint else None


class _Experts(Probe):
    """What each expert of a layer adds to the stream."""

    def __init__(self, parts: DecoderParts, place: SubBlock, routed: Routed) -> None:
        experts = parts.family.experts
        assert experts is not None  # noqa: S101 - it has a routed layer
        self.module, self._count = routed.bank, routed.num_experts
        self.name = f"{parts.family.layers}.{place[0]}.{experts.bank}"
        self.width, self.joint_width = self._count * parts.hidden_size, self._count

    @override
    def sees(self, args: tuple[Any, ...], mask: Tensor) -> bool:
        return bool(len(args[0]) == mask.numel())

    @override
    def measure(
        self, args: tuple[Any, ...], mask: Tensor, *, near: ChannelMoments | None, joint: bool
    ) -> tuple[BlockMoments, Moments | None]:
        hidden, chosen, weights = (x.detach()[mask.reshape(-1).to(x.device)] for x in args)
        size = hidden.shape[-1]
        total = torch.zeros(self._count, size, dtype=torch.float64, device=hidden.device)
        squares, gram = torch.zeros_like(total), total.new_zeros(self._count, self._count)
        for experts, written in self._contributions(hidden, chosen, weights):
            # products with one-hot rows: unlike scattered sums, the same on every run
            of = nn.functional.one_hot(experts, self._count).double()
            rows, columns = of.flatten(0, 1).T, written.flatten(0, 1)
            total += rows @ columns
            squares += rows @ columns.square()
            gram += rows @ (written @ written.mT @ of).flatten(0, 1)
        tokens = len(hidden)
        mean = total / max(tokens, 1)
        spread = (squares - tokens * mean.square()).clamp_min(0)
        moments = (tokens, mean.flatten(), spread.flatten())
        about_zero = torch.zeros(self._count, dtype=torch.float64, device=hidden.device)
        return moments, (torch.tensor(tokens, device=hidden.device), about_zero, gram)

    def _contributions(
        self, hidden: Tensor, chosen: Tensor, weights: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the chosen experts ``[tokens, top_k]`` and what they add, ``[…, hidden]``."""
        top_k, size = chosen.shape[-1], hidden.shape[-1]
        step = max(1, _MOST_ELEMENTS // (top_k * size))
        parts = zip(hidden.split(step), chosen.split(step), weights.split(step), strict=True)
        for some, experts, gates in parts:
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                # each choice as a token of its own; `forward`, as the hooks have seen the call
                alone = self.module.forward(
                    some.repeat_interleave(top_k, 0), experts.reshape(-1, 1), gates.reshape(-1, 1)
                )
            yield experts, alone.reshape(*experts.shape, size).double()


def probe_of(parts: DecoderParts, place: SubBlock) -> Probe:
    """Return the probe of a sub-block."""
    routed = parts.routed(*place)
    return _Projection(parts, place) if routed is None else _Experts(parts, place, routed)
