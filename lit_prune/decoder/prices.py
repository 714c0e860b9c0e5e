"""What units cost in FLOPs, cache and weight bytes, read from the modules: integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from lit_prune.decoder.parts import DecoderParts
from lit_prune.decoder.spec import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.decoder.experts import Routed
    from lit_prune.decoder.residual import SubBlock
    from lit_prune.decoder.spec import SubBlockKind

Priced = Literal["flops", "kv_cache_bytes", "weight_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a sub-block costs in one resource: ``fixed + kept units * unit``, 0 where it is removed.

    Attributes:
        unit: What one KV group, channel or expert costs.
        fixed: What leaves only with the whole sub-block.
        bias: What a new output bias would cost.
    """

    unit: int
    fixed: int = 0
    bias: int = 0


def unit_prices(
    model: PreTrainedModel, resource: Priced, *, context_length: int = 1
) -> dict[SubBlock, Price]:
    """Return what each sub-block costs, as `lit_prune.metrics.footprint_of` counts.

    Args:
        model: A supported causal language model, dense or pruned before.
        resource: ``flops``: floating-point operations for one token, two for each multiply-add of
            the linear weights and of the attention products; biases, norms and softmax are not
            counted. Of experts those ``top_k`` count that compute a token, whatever their number:
            of one that leaves only the row of the router. ``kv_cache_bytes``: what one token leaves
            in the cache. ``weight_bytes``: bytes of the parameters.
        context_length: Keys that the attention products are counted for (fewer where a sliding
            window is shorter); read for FLOPs only.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=1, vocab_size=10))
        >>> prices = unit_prices(model, "flops", context_length=4)
        >>> prices[0, "attention"].unit  # q and o 64, k and v 32; 2 heads, 4 wide, 4 keys
        512
        >>> prices[0, "mlp"].unit, 512 + 16 * 48
        (48, 1280)
    """
    parts = DecoderParts(model)
    return {place: _price(parts, place, resource, context_length) for place in parts.places()}


def constant_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the constants that an earlier pruning left for removed sub-blocks."""
    parts = DecoderParts(model)
    return sum(
        parameter.nbytes
        for layer in range(len(parts.layers))
        for kind in KINDS
        if not parts.exists(layer, kind)
        for parameter in parts.sub_block(layer, kind).parameters()
    )


def shared_bytes(model: PreTrainedModel) -> dict[int, int]:
    """Return the bytes of the norm that both sub-blocks of a layer read, by layer."""
    parts = DecoderParts(model)
    paths = {layer: parts.shared_norm(layer) for layer in range(len(parts.layers))}
    return {
        layer: sum(p.nbytes for p in parts.layers[layer].get_submodule(path).parameters())
        for layer, path in paths.items()
        if path is not None
    }


def _price(parts: DecoderParts, place: SubBlock, resource: Priced, context_length: int) -> Price:
    layer, kind = place
    if (routed := parts.routed(*place)) is not None:
        return _experts_price(parts, layer, routed, resource)
    inputs, output = parts.input_modules(layer, kind), parts.output(layer, kind)
    width, units = output.in_features, parts.units(layer, kind)
    if resource == "flops":
        flops = 2 * sum(each.matrix.numel() for each in (*inputs, output))
        if kind == "attention":  # query x key, attention x value
            flops += 2 * 2 * width * parts.attended_keys(layer, context_length)
        return Price(unit=flops // units)
    if resource == "kv_cache_bytes":
        cached = parts.cached_bytes(layer) if kind == "attention" else 0
        return Price(unit=cached // units)
    whole = _bytes(parts, layer, kind)
    owned = output.weight.nbytes + sum(
        p.nbytes for each in inputs for p in each.module.parameters()
    )
    if kind == "attention":
        owned += sum(p.nbytes for p in parts.per_head(layer).values())
    bias = parts.hidden_size * output.weight.element_size()
    return Price(unit=owned // units, fixed=whole - owned, bias=bias)


def _experts_price(parts: DecoderParts, layer: int, routed: Routed, resource: Priced) -> Price:
    if resource == "kv_cache_bytes":
        return Price(unit=0)
    if resource == "flops":
        row = 2 * routed.router.get_parameter("weight").shape[1]
        return Price(unit=row, fixed=experts_flops(routed) - row * routed.num_experts)
    owned = sum(parameter.nbytes for _, _, parameter in routed.owned)
    return Price(unit=owned // routed.num_experts, fixed=_bytes(parts, layer, "mlp") - owned)


def _bytes(parts: DecoderParts, layer: int, kind: SubBlockKind) -> int:
    modules = parts.modules(layer, kind)
    parameters = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.nbytes for p in parameters.values())


def experts_flops(routed: Routed) -> int:
    """Return the floating-point operations of a layer's experts for one token.

    The router, ``top_k`` experts, and the linear layers that every token passes.
    """
    banked = sum(p.numel() for p in routed.bank.parameters() if p.ndim == 3)
    linears = (m for other in routed.others for m in other.modules() if isinstance(m, nn.Linear))
    multiplied = (
        routed.router.get_parameter("weight").numel()
        + banked // routed.num_experts * routed.top_k
        + sum(linear.weight.numel() for linear in linears)
    )
    return 2 * multiplied
