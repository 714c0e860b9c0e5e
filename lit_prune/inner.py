"""What lies inside a sub-block, fitted: it is linear in its value or its up projection.

Whatever the attention's pattern or the gate is, an attention's output is linear in the weights of
its value projection, a gated MLP's in those of its up projection. So what these should be, behind a
cut, is a linear least-squares problem as well: the output projection recombines what units say, and
here the units that stay learn to say something else. Its normal equations are too large to write
down (their unknowns are all weights of the projection), but a product with their matrix takes one
forward and a part of a backward through the sub-block: conjugate gradients solve them, a few steps
far, and stop when text that was held out is no better off.

References:
    Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952. That
    the number of steps regularises: Hanke, "Conjugate Gradient Type Methods for Ill-Posed
    Problems", 1995. For the weights that a mask leaves to one linear layer: ALPS (Meng et al.,
    NeurIPS 2024). We differ: the weights lie in front of the gate or the attention, the target is
    the residual stream. Preconditioned by the covariance of what is read, and by how much each row
    weighs in the output. No loss of the whole model is differentiated.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_prune.calibration import by_token, inputs_of
from lit_prune.decoder import is_plain
from lit_prune.surgery import Instead, compensated_inputs, unit_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lit_prune.calibration import Side, TwoStreams
    from lit_prune.decoder import DecoderParts, SubBlock
    from lit_prune.surgery import Compensation

_SIDES: tuple[Side, Side] = ("calibrate", "choose")

# What more of them gain on the text that was fitted is lost on other text.
_STEPS = {"attention": 2, "mlp": 8}
# Of the mean variance of what is read, in the preconditioner alone.
_DAMPING = 1e-2
# A row that hardly weighs is not preconditioned by more than the inverse of this, of the mean.
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Inner:
    """New weights of the value or up projection of a sub-block.

    Attributes:
        weight: Rows of the units that stay, ``[rows, hidden_size]``, float32.
        steps: Steps of conjugate gradients that it took.
    """

    weight: Tensor
    steps: int


def has_inner(parts: DecoderParts, place: SubBlock) -> bool:
    """Return whether a sub-block is linear in a projection that can be set.

    An MLP without a gate is not. Projections must compute what their weights say, and lie in the
    module of the sub-block, which is called by itself.
    """
    family, (layer, kind) = parts.family, place
    if parts.routed(*place) is not None or (kind == "mlp" and family.gate is None):
        return False
    return parts.is_inside(*place) and is_plain(parts.inputs(layer, kind)[-1].module)


def fit_inner(
    parts: DecoderParts,
    place: SubBlock,
    kept: Sequence[int],
    made: Compensation,
    text: dict[Side, list[TwoStreams]],
) -> Inner | None:
    """Fit the value or up projection so that the sub-block adds what the stream lacks.

    Call it where the pruned model runs up to this sub-block (`masked`, with ``made``), and the text
    has arrived there.

    Args:
        parts: The dense model's parts.
        place: `has_inner`.
        kept: Units that stay.
        made: What was fitted so far, this sub-block's output projection included.
        text: Both models on their way, by side: fitted on ``calibrate``, stopped by ``choose``.

    Returns:
        None where the first step is no better on the choose side.
    """
    linear = _Linear(parts, place, kept, made)
    with _frozen(parts.layers[place[0]]):
        fitted, chosen = (_Side(text[side], linear) for side in _SIDES)
        precondition = fitted.preconditioner()
        step, on_other = torch.zeros_like(linear.start), torch.zeros_like(linear.start)
        rest = fitted.wanted
        towards = way = precondition(rest)
        length = _dot(rest, towards)
        best, least, steps = None, 0.0, 0
        for number in range(1, _STEPS[place[1]] + 1):
            product = fitted.times(way)
            bend = _dot(way, product)
            if not bend > 0:  # nothing is left to gain, or a value is not finite
                break
            far = length / bend
            step, on_other = step + far * way, on_other + far * chosen.times(way)
            error = _dot(step, on_other) - 2 * _dot(step, chosen.wanted)
            if not error < least:
                break
            best, least, steps = step, error, number
            rest = rest - far * product
            towards = precondition(rest)
            before, length = length, _dot(rest, towards)
            way = towards + (length / before) * way
    return None if best is None else Inner((linear.start + best).float().cpu(), steps)


class _Linear:
    """What a sub-block writes, as a function of its value or up projection; without biases."""

    def __init__(
        self, parts: DecoderParts, place: SubBlock, kept: Sequence[int], made: Compensation
    ) -> None:
        self.parts, self.place = parts, place
        self._input, self._output = parts.inputs(*place)[-1].module, parts.output(*place)
        like, lines = self._output.weight, parts.inputs(*place)[-1].rows
        assert lines is not None  # noqa: S101 - units own rows of inputs
        rows = lines[list(kept)]
        self._rows = rows.flatten().to(like.device)
        # a unit's columns: for each of its query heads what its rows hold
        self._by_row = (len(rows), -1, rows.shape[1])
        self._columns = unit_columns(kept, parts.unit_width(*place)).to(like.device)
        inputs = compensated_inputs(parts, place, kept, made)
        self._matrix = next(make() for each, make in inputs if each.module is self._input)
        self.start = self._matrix[self._rows].double()
        self.exact = torch.promote_types(self._matrix.dtype, torch.float32)
        written = made.weights.get(place, like[:, self._columns])
        self._written = written.detach().to(like.device, like.dtype)
        self._constant = made.constants.get(place)

    def got(self, batch: TwoStreams) -> tuple[Tensor, Tensor]:
        """Return what the kept columns get now, and what the stream lacks behind them."""
        inputs, target = (part[batch.mask] for part in batch.enters(self.parts, self.place))
        columns = inputs[:, self._columns]
        lacks = target - nn.functional.linear(columns, self._written, self._output.bias)
        return columns, lacks if self._constant is None else lacks - self._constant.to(lacks)

    def __call__(self, told: _Told, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is read, and what is written with these weights, ``[real tokens, …]``."""
        bias = self._input.bias
        bias = None if bias is None else bias.detach().index_fill(0, self._rows, 0)
        whole = self._matrix.index_copy(0, self._rows, weight.to(self._matrix))
        read: list[Tensor] = []

        def forward(inputs: Tensor) -> Tensor:
            read.append(inputs)
            return nn.functional.linear(inputs, whole, bias)

        instead = Instead(self._input, forward)
        try:
            with inputs_of(self._output.module, last=True) as got:
                told.call()
        finally:
            instead.remove()
        inputs, columns = (by_token(x[0], told.mask)[told.mask] for x in (read, got))
        return inputs, nn.functional.linear(columns[:, self._columns], self._written)

    def row_weights(self, power: Tensor, covariance: Tensor) -> Tensor:
        """Return how much each row weighs in the output, for one of what it says.

        Args:
            power: Mean square of what the kept columns get.
            covariance: Second moment of what is read.
        """
        columns = self._written.double().square().sum(0) * power
        said = ((self.start @ covariance) * self.start).sum(1)
        rows = columns.reshape(self._by_row).sum(1).flatten()
        weights = rows / said.clamp_min(torch.finfo(torch.float32).tiny)
        return weights.clamp_min(_LEAST_WEIGHT * weights.mean())


