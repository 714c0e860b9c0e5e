"""What a model costs, recounted from its modules: parameters, FLOPs, KV cache, bytes of weights.

Nothing here reads a plan or a spec, so that a report can be checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.decoder import DecoderParts, head_of, whole_of
from lit_prune.decoder.projections import is_projection
from lit_prune.errors import ConfigError
from lit_prune.metrics.exact import ExactMetric
from lit_prune.metrics.peak import measure_peak

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

DEFAULT_CONTEXT_LENGTH = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class FootprintResult:
    """Size and cost of one model.

    Attributes:
        decoder_parameters: Parameters of the decoder layers: what a pruning ratio is a fraction of.
        total_parameters: Parameters of the model, tied weights once.
        flops_per_token: Floating-point operations of the decoder layers for one token of a forward:
            two per multiply-accumulate of every linear weight, and of the products query x key and
            attention x value over ``context_length`` keys. Norms, activations, softmax, rotary
            embedding and bias additions are not counted.
        head_flops_per_token: The same of the head.
        context_length: Keys that the token attends to (fewer where a sliding window is shorter). A
            causal prompt of that length has half as many on average, if the kernel skips the masked
            half.
        kv_cache_bytes_per_token: Keys and values that one token leaves in the cache of all layers,
            in the dtype of the key projection. (A sliding window bounds the tokens, not the bytes
            of each.)
        decoder_weight_bytes: Bytes of the parameters of the decoder layers.
        weight_bytes: Bytes of the storages that the parameters keep alive, shared ones once. More
            than parameters x item size where a parameter is a slice that holds on to a larger
            storage.
        peak_forward_bytes: Peak memory of one forward besides the weights, where measured.
        peak_method: How it was counted (`PeakMemory.method`).
        head_weight_bytes: Bytes of the language-model head (which may be the embeddings, tied).
        num_layers: Decoder layers.
        odd_sizes: Sizes of linear weights in them that are no multiple of 64, ascending: tiles of
            matrix units are left in part empty.
        experts: Of each mixture of experts the bytes of all of them, how many there are, and how
            many compute a token.
    """

    decoder_parameters: int
    total_parameters: int
    flops_per_token: int
    head_flops_per_token: int
    context_length: int
    kv_cache_bytes_per_token: int
    decoder_weight_bytes: int
    weight_bytes: int
    peak_forward_bytes: int | None = None
    peak_method: str | None = None
    head_weight_bytes: int = 0
    num_layers: int = 0
    odd_sizes: tuple[int, ...] = ()
    experts: tuple[tuple[int, int, int], ...] = ()

    def step_weight_bytes(self, sequences: int) -> int:
        """Return the bytes of weights that a decoding step reads: decoder layers and head, once.

        Of experts those that ``sequences`` tokens meet, if no two share one.
        """
        idle = (
            size - size * min(count, sequences * top_k) // count
            for size, count, top_k in self.experts
        )
        return self.decoder_weight_bytes + self.head_weight_bytes - sum(idle)


def footprint_of(
    model: PreTrainedModel,
    *,
    context_length: int = DEFAULT_CONTEXT_LENGTH,
    peak_ids: Tensor | None = None,
) -> FootprintResult:
    """Recount what a model costs from its modules.

    Args:
        model: A causal language model of a supported family, dense or pruned; layers may differ,
            and attention or MLP be gone.
        context_length: Keys that attention is counted for, tokens.
        peak_ids: ``[batch, tokens]``; if given, one forward over them is run and its peak memory
            measured.

    Returns:
        Its footprint.

    Raises:
        ConfigError: If ``context_length`` is below 1.
        UnsupportedModelError: If the family is not known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=1, vocab_size=10, tie_word_embeddings=True))
        >>> cost = footprint_of(model, context_length=4)
        >>> cost.decoder_parameters  # q and o 64, k and v 32, MLP 3 * 128, norms 2 * 8
        592
        >>> cost.total_parameters  # tied: embeddings 80 once, final norm 8
        680
        >>> cost.flops_per_token  # 2 * 576 + 4 * (2 heads * 4 wide) * 4 keys
        1280
        >>> cost.head_flops_per_token
        160
        >>> cost.kv_cache_bytes_per_token
        32
    """
    if context_length < 1:
        raise ConfigError(f"context_length must be at least 1 token, got {context_length}.")
    parts = DecoderParts(model)
    attention = [
        (parts, layer) for layer in range(len(parts.layers)) if parts.exists(layer, "attention")
    ]
    head: Any = head_of(model)
    result = FootprintResult(
        decoder_parameters=_num_parameters(parts.layers.parameters()),
        total_parameters=_num_parameters(whole_of(model).parameters()),
        flops_per_token=_linear_flops(parts.layers)
        + sum(_expert_flops(parts, layer) for layer in range(len(parts.layers)))
        + sum(_attention_flops(*where, context_length) for where in attention),
        head_flops_per_token=0 if head is None else 2 * head.weight.numel(),
        context_length=context_length,
        kv_cache_bytes_per_token=sum(parts.cached_bytes(layer) for _, layer in attention),
        decoder_weight_bytes=sum(p.nbytes for p in parts.layers.parameters()),
        weight_bytes=_storage_bytes(whole_of(model).parameters()),
        head_weight_bytes=0 if head is None else head.weight.nbytes,
        num_layers=len(parts.layers),
        odd_sizes=_odd_sizes(parts.layers),
        experts=tuple(
            (sum(p.nbytes for p in routed.bank.parameters()), routed.num_experts, routed.top_k)
            for routed in map(parts.routed, range(len(parts.layers)))
            if routed is not None
        ),
    )
    if peak_ids is None:
        return result
    peak = measure_peak(model, peak_ids)
    return replace(result, peak_forward_bytes=peak.num_bytes, peak_method=peak.method)


def _num_parameters(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)  # nn.Module yields a shared one once


def _linear_flops(layers: nn.Module) -> int:
    # `remove_duplicate` stays off: a linear that is used twice is computed twice
    modules = (module for _, module in layers.named_modules(remove_duplicate=False))
    linears: Any = (module for module in modules if is_projection(module))
    return sum(2 * linear.weight.numel() for linear in linears)


def _odd_sizes(layers: nn.Module) -> tuple[int, ...]:
    linears: Any = (module for module in layers.modules() if is_projection(module))
    return tuple(sorted({size for linear in linears for size in linear.weight.shape if size % 64}))


def _expert_flops(parts: DecoderParts, layer: int) -> int:
    """Count the router and the experts that one token meets: they are no `nn.Linear`."""
    if (routed := parts.routed(layer)) is None:
        return 0
    met = routed.top_k / routed.num_experts
    packed = sum(p.numel() for p in routed.bank.parameters() if p.ndim == 3)
    return round(2 * packed * met) + 2 * routed.router.get_parameter("weight").numel()


def _attention_flops(parts: DecoderParts, layer: int, context_length: int) -> int:
    query_width = parts.inputs(layer, "attention")[0].out_features  # heads * head_dim
    return 2 * 2 * query_width * parts.attended_keys(layer, context_length)


def _storage_bytes(parameters: Iterable[nn.Parameter]) -> int:
    storages: dict[tuple[str, int], int] = {}
    for parameter in parameters:
        storage = parameter.untyped_storage()
        # on `meta` every address is 0
        key = (str(parameter.device), storage.data_ptr() or id(parameter))
        storages[key] = storage.nbytes()
    return sum(storages.values())


class Footprint(ExactMetric):
    """`footprint_of` as a metric, so that it logs like the others.

    Every rank holds the same model, so ranks are merged by the maximum, not the sum.

    Args:
        context_length: Keys that attention is counted for, tokens.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=1, vocab_size=10))
        >>> metric = Footprint()
        >>> metric.update(model)
        >>> metric.compute()["decoder_parameters"]
        tensor(592)
    """

    is_differentiable = False
    higher_is_better = False

    _NAMES = (
        "decoder_parameters",
        "total_parameters",
        "flops_per_token",
        "head_flops_per_token",
        "kv_cache_bytes_per_token",
        "weight_bytes",
        "peak_forward_bytes",
    )

    def __init__(self, *, context_length: int = DEFAULT_CONTEXT_LENGTH, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.context_length = context_length
        for name in self._NAMES:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, model: PreTrainedModel, *, peak_ids: Tensor | None = None) -> None:
        """Recount ``model``; replaces what was counted before. Arguments as in `footprint_of`."""
        counted = footprint_of(model, context_length=self.context_length, peak_ids=peak_ids)
        for name in self._NAMES:
            state: Tensor = getattr(self, name)
            setattr(self, name, torch.full_like(state, getattr(counted, name) or 0))

    def compute(self) -> dict[str, Tensor]:
        """Return int64 scalars named as in `FootprintResult`; the peak only if measured."""
        values: dict[str, Tensor] = {name: getattr(self, name) for name in self._NAMES}
        if not values["peak_forward_bytes"]:
            del values["peak_forward_bytes"]
        return values
