"""The dense model and the one pruned so far, side by side, one layer at a time."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.inputs import by_token
from lit_prune.calibration.regression import RegressionMoments
from lit_prune.calibration.shelf import Shelf, shelves
from lit_prune.decoder import KINDS, call_of
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.hooks import RemovableHandle

    from lit_prune.calibration.rows import RowSet
    from lit_prune.calibration.split import Side
    from lit_prune.decoder import DecoderParts, SubBlock


@dataclass(frozen=True, slots=True)
class TwoStreams:
    """One batch on its way through the decoder, twice. Use inside `quiet`.

    Of each layer the dense model goes first (`lead`), then the pruned one goes up to a sub-block
    (`arrive`), can be looked at there, and goes after it (`follow`).

    Attributes:
        mask: Real tokens, ``[batch, tokens]``.
        arguments: What each layer is told beside its hidden state.
        shelf: Residual streams, ``[batch, tokens, hidden_size]`` each: ``dense`` and ``pruned``
            behind the last layer that either went through, and ``middle``, behind the attention
            of the last layer that the dense one went through, where a stream is there. Where a norm
            follows a sub-block, ``attention`` and ``mlp``: what the dense one handed to it.
            ``attention reads`` and ``mlp reads``: what its input projections got there. And of the
            sub-block that the pruned one has come to: the ``stream`` that its norm gets, and what
            it is ``called`` with.
        calls: The call of that one sub-block in the pruned model, to repeat (where it has no module
            of its own: of its layer).
    """

    mask: Tensor
    arguments: list[dict[str, Any]]
    shelf: Shelf
    calls: dict[SubBlock, Callable[[], Any]] = field(default_factory=dict)

    def lead(self, parts: DecoderParts, layer: int) -> None:
        """Take the dense model through a layer."""
        watched = {
            name: parts.layers[layer].get_submodule(path) for name, path in _watched(parts).items()
        }
        for kind in KINDS:
            if parts.exists(layer, kind) and not parts.routed(layer, kind):
                watched[f"{kind} reads"] = _reader(parts, (layer, kind))
        with ExitStack() as hooks:
            seen = {name: hooks.enter_context(inputs_of(m)) for name, m in watched.items()}
            self.shelf["dense"] = self._run(parts, layer, self.shelf["dense"])
        for name, found in seen.items():
            self.shelf[name] = by_token(found[0], self.mask)

    def arrive(self, parts: DecoderParts, place: SubBlock) -> None:
        """Take the pruned model up to a sub-block, as its layer is now, and keep what that is told.

        For `reads`, `enters` and ``calls``, which may then be asked as often as needed.
        """
        layer, kind = place
        self.calls.clear()
        for name in [name for name in self.shelf if name.startswith("called")]:
            del self.shelf[name]
        norm, inside = parts.norm_path(kind), parts.is_inside(layer, kind)
        stream: list[Tensor] = []
        with ExitStack() as hooks:
            if norm is not None:
                stream = hooks.enter_context(inputs_of(parts.layers[layer].get_submodule(norm)))
            # left first: it ends the forward
            module = parts.sub_block(layer, kind) if inside else _reader(parts, place)
            calls = hooks.enter_context(_call_to(module))
            self._run(parts, layer, self.shelf["pruned"])
        if stream:
            self.shelf["stream"] = by_token(stream[0], self.mask)
        if not inside:  # what it is made of is called by the layer
            self.calls[place] = lambda: self._run(parts, layer, self.shelf["pruned"])
            return
        args, kwargs = calls[0]
        size = self.mask.numel() * parts.hidden_size
        told = [self._put(f"called {i}", value, size) for i, value in enumerate(args)]
        named = {name: self._put(f"called {name}", x, size) for name, x in kwargs.items()}
        self.calls[place] = lambda: module(
            *(get() for get in told), **{name: get() for name, get in named.items()}
        )

    def reads(self, parts: DecoderParts, place: SubBlock) -> tuple[Tensor, Tensor]:
        """Return what the input projections of a sub-block get: in the pruned model, and in the
        dense one.
        """  # noqa: D205 - one sentence
        with inputs_of(_reader(parts, place), last=True) as inputs:
            self.calls[place]()
        return by_token(inputs[0], self.mask), self.shelf[f"{place[1]} reads"]

    def finals(self, parts: DecoderParts) -> tuple[Tensor, Tensor]:
        """Return what the head gets, behind the last layer: in the pruned model, in the dense."""
        norm = parts.final_norm
        return norm(self.shelf["pruned"]), norm(self.shelf["dense"])

    def enters(self, parts: DecoderParts, place: SubBlock) -> tuple[Tensor, Tensor]:
        """Return what the output projection of a sub-block gets in the pruned model, and what it
        should make of it.

        It is run as it is now: hooks of the caller count.
        """  # noqa: D205 - one sentence
        module = parts.output(*place).module
        if self._shares_its_goal(parts, place):
            with inputs_of(module) as inputs:
                wanted = self.wanted(parts, place)
            return by_token(inputs[0], self.mask), wanted
        with inputs_of(module, last=True) as inputs:
            self.calls[place]()
        return by_token(inputs[0], self.mask), self.wanted(parts, place)

    def wanted(self, parts: DecoderParts, place: SubBlock) -> Tensor:
        """Return what the output projection of a sub-block should make.

        What takes the stream to where the dense model's is behind the layer's sub-block. Where a
        norm follows, that is not linear in it: what the dense one makes. Where attention and MLP
        are added together, there is no stream between them: what it makes now, and what the whole
        layer then lacks.
        """
        layer, kind = place
        if kind in _watched(parts):
            return self.shelf[kind]
        if self._shares_its_goal(parts, place):
            with _outputs_of(parts.output(*place).module) as outputs:
                behind = self._run(parts, layer, self.shelf["pruned"])
            lacks = (self.shelf["dense"] - behind) / parts.residual_scale
            return by_token(outputs[0], self.mask) + lacks
        goal = self.shelf["dense" if kind == "mlp" else "middle"]
        return (goal - self.shelf["stream"]) / parts.residual_scale

    def _shares_its_goal(self, parts: DecoderParts, place: SubBlock) -> bool:
        return parts.family.parallel and place[1] not in _watched(parts)

    def _put(self, name: str, value: object, size: int) -> Callable[[], object]:
        """Keep a hidden state on the shelf; anything else is small, or shared by batches."""
        if not isinstance(value, Tensor) or value.numel() != size:
            return lambda: value
        self.shelf[name] = value
        return lambda: self.shelf[name]

    def follow(self, parts: DecoderParts, layer: int) -> None:
        """Take the pruned model through a layer, as that is now."""
        self.shelf["pruned"] = self._run(parts, layer, self.shelf["pruned"])

    def _run(self, parts: DecoderParts, layer: int, hidden: Tensor) -> Tensor:
        output = parts.layers[layer](hidden, **self.arguments[layer])
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found


def _reader(parts: DecoderParts, place: SubBlock) -> nn.Module:
    module: nn.Module = parts.input_modules(*place)[0].module
    return module


def _watched(parts: DecoderParts) -> dict[str, str]:
    """Return the norms of a layer whose inputs are kept, by what they are kept as."""
    found: dict[str, str] = {}
    after = {kind: parts.post_norm_path(kind) for kind in KINDS}
    found |= {kind: path for kind, path in after.items() if path is not None}
    middle = parts.norm_path("mlp")
    if after["attention"] is None and middle is not None and not parts.family.parallel:
        found["middle"] = middle
    return found


def regression_of(
    batches: Sequence[TwoStreams], pair: Callable[[TwoStreams], tuple[Tensor, Tensor]], where: str
) -> RegressionMoments:
    """Return what a regression of one thing on another needs, over the real tokens of batches.

    Args:
        batches: At least one.
        pair: Inputs and target of each, ``[batch, tokens, width]`` both.
        where: Where that is, for messages.

    Raises:
        CalibrationError: If a value is not finite.
    """
    moments = RegressionMoments()
    for number, batch in enumerate(batches):
        inputs, target = (part[batch.mask] for part in pair(batch))
        if not bool(torch.isfinite(inputs).all() & torch.isfinite(target).all()):
            raise CalibrationError(
                f"{where}, batch {number}: activations behind the pruned "
                "prefix are not finite. Use bfloat16 or float32, or "
                "compensation='least_squares'. The model is unchanged."
            )
        moments.update(inputs, target)
    return moments


@contextmanager
def two_streams(
    parts: DecoderParts, rows: RowSet, sides: Sequence[Side], batch_tokens: int
) -> Iterator[dict[Side, list[TwoStreams]]]:
    """Run the sides once; keep what enters the decoder, and what every layer is told beside.

    Hidden states that would take more memory than the weights lie in a temporary directory.

    Args:
        parts: The dense model's parts.
        rows: The text.
        sides: Which of it.
        batch_tokens: Tokens of one forward.
    """
    first = next(parts.model.parameters())
    padded = sum(
        batch.attention_mask.numel() for side in sides for batch in rows.batches(side, batch_tokens)
    )
    expected = (
        (5 + len(KINDS) + len(_watched(parts))) * padded * parts.hidden_size * first.element_size()
    )
    weights = sum(parameter.nbytes for parameter in parts.model.parameters())
    with shelves(expected, weights, first.device) as new_shelf:
        found: dict[Side, list[TwoStreams]] = {side: [] for side in sides}
        told: list[dict[str, Any]] = []
        for side in sides:
            for batch in rows.batches(side, batch_tokens):
                with _calls_of(parts.layers) as calls:
                    parts.model.base_model(**batch.model_inputs(first.device), use_cache=False)
                mask = batch.attention_mask.to(first.device)
                told = _shared([arguments for _, arguments in calls], told)
                shelf = new_shelf()
                shelf["dense"] = shelf["pruned"] = calls[0][0]
                found[side].append(TwoStreams(mask, told, shelf))
        yield found


def _shared(told: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the layers were told; of the batch before where it is the same, to hold it once.

    Positions and masks of like batches are equal, and of long texts they are many.
    """
    return before if len(told) == len(before) and all(map(_same, told, before)) else told


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


@contextmanager
def _calls_of(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Collect how each layer is called; of the hidden states only the first is kept."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, others = call_of(layer, args, kwargs)
        calls.append((hidden if not calls else calls[0][0], others))

    handles = [
        layer.register_forward_pre_hook(note, with_kwargs=True, prepend=True) for layer in layers
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _call_to(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Collect how a module is called; the forward ends there."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    # first of all: what other hooks make of the call they make of it again
    with _hooked(module.register_forward_pre_hook(note, with_kwargs=True, prepend=True)):
        yield found


class _Reached(Exception):  # noqa: N818 - what was wanted is there
    pass


@contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    """Keep a hook for the time of the ``with``, which it may end."""
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


@contextmanager
def inputs_of(module: nn.Module, *, last: bool = False) -> Iterator[list[Tensor]]:
    """Collect what a module gets; if it is the ``last`` that matters, the forward ends there."""
    found: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        if last:
            raise _Reached

    with _hooked(module.register_forward_pre_hook(note)):
        yield found


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module makes: copies, for a layer may add to it in place."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: object, output: Tensor) -> None:
        found.append(output.clone())

    with _hooked(module.register_forward_hook(note)):
        yield found
