"""What a sub-block writes, as a function of the weights that it reads with, and its slopes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_prune.calibration import by_token, inputs_of
from lit_prune.surgery import Instead, compensated_inputs, fitted_inputs, unit_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_prune.calibration import TwoStreams
    from lit_prune.decoder import DecoderParts, SubBlock
    from lit_prune.surgery import Compensation


class Writes:
    """What a sub-block writes, as a function of the weights that it reads with.

    Args:
        parts: The dense model's parts.
        place: `can_be_fitted_inside`.
        kept: Units that stay.
        made: What was fitted so far.

    Attributes:
        start: The weights that it reads with so far, of one of `fitted_inputs` after the other,
            ``[rows of units that stay, hidden_size]``, float64.
    """

    def __init__(
        self, parts: DecoderParts, place: SubBlock, kept: Sequence[int], made: Compensation
    ) -> None:
        self.parts, self.place = parts, place
        inputs, self._output = fitted_inputs(parts, place), parts.output(*place)
        self._modules = [each.module for each in inputs]
        like = self._output.weight
        self._lines = [each.lines_of(kept).to(like.device) for each in inputs]
        self._sizes = [len(lines) for lines in self._lines]
        self._columns = unit_columns(kept, parts.unit_width(*place)).to(like.device)
        self._units, self.is_attention = len(kept), place[1] == "attention"
        units = torch.arange(self._units, device=like.device)
        self._own = torch.cat([units.repeat_interleave(x // self._units) for x in self._sizes])
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
        wanted = batch.wanted(self.parts, self.place)[batch.mask]
        bias = self._output.bias
        wanted = wanted if bias is None else wanted - bias.detach()
        return wanted if self._constant is None else wanted - self._constant.to(wanted)

    def __call__(
        self, told: Told, weight: Tensor, *, biased: bool = True, sloped: bool = False
    ) -> Run:
        """Run a batch with other weights.

        Args:
            told: What to call.
            weight: As ``start``.
            biased: False leaves the biases of what is fitted out.
            sloped: Whether `back` will be asked.
        """
        read: list[Tensor] = []
        said: dict[nn.Module, Tensor] = {}

        def forward(module: nn.Module, bias: Tensor | None, whole: Tensor, x: Tensor) -> Tensor:
            read.append(x)
            output = nn.functional.linear(x, whole, bias)
            said[module] = output.requires_grad_(sloped)
            return output.clone()  # which may be changed in place

        rows = weight.split(self._sizes)
        of_each = zip(self._modules, self._matrices, self._lines, rows, strict=True)
        with torch.set_grad_enabled(sloped), ExitStack() as stack:
            for module, matrix, lines, new in of_each:
                bias = None if module.bias is None else module.bias.detach()
                if bias is not None and not biased:
                    bias = bias.index_fill(0, lines, 0)
                whole = matrix.index_copy(0, lines, new.to(matrix))
                stack.callback(Instead(module, partial(forward, module, bias, whole)).remove)
            got = stack.enter_context(inputs_of(self._output.module, last=True))
            told.call()
        with torch.set_grad_enabled(sloped):
            inputs, columns = told.real(read[0]), told.real(got[0])
            kept = columns.index_select(1, self._columns)
        run = Run(told, inputs, [said[x] for x in self._modules], kept)
        if sloped and not self.is_attention:
            # a channel gets what its own rows say, each token by itself: this tells all slopes
            run.own = self._slopes(run, torch.ones_like(kept))
        return run

    def _slopes(self, run: Run, of_columns: Tensor) -> Tensor:
        """Return slopes of what rows say from those of columns, ``[real tokens, rows]``."""
        if not run.columns.requires_grad:  # something in between has no slope
            return run.columns.new_zeros(len(run.columns), sum(self._sizes))
        found = torch.autograd.grad(
            run.columns, run.said, of_columns, allow_unused=True, materialize_grads=True
        )
        pairs = zip(found, self._lines, strict=True)
        return torch.cat([run.told.real(x).index_select(1, lines) for x, lines in pairs], 1)

    def written(self, run: Run) -> Tensor:
        """Return what the columns add up to, ``[real tokens, hidden_size]``."""
        return nn.functional.linear(run.columns.detach(), self._written)

    def back(self, run: Run, of_written: Tensor) -> Tensor:
        """Return slopes of the weights from those of what is written, as ``start``: a sum.

        Once for each run of an attention, whose slopes are the same wherever it stands.
        """
        # half precision has no small numbers, nor large ones
        far = of_written.abs().max().clamp_min(torch.finfo(of_written.dtype).tiny)
        of_columns = (of_written / far) @ self._written
        if run.own is None:
            of_rows = self._slopes(run, of_columns)
        else:
            of_rows = torch.empty_like(run.own)
            for own, of_own in zip(self._by_unit(run.own), self._by_unit(of_rows), strict=True):
                torch.mul(own, of_columns.unsqueeze(2), out=of_own)
        inputs = run.inputs
        if inputs.dtype is torch.float16:  # a sum over tokens is beyond its largest
            of_rows, inputs = of_rows.float(), inputs.float()
        return (of_rows.T @ inputs).double() * far.double()

    def moved(self, told: Told, direction: Tensor) -> tuple[Run, Tensor]:
        """Return how what is written moves with the weights, ``[real tokens, hidden_size]``.

        Returns:
            Also a run, for `back`.
        """
        if self.is_attention:  # it is linear
            run = self(told, direction, biased=False, sloped=True)
            return run, self.written(run)
        run = told.kept() or self(told, self.start, sloped=True)
        assert run.own is not None  # noqa: S101 - for the type checker
        moves = (run.inputs @ direction.to(run.inputs).T).mul_(run.own)
        of_each = (
            # a sum of one is slow
            part.squeeze(2) if part.shape[2] == 1 else part.sum(2)
            for part in self._by_unit(moves)
        )
        return run, nn.functional.linear(reduce(torch.add, of_each), self._written)

    def _by_unit(self, rows: Tensor) -> list[Tensor]:
        """Return views by projection: ``[tokens, units, rows of a unit]``."""
        return [part.unflatten(1, (self._units, -1)) for part in rows.split(self._sizes, 1)]

    def weigh(self, run: Run) -> Tensor:
        """Return how much each row weighs in what is written, squared: a sum over tokens.

        In an attention, but for its pattern.
        """
        weights = self._written.double().square().sum(0)
        if run.own is None:
            by_head = weights.reshape(self._units, -1, self._sizes[0] // self._units)
            return len(run.inputs) * by_head.sum(1).flatten()
        exact = torch.promote_types(run.own.dtype, torch.float32)
        slopes: Tensor = torch.linalg.vector_norm(run.own, dim=0, dtype=exact)
        return weights[self._own] * slopes.double().square()

    def error(self, batches: Sequence[Told], change: Tensor) -> float:
        """Return the mean squared error of a token, with changed weights."""
        total, tokens = 0.0, 0
        for told in batches:
            written = self.written(self(told, self.start + change))
            total += float((told.wanted - written).double().square().sum())
            tokens += len(written)
        return total / tokens


@dataclass(slots=True, eq=False)
class Run:
    """One batch on its way through a sub-block.

    Attributes:
        told: The batch.
        inputs: What is read, ``[real tokens, hidden_size]``.
        said: What the projections make of it, as they made it; none where that was kept.
        columns: What the kept columns of the output projection get, ``[real tokens, columns]``;
            none where that was kept.
        own: Of an MLP, the slope of what a row's own column gets, ``[real tokens, rows]``.
    """

    told: Told
    inputs: Tensor
    said: list[Tensor]
    columns: Tensor
    own: Tensor | None = None


class Told:
    """One batch: the call of the sub-block, and what its output projection should make."""

    def __init__(self, batch: TwoStreams, writes: Writes) -> None:
        self._mask, self._shelf, self.call = batch.mask, batch.shelf, batch.calls[writes.place]
        self._all_real = bool(batch.mask.all())
        self._shelf["wanted"] = writes.wanted(batch)

    @property
    def wanted(self) -> Tensor:
        """``[real tokens, hidden_size]``."""
        return self._shelf["wanted"]

    def keep(self, run: Run) -> None:
        """Keep what an MLP read and its slopes: they are the same in every step of a round.

        On a CPU alone: there they are read faster than made again, wherever the shelf is.
        """
        if run.own is not None and run.own.device.type == "cpu":
            self._shelf["inputs"], self._shelf["own"] = run.inputs, run.own

    def kept(self) -> Run | None:
        """Return what was kept: enough for the slopes of an MLP."""
        if "own" not in self._shelf:
            return None
        own = self._shelf["own"]
        return Run(self, self._shelf["inputs"], [], own.new_empty(len(own), 0), own)

    def forget(self) -> None:
        """Make room."""
        for name in ("inputs", "own"):
            self._shelf.pop(name, None)

    def real(self, values: Tensor) -> Tensor:
        """Return those of real tokens, ``[real tokens, …]``."""
        values = by_token(values, self._mask)
        return values.flatten(0, 1) if self._all_real else values[self._mask]