class _Told:
    """One batch: the call of the sub-block, and what the stream lacks behind it."""

    def __init__(self, batch: TwoStreams, linear: _Linear) -> None:
        self.mask, self._shelf = batch.mask, batch.shelf
        columns, self._shelf["lacks"] = linear.got(batch)
        self.power = columns.double().square().sum(0)
        self.call = batch.calls[linear.place]

    @property
    def lacks(self) -> Tensor:
        """``[real tokens, hidden_size]``."""
        return self._shelf["lacks"]


class _Side:
    """The normal equations on one side of the text; means over tokens, float64."""

    def __init__(self, batches: Sequence[TwoStreams], linear: _Linear) -> None:
        self._linear = linear
        self._told = [_Told(batch, linear) for batch in batches]
        self._tokens = sum(int(told.mask.sum()) for told in self._told)
        width = linear.start.shape[1]
        self._covariance = linear.start.new_zeros(width, width)
        self.wanted = self._sum(None)

    def times(self, weight: Tensor) -> Tensor:
        """Return their matrix times ``weight``."""
        return self._sum(weight)

    def _sum(self, weight: Tensor | None) -> Tensor:
        total = torch.zeros_like(self._linear.start)
        at = total if weight is None else weight
        for told in self._told:
            with torch.enable_grad():
                leaf = at.to(self._linear.exact).requires_grad_()
                read, written = self._linear(told, leaf)
                towards = told.lacks.to(written) if weight is None else written.detach()
                (slope,) = torch.autograd.grad(written, leaf, towards)
            total += slope
            if weight is None:
                self._covariance.addmm_(read.double().T, read.double())
        return total / self._tokens

    def preconditioner(self) -> Callable[[Tensor], Tensor]:
        """Return the inverse of what their matrix is nearly: a weight of each row, a covariance."""
        covariance = self._covariance / self._tokens
        noise = (_DAMPING * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
        factor = torch.linalg.cholesky(covariance + noise * torch.eye(len(covariance)).to(noise))
        power = torch.stack([told.power for told in self._told]).sum(0) / self._tokens
        weights = self._linear.row_weights(power, covariance).unsqueeze(1)
        return lambda slope: torch.cholesky_solve(slope.T, factor).T / weights


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let a slope be asked of nothing but what is fitted."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())
