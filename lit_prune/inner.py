"""What lies inside a sub-block, fitted: what it reads with, behind a cut.

The output projection recombines what units say; here the units that stay learn to say something
else. An attention is linear in the weights of its value projection, whatever its pattern is, so
what these should be is a linear least-squares problem as well. An MLP is linear in its up
projection, where it has a gate, but not in the gate, nor where it has none: all that it reads with
is fitted by one step of Gauss and Newton, which solves the least-squares problem of its slopes. The
normal equations are too large to write down (their unknowns are all weights of the projections),
but a product with their matrix takes little more than a forward and a backward through the
sub-block: conjugate gradients solve them, a few steps far, and stop when text that was held out is
no better off, by what the sub-block then really writes.

References:
    Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952. That
    the number of steps regularises: Hanke, "Conjugate Gradient Type Methods for Ill-Posed
    Problems", 1995. Products with a Gauss-Newton matrix: Schraudolph, "Fast Curvature
    Matrix-Vector Products for Second-Order Gradient Descent", 2002. The preconditioner is that of
    K-FAC (Martens and Grosse, 2015), one of its two factors kept to its diagonal. For the weights
    that a mask leaves to one linear layer: ALPS (Meng et al., NeurIPS 2024). We differ: the weights
    lie in front of the gate or the attention, the target is the residual stream. No loss of the
    whole model is differentiated.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_prune.calibration import by_token, inputs_of
from lit_prune.decoder import is_plain
from lit_prune.surgery import Instead, compensated_inputs, fitted_inputs, unit_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lit_prune.calibration import Side, TwoStreams
    from lit_prune.decoder import DecoderParts, SubBlock
    from lit_prune.surgery import Compensation

_SIDES: tuple[Side, Side] = ("calibrate", "choose")

# An attention gains in two what it gains in six, and each costs it more; an MLP gains more from
# the output projection fitted anew than from further steps.
_STEPS = {"attention": 2, "mlp": 6}
# Of the mean variance of what is read, in the preconditioner alone.
_DAMPING = 1e-2
# A row that hardly weighs is not preconditioned by more than the inverse of this, of the mean.
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Inner:
    """New weights of what a sub-block reads with.

    Attributes:
        weight: Rows of the units that stay, of one of `fitted_inputs` after the other,
            ``[rows, hidden_size]``, float32.
        steps: Steps of conjugate gradients that it took.
    """

    weight: Tensor
    steps: int


def can_be_fitted_inside(parts: DecoderParts, place: SubBlock) -> bool:
    """Return whether what a sub-block reads with can be fitted.

    The projections must compute what their weights say, and all lie in the module of the sub-block,
    which is called by itself; not where modules have hooks of the caller, which would be handed
    tensors with a slope. Not of experts.
    """
    layer, kind = place
    if parts.routed(layer, kind) is not None or not parts.is_inside(layer, kind):
        return False
    if not all(is_plain(each.module) for each in fitted_inputs(parts, place)):
        return False
    return not any(module._forward_hooks for module in parts.sub_block(layer, kind).modules())


def fit_inner(
    parts: DecoderParts,
    place: SubBlock,
    kept: Sequence[int],
    made: Compensation,
    text: dict[Side, list[TwoStreams]],
) -> Inner | None:
    """Fit what the sub-block reads with so that it adds what the stream lacks.

    Call it where the pruned model runs through this sub-block (`masked`, with ``made``), and the
    text has arrived there. Where that is not linear (gates; values that are clipped, or normed),
    the slopes are those of where it stands, and the choose side tells.

    Args:
        parts: The dense model's parts.
        place: `can_be_fitted_inside`.
        kept: Units that stay.
        made: What was fitted so far, this sub-block's output projection included.
        text: Both models on their way, by side: fitted on ``calibrate``, stopped by ``choose``.

    Memory: some eight matrices of the shape of the projections, and four ``[hidden_size,
    hidden_size]``, in float64.

    Returns:
        None where the first step is no better on the choose side.
    """
    writes = _Writes(parts, place, kept, made)
    fitted, chosen = ([_Told(batch, writes) for batch in text[side]] for side in _SIDES)
    with _frozen(parts.layers[place[0]]):
        residual, precondition = _first(writes, fitted)
        change = torch.zeros_like(writes.start)
        best, steps, least = None, 0, writes.error(chosen, change)
        preconditioned = direction = precondition(residual)
        length = _dot(residual, preconditioned)
        for number in range(1, _STEPS[place[1]] + 1):
            product = _product(writes, fitted, direction)
            curvature = _dot(direction, product)
            if not curvature > 0:  # nothing is left to gain, or a value is not finite
                break
            change = change + (length / curvature) * direction
            error = writes.error(chosen, change)
            if not error < least:
                break
            best, steps, least = change, number, error
            residual = residual - (length / curvature) * product
            preconditioned = precondition(residual)
            before, length = length, _dot(residual, preconditioned)
            direction = preconditioned + (length / before) * direction
    return None if best is None else Inner((writes.start + best).float().cpu(), steps)


class _Writes:
    """What a sub-block writes, as a function of the weights that it reads with."""

    def __init__(
        self, parts: DecoderParts, place: SubBlock, kept: Sequence[int], made: Compensation
    ) -> None:
        self.parts, self.place = parts, place
        inputs, self._output = fitted_inputs(parts, place), parts.output(*place)
        self._modules = [each.module for each in inputs]
        like = self._output.weight
        self._lines = [each.lines_of(kept).to(like.device) for each in inputs]
        self._columns = unit_columns(kept, parts.unit_width(*place)).to(like.device)
        self._units = len(kept)
        others = compensated_inputs(parts, place, kept, made)
        self._matrices = [
            (others[each.module]() if each.module in others else each.matrix).detach()
            for each in inputs
        ]
        pairs = zip(self._matrices, self._lines, strict=True)
        self.start = torch.cat([matrix[lines] for matrix, lines in pairs]).double()
        written = made.weights.get(place, like[:, self._columns])
        self._written = written.detach().to(like.device, like.dtype)
        self._constant = made.constants.get(place)

    def wanted(self, batch: TwoStreams) -> Tensor:
        """Return what its output projection should make, but for constants, ``[tokens, …]``."""
        wanted = batch.enters(self.parts, self.place)[1][batch.mask]
        bias = self._output.bias
        wanted = wanted if bias is None else wanted - bias.detach()
        return wanted if self._constant is None else wanted - self._constant.to(wanted)

    def __call__(self, told: _Told, weight: Tensor, *, biased: bool = True) -> _Run:
        """Run a batch with other weights.

        Args:
            told: What to call.
            weight: As ``start``.
            biased: False leaves the biases of what is fitted out.
        """
        read: list[Tensor] = []
        said: dict[nn.Module, Tensor] = {}

        def forward(module: nn.Module, bias: Tensor | None, whole: Tensor, x: Tensor) -> Tensor:
            read.append(x)
            output = nn.functional.linear(x, whole, bias)
            said[module] = output.requires_grad_(torch.is_grad_enabled())
            return output.clone()  # which may be changed in place

        rows = weight.split([len(lines) for lines in self._lines])
        of_each = zip(self._modules, self._matrices, self._lines, rows, strict=True)
        with ExitStack() as stack:
            for module, matrix, lines, new in of_each:
                bias = None if module.bias is None else module.bias.detach()
                if bias is not None and not biased:
                    bias = bias.index_fill(0, lines, 0)
                whole = matrix.index_copy(0, lines, new.to(matrix))
                stack.callback(Instead(module, partial(forward, module, bias, whole)).remove)
            got = stack.enter_context(inputs_of(self._output.module, last=True))
            told.call()
        inputs, columns = (by_token(x[0], told.mask)[told.mask] for x in (read, got))
        return _Run(self, told.mask, inputs, [said[x] for x in self._modules], columns)

    def written(self, columns: Tensor) -> Tensor:
        """Return what the kept of them add up to, ``[tokens, hidden_size]``."""
        return nn.functional.linear(columns[:, self._columns], self._written)

    def of_columns(self, of_written: Tensor) -> Tensor:
        """Return slopes of the columns from those of what is written, ``[tokens, width]``."""
        found = of_written.new_zeros(len(of_written), self._output.in_features)
        return found.index_copy(1, self._columns, of_written @ self._written)

    def moved(self, told: _Told, direction: Tensor) -> tuple[_Run, Tensor]:
        """Return how what is written moves with the weights, ``[real tokens, hidden_size]``.

        What an attention writes is linear in its values. A channel of an MLP gets what its own rows
        say, each token by itself, so that one backward tells all slopes.

        Returns:
            Also a run whose slopes are those of ``start``.
        """
        with torch.enable_grad():
            if self.place[1] == "attention":
                run = self(told, direction, biased=False)
                return run, run.written
            run = self(told, self.start)
        moves = run.slopes(torch.ones_like(run.columns)) * (run.inputs @ direction.to(run.inputs).T)
        by_unit = [
            part.unflatten(1, (self._units, -1)).sum(2)
            for part in moves.split([len(lines) for lines in self._lines], 1)
        ]
        return run, nn.functional.linear(torch.stack(by_unit).sum(0), self._written)

    def by_line(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return those of the projections' outputs that are of rows that stay, ``[…, rows]``."""
        pairs = zip(outputs, self._lines, strict=True)
        return torch.cat([output[..., lines] for output, lines in pairs], -1)

    def error(self, batches: Sequence[_Told], change: Tensor) -> float:
        """Return the mean squared error of a token, with changed weights."""
        total, tokens = 0.0, 0
        for told in batches:
            written = self(told, self.start + change).written
            total += float((told.wanted - written).double().square().sum())
            tokens += len(written)
        return total / tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One batch on its way through a sub-block.

    Attributes:
        writes: With what.
        mask: Real tokens.
        inputs: What is read, ``[real tokens, hidden_size]``.
        said: What the projections make of it, as they made it.
        columns: What the output projection gets, ``[real tokens, width]``.
    """

    writes: _Writes
    mask: Tensor
    inputs: Tensor
    said: list[Tensor]
    columns: Tensor

    @property
    def written(self) -> Tensor:
        """``[real tokens, hidden_size]``."""
        return self.writes.written(self.columns.detach())

    def slopes(self, of_columns: Tensor) -> Tensor:
        """Return slopes of the rows from those of the columns, ``[real tokens, rows]``."""
        found = torch.autograd.grad(self.columns, self.said, of_columns, retain_graph=True)
        return self.writes.by_line([by_token(x, self.mask)[self.mask] for x in found])

    def back(self, of_written: Tensor) -> Tensor:
        """Return slopes of the rows from those of what is written, ``[real tokens, rows]``."""
        return self.slopes(self.writes.of_columns(of_written))


class _Told:
    """One batch: the call of the sub-block, and what its output projection should make."""

    def __init__(self, batch: TwoStreams, writes: _Writes) -> None:
        self.mask, self._shelf, self.call = batch.mask, batch.shelf, batch.calls[writes.place]
        self._shelf["wanted"] = writes.wanted(batch)

    @property
    def wanted(self) -> Tensor:
        """``[real tokens, hidden_size]``."""
        return self._shelf["wanted"]


def _first(writes: _Writes, batches: Sequence[_Told]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the right side of the normal equations, and nearly the inverse of their matrix.

    That is a weight of each row times a covariance of what is read. Means over tokens, float64. How
    much a row weighs in what is written, squared and summed, is what random signs find on average.
    """
    rows, width = writes.start.shape
    total, tokens = torch.zeros_like(writes.start), 0
    covariance, weights = writes.start.new_zeros(width, width), writes.start.new_zeros(rows)
    numbers = torch.Generator().manual_seed(0)
    for told in batches:
        with torch.enable_grad():
            run = writes(told, writes.start)
        written = run.written
        signs = torch.randint(2, written.shape, generator=numbers).to(written) * 2 - 1
        weights += run.back(signs).double().square().sum(0)
        total += run.back(told.wanted.to(written) - written).T @ run.inputs
        tokens += len(written)
        inputs = run.inputs.double()
        covariance.addmm_(inputs.T, inputs)
    covariance, weights = covariance / tokens, weights / tokens
    tiny = torch.finfo(torch.float32).tiny
    noise = (_DAMPING * covariance.diagonal().mean()).clamp_min(tiny)
    weights = weights.clamp_min((_LEAST_WEIGHT * weights.mean()).clamp_min(tiny)).unsqueeze(1)
    factor = torch.linalg.cholesky(covariance + noise * torch.eye(width).to(noise))
    return total / tokens, lambda slope: torch.cholesky_solve(slope.T, factor).T / weights


def _product(writes: _Writes, batches: Sequence[_Told], direction: Tensor) -> Tensor:
    """Return the matrix of the normal equations times ``direction``: a mean over tokens."""
    total, tokens = torch.zeros_like(direction), 0
    size = direction.abs().max()  # half precision has no small numbers
    for told in batches:
        run, moved = writes.moved(told, direction / size)
        total += run.back(moved).T @ run.inputs
        tokens += len(moved)
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
