"""The model with one unit bypassed, from a recorded run: about half a forward each."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_prune.decoder import KINDS, DecoderParts, call_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_prune.decoder import ConstantOutput

BypassKind = Literal["block", "attention", "mlp"]


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """A block, an attention or an MLP that can be skipped."""

    layer: int
    kind: BypassKind

    def __str__(self) -> str:
        """Return e.g. ``layer 3 attention``."""
        return f"layer {self.layer}" + ("" if self.kind == "block" else f" {self.kind}")


def bypass_units(parts: DecoderParts) -> tuple[Unit, ...]:
    """Return every unit that exists: each block and each sub-block not removed before."""
    units: list[Unit] = []
    for layer in range(len(parts.layers)):
        existing = [kind for kind in KINDS if parts.exists(layer, kind)]
        if existing:
            units += [Unit(layer, "block"), *(Unit(layer, kind) for kind in existing)]
    return tuple(units)


class RecordedRun:
    """One forward of the decoder whose layer inputs are kept, so that any suffix can be run again.

    Memory: one hidden state ``[batch, tokens, hidden_size]`` for each layer. Use inside `quiet`.

    Args:
        parts: The model's parts.
        inputs: Arguments of the forward, ``input_ids`` and perhaps ``attention_mask``.

    Attributes:
        output: Hidden state that enters the final norm, ``[batch, tokens, hidden_size]``.
    """

    def __init__(self, parts: DecoderParts, inputs: dict[str, Tensor]) -> None:
        self._parts = parts
        self._entries: list[tuple[Tensor, dict[str, Any]]] = []
        output: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(self._record, with_kwargs=True)
            for layer in parts.layers
        ]
        handles.append(
            parts.final_norm.register_forward_pre_hook(lambda _module, args: output.append(args[0]))
        )
        try:
            parts.model.base_model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.output = output[0]

    def _record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entries.append(call_of(layer, args, kwargs))

    def without(self, unit: Unit, constant: Tensor | None = None) -> Tensor:
        """Return the hidden state that would enter the final norm if ``unit`` were the identity.

        Args:
            unit: What to bypass: only its residual connection stays.
            constant: What a bypassed attention or MLP returns, ``[hidden_size]``; None: nothing.

        Returns:
            ``[batch, tokens, hidden_size]``.
        """
        hidden, kwargs = self._entries[unit.layer]
        layers = self._parts.layers
        if unit.kind != "block":
            module = self._parts.sub_block(unit.layer, unit.kind)
            bias = None if constant is None else nn.Parameter(constant, requires_grad=False)
            with silenced(module, self._parts.constant(unit.layer, unit.kind, bias)):
                hidden = _first(layers[unit.layer](hidden, **kwargs))
        for layer in range(unit.layer + 1, len(layers)):
            hidden = _first(layers[layer](hidden, **self._entries[layer][1]))
        return hidden


@contextmanager
def silenced(module: nn.Module, constant: ConstantOutput) -> Iterator[None]:
    """Let a sub-block return a constant (or zero), uncomputed, the module tree unchanged."""
    # an instance attribute shadows the class's method: names, hooks and parameters stay
    own = vars(module).get("forward")  # somebody else's patch, put back after
    module.forward = constant.forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _first(output: Tensor | tuple[Any, ...]) -> Tensor:
    if isinstance(output, torch.Tensor):
        return output
    first = output[0]
    assert isinstance(first, Tensor)  # noqa: S101 - a decoder layer returns its hidden state first
    return first
