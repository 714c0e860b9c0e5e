"""A decoder layer on trial: a copy with random weights, run with outputs changed at will."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.decoder.calls import call_of
from lit_prune.decoder.projections import stores_transposed
from lit_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

# Rounding of float32 through one layer, as a fraction of the largest number; weights are random.
_TOLERANCE = 2e-5
# What did not change is computed of the same numbers in the same order.
_UNCHANGED = 1e-6

# Draws of one change: an activation may hide one of them.
_DRAWS = 3
# What a change adds, in standard deviations of the output that it changes.
_CHANGE = 4


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module, as things were then: a layer may add to an output in place later.

    Attributes:
        entered: The hidden state it was handed, first or as ``hidden_states``; None without one.
        residual: What it was handed second, or as ``residual``, where that is a tensor.
        output: What it returned, or the first of several.
        returned: How many things it returned; 1 where that was a tensor itself.
    """

    entered: Tensor | None
    residual: Tensor | None
    output: Tensor
    returned: int


class Trial:
    """One decoder layer, copied, whose weights tell every part from every other.

    A model at hand may have norms that are all ones, or weights that write next to nothing. What a
    layer computes of *any* weights says what it computes of its own, so the copy gets random ones;
    the layer itself is never run with them.

    Args:
        layer: The decoder layer; left as it is.
        args: What it got by position in a forward of the model.
        kwargs: What it got by name.
        path: Its path in the model, for messages.

    Raises:
        UnsupportedModelError: If the layer is not handed its hidden state first, or as
            ``hidden_states``.

    Example:
        >>> trial = Trial(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.ones(1, 2, 4),), {}, "")
        >>> first, other = trial.calls, trial.run({"0": torch.zeros_like})
        >>> same(first["1"].entered, first["0"].output), bool(other[""].output.any())
        (True, False)
    """

    def __init__(
        self, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], path: str
    ) -> None:
        self.path = path
        self.numbers = torch.Generator().manual_seed(0)
        self.layer = self._copied(layer)
        try:
            hidden, others = call_of(layer, args, kwargs)
        except KeyError as error:
            raise self.refusal(
                "gets its hidden state neither first nor as 'hidden_states'"
            ) from error
        self._others: dict[str, Any] = _widened(others)
        self.hidden = self.noise(hidden.float() if hidden.dtype.itemsize < 4 else hidden)

    @cached_property
    def calls(self) -> dict[str, Call]:
        """What `run` finds where nothing is changed."""
        return self.run()

    def refusal(self, what: str) -> UnsupportedModelError:
        """Return the error that says what cannot be inferred of this layer."""
        return not_inferred(f"{self.path} {what}")

    def noise(self, like: Tensor) -> Tensor:
        """Return normal numbers of the shape, dtype and device of a tensor."""
        return torch.randn(like.shape, generator=self.numbers).to(like)

    def by_token(self, tensor: Tensor) -> Tensor:
        """Return a tensor as ``[batch, tokens, numbers]``, whatever shape it is passed on in."""
        return tensor.reshape(*self.hidden.shape[:2], -1)

    def run(
        self,
        changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        *,
        layer: nn.Module | None = None,
    ) -> dict[str, Call]:
        """Run the layer; return what each of its modules was called with, in order of their ends.

        Args:
            changes: What is made of the outputs of modules, by path.
            layer: Another one to run in its place.

        Returns:
            The calls by path, the layer's own under ``""``.

        Raises:
            UnsupportedModelError: If a module with parameters runs twice.
        """
        layer = self.layer if layer is None else layer
        found: dict[str, Call] = {}
        handles = []
        for path, module in layer.named_modules():
            after = self._hook(path, found, (changes or {}).get(path))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            with torch.no_grad():
                layer(self.hidden.clone(), **self._others)
        finally:
            for handle in handles:
                handle.remove()
        if "" not in found:
            raise self.refusal("returns no tensor")
        return found

    def moves(self, rows: Tensor | None, token: int) -> Callable[[Tensor], Tensor]:
        """Return a change of some numbers (all: None) of an output, at one token."""

        def change(output: Tensor) -> Tensor:
            moved = output.clone()
            flat = self.by_token(moved)
            where = slice(None) if rows is None else rows.to(output.device)
            at = flat[:, token, where]
            flat[:, token, where] = at + _CHANGE * self.noise(at) * flat.std()
            return flat.reshape(output.shape)

        return change

    def shown(
        self,
        changes: Mapping[str, Callable[[Tensor], Tensor]],
        path: str,
    ) -> Tensor:
        """Return where changes show in what a module is handed, ``[tokens, columns]``, bool.

        Args:
            changes: As `run` takes them.
            path: Of the module.
        """
        before = self.calls[path].entered
        shown = []
        for _ in range(_DRAWS):  # `moves` draws anew each time
            after = self.run(changes)[path].entered
            if before is None or after is None:
                raise self.refusal(f"hands {path} no tensor")
            shown.append(moved(self.by_token(before), self.by_token(after)))
        return torch.stack(shown).any(0)

    def _hook(self, path: str, found: dict[str, Call], change: Any) -> Any:  # noqa: ANN401 - a hook
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401
            if path in found and next(module.parameters(), None) is not None:
                raise self.refusal(f"runs {path} twice")
            if isinstance(_first(output), Tensor):
                found[path] = _seen(args, kwargs, output)
            return None if change is None else change(output)

        return after

    def _copied(self, layer: nn.Module) -> nn.Module:
        made = copy.deepcopy(layer).eval()
        for path, module in made.named_modules():
            if "forward" in vars(module):  # a copy of it would run the original
                raise self.refusal(f"has at {path or 'itself'} a forward that was put there")
            # whoever watches the model does not watch the trial
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                getattr(module, hooks).clear()
        if any(p.dtype.itemsize < 4 for p in made.parameters()):
            made = made.float()
        with torch.no_grad():
            for module in made.modules():
                read = 0 if stores_transposed(module) else -1
                for parameter in module.parameters(recurse=False):
                    noise = self.noise(parameter)
                    if parameter.ndim > 1:  # a matrix, or a norm for each head
                        parameter.copy_(noise / math.sqrt(parameter.shape[read]))
                    else:
                        parameter.add_(0.2 * noise)
        return made


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors hold the same numbers, but for rounding and shape.

    Example:
        >>> same(torch.ones(2, 3), torch.ones(6)), same(torch.ones(2), None)
        (True, False)
    """
    if one is None or other is None or one.numel() != other.numel():
        return False
    one, other = one.flatten().double(), other.flatten().double()
    return bool((one - other).abs().max() <= _TOLERANCE * max(one.abs().max(), other.abs().max()))


def moved(before: Tensor, after: Tensor) -> Tensor:
    """Return which ``[tokens, columns]`` changed between two runs, ``[batch, tokens, columns]``.

    Example:
        >>> moved(torch.ones(1, 1, 2), torch.tensor([[[1.0, 2.0]]])).tolist()
        [[False, True]]
    """
    return ((after - before).abs() > _UNCHANGED * before.abs().max()).any(0)


def not_inferred(what: str, others: Collection[str] = ()) -> UnsupportedModelError:
    """Return an error that says what is not explained, what was found, and what to do.

    Example:
        >>> print(not_inferred("m.layers.0 runs twice"))  # doctest: +ELLIPSIS
        No family is inferred: m.layers.0 runs twice. Declare one by hand...
    """
    found = f" (found: {', '.join(others)})" if others else ""
    return UnsupportedModelError(
        f"No family is inferred: {what}{found}. Declare one by hand, if its fields can say it: "
        "lit_prune.decoder.register_family(Family(...)), and check it by "
        "lit_prune.testing.check_family."
    )


def _seen(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Call:  # noqa: ANN401
    entered = args[0] if args else kwargs.get("hidden_states")
    residual = args[1] if len(args) > 1 else kwargs.get("residual")
    return Call(
        entered.clone() if isinstance(entered, Tensor) else None,
        residual.clone() if isinstance(residual, Tensor) else None,
        _first(output).clone(),
        len(output) if isinstance(output, tuple | list) else 1,
    )


def _first(output: Any) -> Any:  # noqa: ANN401 - what a module returns
    return output[0] if isinstance(output, tuple | list) and output else output


def _widened(value: Any) -> Any:  # noqa: ANN401 - what a layer is called with
    """Return arguments in float32 where they are coarser: the copy's weights are."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value
    if isinstance(value, dict):
        return {key: _widened(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_widened(each) for each in value)
    return value
