"""The dense model and the one pruned so far, side by side, one layer at a time."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_prune.calibration.rows import RowSet
    from lit_prune.calibration.split import Side
    from lit_prune.decoder import DecoderParts, SubBlock, SubBlockKind


@dataclass(slots=True)
class TwoStreams:
    """One batch on its way through the decoder, twice. Use inside `quiet`.

    Of each layer the dense model goes first (`lead`), then the pruned one can be looked at
    (`enters`) and goes after it (`follow`).

    Attributes:
        mask: Real tokens, ``[batch, tokens]``.
        arguments: What each layer is told beside its hidden state.
        dense: The dense model's residual stream behind the last layer that it went through,
            ``[batch, tokens, hidden_size]``; behind its attention, in ``middle``.
        pruned: The stream of the model that is pruned so far.
    """

    mask: Tensor
    arguments: list[dict[str, Any]]
    dense: Tensor
    pruned: Tensor
    middle: Tensor | None = None

    def lead(self, parts: DecoderParts, layer: int) -> None:
        """Take the dense model through a layer."""
        with _inputs_of(parts.layers[layer].get_submodule(parts.norm_path("mlp"))) as middle:
            self.dense = self._run(parts, layer, self.dense)
        self.middle = middle[0]

    def goal(self, kind: SubBlockKind) -> Tensor:
        """Return what the dense model's stream holds behind a sub-block of the layer it led."""
        if kind == "mlp":
            return self.dense
        assert self.middle is not None  # noqa: S101 - the order of calls
        return self.middle

    def enters(self, parts: DecoderParts, place: SubBlock) -> tuple[Tensor, Tensor]:
        """Return what the output projection of a sub-block gets in the pruned model, and the stream
        that it will add to. The layer is run as it is now: hooks of the caller count.
        """  # noqa: D205 - one sentence
        norm = parts.layers[place[0]].get_submodule(parts.norm_path(place[1]))
        with _inputs_of(norm) as stream, _inputs_of(parts.output(*place)) as inputs:
            self._run(parts, place[0], self.pruned)
        return inputs[0], stream[0]

    def follow(self, parts: DecoderParts, layer: int) -> None:
        """Take the pruned model through a layer, as that is now."""
        self.pruned = self._run(parts, layer, self.pruned)

    def _run(self, parts: DecoderParts, layer: int, hidden: Tensor) -> Tensor:
        output = parts.layers[layer](hidden, **self.arguments[layer])
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found


def two_streams(
    parts: DecoderParts, rows: RowSet, side: Side, batch_tokens: int
) -> list[TwoStreams]:
    """Run one side once; keep what enters the decoder, and what every layer is told beside.

    Args:
        parts: The dense model's parts.
        rows: The text.
        side: Which of it.
        batch_tokens: Tokens of one forward.
    """
    device = next(parts.model.parameters()).device
    found = []
    for batch in rows.batches(side, batch_tokens):
        with _calls_of(parts.layers) as calls:
            parts.model.base_model(**batch.model_inputs(device), use_cache=False)
        entered, mask = calls[0][0], batch.attention_mask.to(device)
        found.append(TwoStreams(mask, [told for _, told in calls], entered, entered))
    return found


@contextmanager
def _calls_of(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Collect how each layer is called; of the hidden states only the first is kept."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden if not calls else calls[0][0], kwargs))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    try:
        yield found
    finally:
        handle.remove()
