"""Seconds of single sub-blocks at several widths: what a budget in latency is allocated by."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.decoder import DecoderParts, SubBlock, call_of, quiet, spec_for
from lit_prune.decoder.projections import kept_lines, stores_transposed
from lit_prune.errors import ConfigError
from lit_prune.metrics.device import device_words, synchronize
from lit_prune.metrics.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

_POINTS = 16
_MULTIPLES = (64, 32, 16, 8, 4, 2, 1)
# In a whole model the weights of one sub-block have left the caches when their turn comes again.
# Copies of it take turns here, as many as the model has, until they surely fill a cache.
_COLD_BYTES = 1 << 28
_CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True, kw_only=True, slots=True)
class SubBlockLatency:
    """What was measured, and under what.

    Attributes:
        seconds: For each sub-block, rows of (kept units, median seconds), ``[widths, 2]``, float64.
        conditions: Device in words, dtype, batch size, prompt and new tokens, warm-up and
            repetitions, and the share of the time that threads waited for processors (None where
            the system does not say); JSON-able.
    """

    seconds: dict[SubBlock, Tensor]
    conditions: dict[str, Any]


def measure_sub_blocks(
    model: PreTrainedModel,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int = 1,
    warmup: int = 2,
    repetitions: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> SubBlockLatency:
    """Time every shape of sub-block at about 16 widths, on the device of the model.

    One forward over a prompt and ``new_tokens`` decoding steps of the whole model are recorded;
    then copies of a sub-block that keep only its first units are given exactly these calls, with
    its norm before it and a KV cache of its own. What is timed is all of them together: one prefill
    and ``new_tokens`` decoding steps, the device synchronised around them. Additions to the
    residual stream are not in it, nor is a norm that both sub-blocks of a layer read: they stay
    when a sub-block goes. Sub-blocks of equal shape share
    one measurement. The model is left as it was.

    Args:
        model: A supported causal language model, where it shall run.
        prompt_tokens: Tokens of the prompt. Which ones does not matter.
        new_tokens: Decoding steps.
        batch_size: Prompts at once.
        warmup: Runs thrown away at each width.
        repetitions: Runs measured; the median counts.
        clock: Returns seconds; read twice a run.

    Raises:
        ConfigError: If the clock stands still.

    Example:
        >>> import itertools
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=4, num_hidden_layers=2, num_attention_heads=2,
        ...     vocab_size=11)).eval()
        >>> ticks = itertools.count()
        >>> found = measure_sub_blocks(model, prompt_tokens=5, new_tokens=2,
        ...                            clock=lambda: float(next(ticks)))
        >>> found.seconds[1, "mlp"].tolist()
        [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0]]
    """
    spec, parts = spec_for(model), DecoderParts(model)
    parameter = next(model.parameters())
    shapes: dict[object, list[SubBlock]] = {}
    for index, part in spec.sub_blocks:
        keys = parts.attended_keys(index, prompt_tokens) if part.kind == "attention" else 0
        dtype = parts.output(index, part.kind).weight.dtype
        shapes.setdefault((replace(part, name=""), keys, dtype), []).append((index, part.kind))
    units = {(index, part.kind): part.num_units for index, part in spec.sub_blocks}
    seconds: dict[SubBlock, Tensor] = {}
    waiting = Waiting()
    with quiet(model):
        ids = torch.ones((batch_size, prompt_tokens), dtype=torch.int64, device=parameter.device)
        recorded = _record(parts, [places[0] for places in shapes.values()], ids, new_tokens)
        for places in shapes.values():
            calls = recorded[places[0]]
            rows = []
            whole = units[places[0]]
            unit = "kv_group" if places[0][1] == "attention" else "channel"
            # what the family cannot lose is not tried either
            for count in (whole,) if unit in dict(spec.refused) else ladder(whole):
                twins = _twins(parts, places[0], count, len(places))
                runs = [calls.time(twins, clock) for _ in range(warmup + repetitions)]
                rows.append((float(count), median(runs[warmup:])))
            seconds |= dict.fromkeys(places, torch.tensor(rows, dtype=torch.float64))
    conditions = {
        "device": device_words(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "warmup": warmup,
        "repetitions": repetitions,
        "waited": waiting.share(),
    }
    return SubBlockLatency(seconds=dict(sorted(seconds.items())), conditions=conditions)


def ladder(num_units: int) -> tuple[int, ...]:
    """Return the counts to measure, ascending: about 16, in multiples that hardware likes.

    Example:
        >>> ladder(4), ladder(11008)[:3], len(ladder(11008))
        ((1, 2, 3, 4), (704, 1408, 2048), 16)
    """
    multiple = next(m for m in _MULTIPLES if m * _POINTS <= num_units or m == 1)
    steps = (round(num_units * i / _POINTS / multiple) * multiple for i in range(1, _POINTS))
    return tuple(sorted({count for count in steps if count} | {num_units}))


class _Calls:
    """What one sub-block was called with: the input of its norm, and what the model adds."""

    def __init__(self, norm: nn.Module, after: nn.Module | None, cache: Callable[[], Any]) -> None:
        self.norm, self._after, self._cache = norm, after, cache
        self.entering: list[Tensor] = []
        self.others: list[dict[str, Any]] = []

    def time(self, twins: list[nn.Module], clock: Callable[[], float]) -> float:
        """Return the seconds of all calls, one after the other, on a fresh cache."""
        cache = self._cache()
        calls = []
        for number, (hidden, others) in enumerate(zip(self.entering, self.others, strict=True)):
            others = {n: cache if isinstance(x, type(cache)) else x for n, x in others.items()}
            calls.append((twins[number % len(twins)], hidden, others))
        device = self.entering[0].device
        synchronize(device)
        started = clock()
        for twin, hidden, others in calls:
            output = twin(self.norm(hidden), **others)
            if self._after is not None:
                self._after(output if isinstance(output, Tensor) else output[0])
        synchronize(device)
        finished = clock()
        if not started < finished:
            raise ConfigError(
                f"the clock advanced no time over {len(calls)} calls of a sub-block ({started}, "
                f"{finished}); expected one that is finer than that, time.perf_counter for "
                "instance."
            )
        return finished - started


def _record(
    parts: DecoderParts, places: list[SubBlock], ids: Tensor, new_tokens: int
) -> dict[SubBlock, _Calls]:
    """Run the whole model once: a prompt, then token after token."""
    from transformers import DynamicCache

    def fresh() -> DynamicCache:
        return DynamicCache(config=parts.model.config)

    recorded, handles = {}, []
    for layer, kind in places:
        leaving = parts.norm_paths(layer, kind)
        norm, after = (
            parts.layers[layer].get_submodule(path) if path in leaving else None
            for path in (parts.norm_path(kind), parts.post_norm_path(kind))
        )
        recorded[layer, kind] = calls = _Calls(norm or nn.Identity(), after, fresh)
        module = parts.sub_block(layer, kind)
        handles += [
            (norm or module).register_forward_pre_hook(
                partial(_keep_input, calls.entering), with_kwargs=True
            ),
            module.register_forward_pre_hook(partial(_keep_others, calls.others), with_kwargs=True),
        ]
    try:
        cache = fresh()
        for tokens in (ids, *[ids[:, :1]] * new_tokens):
            parts.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _keep_input(
    seen: list[Tensor], _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> None:
    seen.append(args[0] if args else kwargs["hidden_states"])


def _keep_others(
    seen: list[dict[str, Any]], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    seen.append(call_of(module, args, kwargs)[1])


def _twins(parts: DecoderParts, place: SubBlock, count: int, most: int) -> list[nn.Module]:
    """Return copies of a sub-block that keep the first ``count`` units."""
    narrow: dict[int, Tensor] = {}
    output = parts.output(*place)
    for each in parts.input_modules(*place):
        assert each.rows is not None  # noqa: S101 - units own rows of inputs
        lines = kept_lines(each.rows, range(count)).to(output.weight.device)
        for parameter in each.module.parameters():
            dim = 0 if parameter.ndim == 1 else each.dim(rows=True)
            narrow[id(parameter)] = parameter.index_select(dim, lines)
    columns = output.weight[:, : count * parts.unit_width(*place)]
    narrow[id(output.module.weight)] = output.oriented(columns)
    module = _whole(parts, place)
    kept = (narrow.get(id(p), p) for p in module.parameters())
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    number = min(most, -(-_COLD_BYTES // max(num_bytes, 1)))
    # what a deep copy finds in its memory it takes from there: narrow weights, no config, no hooks
    shared: dict[int, Any] = {id(parts.model.config): parts.model.config}
    for part in module.modules():
        shared |= {
            id(v): OrderedDict() for name, v in vars(part).items() if name.endswith("_hooks")
        }
    twins = []
    for _ in range(number):
        own = {
            key: nn.Parameter(tensor.detach().clone(memory_format=_CONTIGUOUS), requires_grad=False)
            for key, tensor in narrow.items()
        }
        twin = copy.deepcopy(module, {**shared, **own})
        if place[1] == "attention":
            for name, value in parts.head_counts(place[0], count).items():
                setattr(twin, name, value)
        for part in filter(stores_transposed, twin.modules()):
            conv: Any = part  # its forward reads its width, a linear's does not
            conv.nx, conv.nf = conv.weight.shape
        twins.append(twin)
    return twins


def _whole(parts: DecoderParts, place: SubBlock) -> nn.Module:
    """Return a sub-block as one module, also where its pieces lie in the layer itself."""
    chain = parts.family.mlp_chain if place[1] == "mlp" else ()
    if not chain:
        return parts.sub_block(*place)
    return nn.Sequential(*(parts.layers[place[0]].get_submodule(path) for path in chain))
