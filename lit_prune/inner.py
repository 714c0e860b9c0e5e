"""What lies inside a sub-block, fitted: what it reads with, behind a cut.

The output projection recombines what units say; here the units that stay learn to say something
else. An attention is linear in the weights of its value projection, whatever its pattern is, so
what these should be is a linear least-squares problem as well. An MLP is linear in its up
projection, where it has a gate, but not in the gate, nor where it has none: all that it reads with
is fitted by a step of Gauss and Newton, which solves the least-squares problem of its slopes. The
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

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_prune.decoder import is_plain
from lit_prune.slopes import Told, Writes
from lit_prune.surgery import fitted_inputs

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
    which is called by itself. Not where modules inside have hooks of the caller, which would be
    handed tensors with a slope, or slopes; not of experts.
    """
    layer, kind = place
    if parts.routed(layer, kind) is not None or not parts.is_inside(layer, kind):
        return False
    if not all(is_plain(each.module) for each in fitted_inputs(parts, place)):
        return False
    module = parts.sub_block(layer, kind)
    return not any(
        each._forward_hooks
        or each._backward_hooks
        or each._backward_pre_hooks
        or (each is not module and each._forward_pre_hooks)
        for each in module.modules()
    )


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
    hidden_size]``, in float64; beside them what one backward through the sub-block takes.

    Returns:
        None where the first step is no better on the choose side.
    """
    writes = Writes(parts, place, kept, made)
    fitted, chosen = ([Told(batch, writes) for batch in text[side]] for side in _SIDES)
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
    for told in fitted:
        told.forget()
    return None if best is None else Inner((writes.start + best).float().cpu(), steps)


def _first(writes: Writes, batches: Sequence[Told]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the right side of the normal equations, and nearly the inverse of their matrix.

    That is a weight of each row times a covariance of what is read. Means over tokens, float64.
    """
    total, tokens = torch.zeros_like(writes.start), 0
    rows, width = total.shape
    covariance, weights = total.new_zeros(width, width), total.new_zeros(rows)
    for told in batches:
        run = writes(told, writes.start, sloped=True)
        total += writes.back(run, told.wanted.to(run.columns) - writes.written(run))
        weights += writes.weigh(run)
        tokens += len(run.inputs)
        inputs = run.inputs.double()
        covariance.addmm_(inputs.T, inputs)
        told.keep(run)
        del run  # and the graph, before the next
    covariance, weights = covariance / tokens, weights / tokens
    tiny = torch.finfo(torch.float32).tiny
    noise = (_DAMPING * covariance.diagonal().mean()).clamp_min(tiny)
    weights = weights.clamp_min((_LEAST_WEIGHT * weights.mean()).clamp_min(tiny)).unsqueeze(1)
    factor = torch.linalg.cholesky(covariance + noise * torch.eye(width).to(noise))
    return total / tokens, lambda slope: torch.cholesky_solve(slope.T, factor).T / weights


def _product(writes: Writes, batches: Sequence[Told], direction: Tensor) -> Tensor:
    """Return the matrix of the normal equations times ``direction``: a mean over tokens."""
    total, tokens = torch.zeros_like(direction), 0
    size = direction.abs().max()  # half precision has no small numbers
    for told in batches:
        run, moved = writes.moved(told, direction / size)
        total += writes.back(run, moved)
        tokens += len(moved)
        del run
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
