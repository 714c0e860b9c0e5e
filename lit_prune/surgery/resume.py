"""Many drafts on one text: each runs from the first layer in which it differs from the last."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lit_prune.surgery.mask import Instead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from lit_prune.plan import LayerPlan, PruningPlan

Found = TypeVar("Found")


class Resumed:
    """Forwards of a masked model in which layers before the first change are not computed again.

    A search tries one change after the other, layer by layer: what a draft shares with the one
    before, from the embeddings on, is known, and on average half of the layers need not run. The
    result is the same to the bit: what a layer returned is given out again. (`RecordedRun` resumes
    too: many bypasses of one batch, always from the dense model.)

    Memory: one hidden state ``[batch, tokens, hidden_size]`` for each layer and batch, where the
    layers lie.

    Args:
        layers: The decoder's layers, in the order in which they run.
        batches: The text that every draft is measured on.

    Example:
        >>> import torch
        >>> from lit_prune.plan import LayerPlan, PruningPlan
        >>> class Loud(torch.nn.Identity):
        ...     def forward(self, hidden): print("computed"); return hidden
        >>> layers = torch.nn.ModuleList([Loud(), Loud()])
        >>> runs = Resumed(layers, [torch.ones(1)])
        >>> run = lambda batches: [layers[1](layers[0](hidden)) for hidden in batches]
        >>> first, last = LayerPlan(0, (0,), (0,)), LayerPlan(1, (0,), (0,))
        >>> runs.of(PruningPlan("", (first, last)), run)
        computed
        computed
        [tensor([1.])]
        >>> last = LayerPlan(1, (0,), ())  # unlike it in the last layer only
        >>> runs.of(PruningPlan("", (first, last)), run)
        computed
        [tensor([1.])]
    """

    def __init__(self, layers: nn.ModuleList, batches: Iterable[Any]) -> None:
        self._layers, self._batches = layers, list(batches)
        self._last: tuple[LayerPlan, ...] = ()
        self._returned: list[list[Any]] = [[None] * len(layers) for _ in self._batches]

    def of(self, plan: PruningPlan, measure: Callable[[Iterable[Any]], Found]) -> Found:
        """Return what ``measure`` finds when it runs the model, as ``plan`` masks it, on the text.

        Args:
            plan: What stays; the model must already be under its mask.
            measure: Gets the batches, and runs the model once on each before it takes the next.
        """
        same = [one == other for one, other in zip(plan.layers, self._last, strict=False)]
        first = same.index(False) if False in same else len(same)
        self._last = ()  # until all is done: after an error the text is half one draft's
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                forward = self._known if index < first else partial(self._computed, layer.forward)
                instead = Instead(layer, partial(forward, index))
                stack.callback(instead.remove)
            found = measure(self._in_turn())
        self._last = plan.layers
        return found

    def _in_turn(self) -> Iterator[Any]:
        for batch, returned in zip(self._batches, self._returned, strict=True):
            self._now = returned
            yield batch

    def _known(self, index: int, *_args: object, **_kwargs: object) -> Any:  # noqa: ANN401 - as the layer
        return self._now[index]

    def _computed(self, forward: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the layer
        self._now[index] = found = forward(*args, **kwargs)
        return found
