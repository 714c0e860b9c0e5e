"""What surrounds the decoder layers: found in one forward of the model on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.decoder.infer.trial import Trial, not_inferred, same
from lit_prune.decoder.projections import is_projection
from lit_prune.decoder.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Short enough for any window, long enough for a token with two before and three behind it.
_BATCH, _TOKENS = 2, 6


@dataclass(frozen=True, slots=True, eq=False)
class Outside:
    """A model's layers, and what leads to them and from them.

    Attributes:
        path: Of the stack of layers.
        layers: Those.
        final_norm: Path of the norm behind them.
        head: Path of the projection to logits.
        embedding_norm: Path of the norm in front of them.
        handed: What each layer was called with, by position and by name.
    """

    path: str
    layers: nn.ModuleList
    final_norm: str
    head: str
    embedding_norm: str | None
    handed: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def trial(self, index: int) -> Trial:
        """Return a layer on trial."""
        return Trial(self.layers[index], *self.handed[index], f"{self.path}.{index}")


def watch(model: PreTrainedModel) -> Outside:
    """Run a model once on a few tokens, and say what surrounds its decoder layers.

    The layers are the one list of modules of one class, as many as ``config.num_hidden_layers``,
    that hold linear projections. Each must read what the one before it returned.

    Args:
        model: A causal language model; it is left as it is, without hooks.

    Raises:
        UnsupportedModelError: If there is no such list or several, or what is not exactly one norm
            lies between the last layer and the head.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
        >>> outside = watch(model)
        >>> outside.path, outside.final_norm, outside.head, outside.embedding_norm
        ('transformer.h', 'transformer.ln_f', 'lm_head', None)
    """
    path, layers = _layers_of(model)
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    if head is None or not heads:
        raise not_inferred(f"{type(model).__name__} has no output embeddings")
    seen = _Seen(model, path, layers)
    for index in range(1, len(layers)):
        if not same(seen.entered.get(f"{path}.{index}"), seen.left.get(f"{path}.{index - 1}")):
            raise not_inferred(f"{path}.{index} does not read what the layer before it returned")
    last, first = f"{path}.{len(layers) - 1}", f"{path}.0"
    behind = [name for name in seen.order(after=last) if same(seen.entered[name], seen.left[last])]
    if len(behind) != 1 or not same(seen.left[behind[0]], seen.entered.get(heads[0])):
        raise not_inferred(
            f"between {last} and {heads[0]} lies something else than one norm", behind
        )
    front = [
        name for name in seen.order(before=first) if same(seen.left[name], seen.entered[first])
    ]
    if len(front) > 1:
        raise not_inferred(f"several modules hand {first} what it reads", front)
    return Outside(path, layers, behind[0], heads[0], next(iter(front), None), tuple(seen.handed))


def _layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    count = getattr(model.config, "num_hidden_layers", None)
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    found = {
        name: module
        for name, module in lists.items()
        if len(module) == count
        and len({type(each) for each in module}) == 1
        and any(is_projection(each) for each in module[0].modules())
    }
    if len(found) != 1:
        told = [
            f"{name}: {len(m)} × {'/'.join(sorted({type(e).__name__ for e in m}))}"
            for name, m in lists.items()
        ]
        raise not_inferred(
            f"{type(model).__name__} has {len(found)} lists of num_hidden_layers = {count!r} "
            "modules of one class with linear projections, expected one",
            told or ["no torch.nn.ModuleList"],
        )
    return next(iter(found.items()))


class _Seen:
    """One forward, as hooks saw it; they are gone when this is made."""

    def __init__(self, model: PreTrainedModel, path: str, layers: nn.ModuleList) -> None:
        self.entered: dict[str, Tensor] = {}
        self.left: dict[str, Tensor] = {}
        self.handed: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handles = []
        for name, module in model.named_modules():
            is_layer = module in set(layers)
            leaf = next(module.children(), None) is None and not isinstance(module, nn.Embedding)
            if is_layer or (leaf and not name.startswith(f"{path}.")):
                handles.append(module.register_forward_hook(self._hook(name, is_layer),
                                                            with_kwargs=True))  # fmt: skip
        embeddings: Any = model.get_input_embeddings()
        vocabulary = int(embeddings.num_embeddings)
        ids = torch.randint(
            min(3, vocabulary - 1), vocabulary, (_BATCH, _TOKENS),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        try:
            with quiet(model):
                model(input_ids=ids.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(self.handed) != len(layers):
            raise not_inferred(f"{len(self.handed)} of {len(layers)} calls of {path} were seen")

    def order(self, *, after: str | None = None, before: str | None = None) -> list[str]:
        """Return what changes a hidden state and lies outside the layers, in the order it ran."""
        names = list(self.left)
        names = names[names.index(after) + 1 :] if after else names[: names.index(before or "")]
        hidden = self.left[after or before or ""].shape
        return [
            name
            for name in names
            if self.left[name].shape == self.entered[name].shape == hidden
            and not same(self.left[name], self.entered[name])  # dropout
        ]

    def _hook(self, name: str, is_layer: bool) -> Any:  # noqa: ANN401 - a hook
        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
            entered = args[0] if args else kwargs.get("hidden_states")
            left = output[0] if isinstance(output, tuple | list) else output
            if isinstance(entered, Tensor) and isinstance(left, Tensor):
                self.entered[name], self.left[name] = entered.clone(), left.clone()
            if is_layer:
                self.handed.append((args, kwargs))

        return after
