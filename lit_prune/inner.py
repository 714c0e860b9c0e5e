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

# An attention gains in two what it gains in six, and each costs it more; an MLP little after eight.
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


def is_linear_inside(parts: DecoderParts, place: SubBlock) -> bool:
    """Return whether a sub-block is linear in a projection that can be set.

    An MLP without a gate is not. The projection must compute what its weight says, and all lie in
    the module of the sub-block, which is called by itself; not where modules have hooks of the
    caller, which would be handed tensors with a slope.
    """
    family, (layer, kind) = parts.family, place
    if parts.routed(*place) is not None or (kind == "mlp" and family.gate is None):
        return False
    if not parts.is_inside(*place) or not is_plain(parts.inputs(layer, kind)[-1].module):
        return False
    return not any(module._forward_hooks for module in parts.sub_block(layer, kind).modules())


def fit_inner(
    parts: DecoderParts,
    place: SubBlock,
    kept: Sequence[int],
    made: Compensation,
    text: dict[Side, list[TwoStreams]],
) -> Inner | None:
    """Fit the value or up projection so that the sub-block adds what the stream lacks.

    Call it where the pruned model runs through this sub-block (`masked`, with ``made``), and the
    text has arrived there. Where something else follows that is not linear (values that are
    clipped, or normed), the slopes are those of where it stands, and the choose side tells.

    Args:
        parts: The dense model's parts.
        place: `is_linear_inside`.
        kept: Units that stay.
        made: What was fitted so far, this sub-block's output projection included.
        text: Both models on their way, by side: fitted on ``calibrate``, stopped by ``choose``.

    Memory: some eight matrices of the shape of the projection, and four ``[hidden_size,
    hidden_size]``, in float64.

    Returns:
        None where the first step is no better on the choose side.
    """
    linear = _Linear(parts, place, kept, made)
    fitted, chosen = ([_Told(batch, linear) for batch in text[side]] for side in _SIDES)
    with _frozen(parts.layers[place[0]]):
        residual, precondition = _first(linear, fitted)
        change = torch.zeros_like(linear.start)
        best, steps, least = None, 0, linear.error(chosen, change)
        preconditioned = direction = precondition(residual)
        length = _dot(residual, preconditioned)
        for number in range(1, _STEPS[place[1]] + 1):
            product = _product(linear, fitted, direction)
            curvature = _dot(direction, product)
            if not curvature > 0:  # nothing is left to gain, or a value is not finite
                break
            change = change + (length / curvature) * direction
            error = linear.error(chosen, change)
            if not error < least:
                break
            best, steps, least = change, number, error
            residual = residual - (length / curvature) * product
            preconditioned = precondition(residual)
            before, length = length, _dot(residual, preconditioned)
            direction = preconditioned + (length / before) * direction
    return None if best is None else Inner((linear.start + best).float().cpu(), steps)


class _Linear:
    """What a sub-block writes, as a function of its value or up projection."""

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
        other = compensated_inputs(parts, place, kept, made).get(self._input)
        self._matrix = (parts.inputs(*place)[-1].matrix if other is None else other()).detach()
        self.start = self._matrix[self._rows].double()
        self.exact = torch.promote_types(self._matrix.dtype, torch.float32)
        written = made.weights.get(place, like[:, self._columns])
        self._written = written.detach().to(like.device, like.dtype)
        self._constant = made.constants.get(place)

    def wanted(self, batch: TwoStreams) -> Tensor:
        """Return what its output projection should make, but for constants, ``[tokens, …]``."""
        wanted = batch.enters(self.parts, self.place)[1][batch.mask]
        bias = self._output.bias
        wanted = wanted if bias is None else wanted - bias.detach()
        return wanted if self._constant is None else wanted - self._constant.to(wanted)

    def __call__(
        self, told: _Told, weight: Tensor, *, biased: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is read, what stands in between, what is written, ``[real tokens, …]``."""
        bias = self._input.bias
        bias = bias if bias is None else bias.detach()
        if bias is not None and not biased:
            bias = bias.index_fill(0, self._rows, 0)
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
        columns = columns[:, self._columns]
        return inputs, columns, nn.functional.linear(columns, self._written)

    def error(self, batches: Sequence[_Told], change: Tensor) -> float:
        """Return the mean squared error of a token, with changed weights."""
        total, tokens = 0.0, 0
        for told in batches:
            *_, written = self(told, self.start + change, biased=True)
            total += float((told.wanted - written).double().square().sum())
            tokens += len(written)
        return total / tokens

    def row_weights(self, power: Tensor, covariance: Tensor) -> Tensor:
        """Return how much each row weighs in the output, for one of what it says.

        Args:
            power: Mean square of what the kept columns get.
            covariance: Second moment of what is read.
        """
        columns = self._written.double().square().sum(0) * power
        rows = columns.reshape(self._by_row).sum(1).flatten()
        said = ((self.start @ covariance) * self.start).sum(1)
        if self._input.bias is not None:
            said = said + self._input.bias.detach()[self._rows].double().square()
        weights = rows / said.clamp_min(torch.finfo(torch.float32).tiny)
        return weights.clamp_min(_LEAST_WEIGHT * weights.mean())


class _Told:
    """One batch: the call of the sub-block, and what its output projection should make."""

    def __init__(self, batch: TwoStreams, linear: _Linear) -> None:
        self.mask, self._shelf, self.call = batch.mask, batch.shelf, batch.calls[linear.place]
        self._shelf["wanted"] = linear.wanted(batch)

    @property
    def wanted(self) -> Tensor:
        """``[real tokens, hidden_size]``."""
        return self._shelf["wanted"]


def _first(linear: _Linear, batches: Sequence[_Told]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the right side of the normal equations, and nearly the inverse of their matrix.

    That is a weight of each row times a covariance of what is read. Means over tokens, float64.
    """
    total, tokens = torch.zeros_like(linear.start), 0
    width = linear.start.shape[1]
    covariance, power = linear.start.new_zeros(width, width), linear.start.new_zeros(())
    for told in batches:
        with torch.enable_grad():
            leaf = linear.start.to(linear.exact).requires_grad_()
            read, columns, written = linear(told, leaf, biased=True)
            lacks = told.wanted.to(written) - written.detach()
            (slope,) = torch.autograd.grad(written, leaf, lacks)
        total += slope
        tokens += len(written)
        inputs = read.double()
        covariance.addmm_(inputs.T, inputs)
        columns = columns.detach()
        power = power + torch.linalg.vector_norm(columns, dim=0, dtype=linear.exact).double() ** 2
    covariance, power = covariance / tokens, power / tokens
    noise = (_DAMPING * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    weights = linear.row_weights(power, covariance).unsqueeze(1)
    factor = torch.linalg.cholesky(covariance + noise * torch.eye(width).to(noise))
    return total / tokens, lambda slope: torch.cholesky_solve(slope.T, factor).T / weights


def _product(linear: _Linear, batches: Sequence[_Told], weight: Tensor) -> Tensor:
    """Return the matrix of the normal equations times ``weight``; a mean over tokens, float64."""
    total, tokens = torch.zeros_like(weight), 0
    size = weight.abs().max()  # half precision has no small numbers
    for told in batches:
        with torch.enable_grad():
            leaf = (weight / size).to(linear.exact).requires_grad_()
            *_, written = linear(told, leaf, biased=False)
            (slope,) = torch.autograd.grad(written, leaf, written.detach())
        total += slope
        tokens += len(written)
    return total * (size / tokens)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let a slope be asked of nothing but what is fitted."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        with torch.inference_mode():  # where a model was made under it, only there
            for parameter in trained:
                parameter.requires_grad_(True)


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())
