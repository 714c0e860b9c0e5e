"""From a model to its spec: sizes come from the weights; a pruned model describes itself."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from lit_prune.decoder.families import family_name
from lit_prune.decoder.missing import refuse_missing_parts
from lit_prune.decoder.parts import DecoderParts
from lit_prune.decoder.projections import is_projection, stores_transposed
from lit_prune.decoder.spec import (
    KINDS,
    AttentionSpec,
    BlockSpec,
    DecoderSpec,
    ExpertsSpec,
    MlpSpec,
    SubBlockKind,
    SubBlockSpec,
)
from lit_prune.decoder.wrapper import whole_of
from lit_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from lit_prune.decoder.experts import Routed


def spec_for(model: PreTrainedModel) -> DecoderSpec:
    """Describe a causal language model as prunable units.

    Args:
        model: A Hugging Face causal language model of a supported family, dense or pruned before.

    Returns:
        Its spec.

    Raises:
        UnsupportedModelError: If the family is not known, a weight is quantised, parametrised,
            masked, off-loaded or on ``meta``, devices are mixed, a prunable module is used twice, a
            layer holds a parameter that the family entry does not name, or sizes contradict each
            other.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        ...                      vocab_size=32, num_attention_heads=4, num_key_value_heads=2)
        >>> spec = spec_for(LlamaForCausalLM(config))
        >>> spec.blocks[0].attention.num_kv_groups, spec.blocks[1].mlp.num_channels
        (2, 24)
    """
    refuse_altered_weights(model)
    parts = DecoderParts(model)
    refuse_missing_parts(parts)
    refuse_shared_parts(parts)
    blocks = tuple(_describe_block(parts, index) for index in range(len(parts.layers)))
    return DecoderSpec(
        model_type=parts.family.model_type,
        hidden_size=parts.hidden_size,
        blocks=blocks,
        total_parameters=sum(p.numel() for p in whole_of(model).parameters()),
        fingerprint=fingerprint(model),
        refused=tuple(sorted(parts.family.refuses.items())),
        removed_constants=parts.family.experts is None
        and not any(parts.post_norm_path(kind) for kind in KINDS),
        parallel=parts.family.parallel,
        keeps_biases=parts.family.keeps_biases,
    )


def fingerprint(model: PreTrainedModel) -> str:
    """Return sha256 over the family and the sorted names and shapes of the parameters."""
    shapes = sorted((name, tuple(p.shape)) for name, p in model.named_parameters())
    whole = family_name(model.config.model_type), shapes
    return hashlib.sha256(repr(whole).encode()).hexdigest()


def refuse_altered_weights(model: nn.Module) -> None:
    """Refuse weights that cannot be sliced where they are.

    Raises:
        UnsupportedModelError: Names the first such module, and the remedy.
    """
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
            raise UnsupportedModelError(
                f"{name} is wrapped by an adapter ({type(module).__name__}), and a plan cuts plain "
                "weights. Fine-tune without the pruning callback, then module.lm = "
                "module.lm.merge_and_unload() (wherever yours is), and prune: prune(...), or "
                "EntropyPruningCallback(when='validate') and trainer.validate(module, loader)."
            )
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise UnsupportedModelError(
                f"{name or 'the model'} is compiled: hooks see nothing inside. Pass the module "
                "that was compiled (`module._orig_mod`), prune it, and compile the result."
            )
        if parametrize.is_parametrized(module) or hasattr(module, "weight_orig"):
            raise UnsupportedModelError(
                f"{name} is parametrised or masked: make it plain first "
                "(torch.nn.utils.parametrize.remove_parametrizations, or "
                "torch.nn.utils.prune.remove)."
            )
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(
                f"{name or 'the model'} is dispatched by accelerate (device_map, off-loading). "
                "Load it on one device: from_pretrained(..., device_map=None).to(device)."
            )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            "the weights are quantised; load the model in bfloat16 or float32 and prune that."
        )
    devices: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(str(parameter.device), name)
        if parameter.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device: load the weights first.")
        if not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"{name} has dtype {parameter.dtype}: it is quantised; load the model in bfloat16 "
                "or float32."
            )
    if len(devices) > 1:
        where = ", ".join(f"{device} (e.g. {name})" for device, name in sorted(devices.items()))
        raise UnsupportedModelError(
            f"the parameters are on several devices: {where}. Load the model on one device."
        )


def refuse_shared_parts(parts: DecoderParts) -> None:
    """Refuse modules or parameters of the decoder layers that are used in two places.

    Raises:
        UnsupportedModelError: Names both places.
    """
    seen: dict[int, str] = {}
    for index, layer in enumerate(parts.layers):
        names = [
            *layer.named_modules(prefix=f"layer {index}", remove_duplicate=False),
            *layer.named_parameters(prefix=f"layer {index}", remove_duplicate=False),
        ]
        for name, thing in names:
            # activation functions hold nothing; Hugging Face shares them freely
            if isinstance(thing, nn.Module) and next(thing.parameters(), None) is None:
                continue
            if id(thing) in seen:
                raise UnsupportedModelError(
                    f"{name} is the same object as {seen[id(thing)]}: a shared module cannot be "
                    "pruned in one place and kept in another. Copy it first."
                )
            seen[id(thing)] = name


def _describe_block(parts: DecoderParts, index: int) -> BlockSpec:
    layer = parts.layers[index]
    expected: set[str] = set()
    specs: dict[SubBlockKind, SubBlockSpec | None] = {}
    constants = 0
    for kind in KINDS:
        path = parts.sub_block_path(kind)
        if not parts.exists(index, kind):
            specs[kind] = None
            constant = parts.sub_block(index, kind)
            constants += sum(p.numel() for p in constant.parameters())
            expected.update(f"{path}.{name}" for name, _ in constant.named_parameters())
            continue
        names = _parameter_names(parts, index, kind)
        expected.update(names)
        fixed = sum(
            layer.get_parameter(n).numel() for n in names if not _owned_by_units(parts, kind, n)
        )
        if kind == "attention":
            specs[kind] = _describe_attention(parts, index, fixed)
        elif routed := parts.routed(index):
            specs[kind] = _describe_experts(parts, index, routed, fixed)
        else:
            specs[kind] = _describe_mlp(parts, index, fixed)
    shared = _parameters_of(layer, [parts.shared_norm(index)])
    expected.update(shared)
    if unknown := sorted(set(dict(layer.named_parameters())) - expected):
        raise UnsupportedModelError(
            f"layer {index} holds the parameter {unknown[0]}, which the {parts.family.model_type} "
            "entry in lit_prune/decoder/families.py does not name: pruning it could not be exact."
        )
    types = getattr(parts.model.config, "layer_types", None)
    sliding = getattr(parts.model.config, "sliding_window", None) is not None
    default = "sliding_attention" if sliding else "full_attention"
    return BlockSpec(
        index=index,
        name=f"{parts.family.layers}.{index}",
        attention=cast("AttentionSpec | None", specs["attention"]),
        mlp=cast("MlpSpec | ExpertsSpec | None", specs["mlp"]),
        constant_parameters=constants,
        shared_parameters=sum(layer.get_parameter(name).numel() for name in shared),
        attention_type=types[index] if types else default,
    )


def _parameter_names(parts: DecoderParts, index: int, kind: SubBlockKind) -> list[str]:
    family, layer = parts.family, parts.layers[index]
    names = _parameters_of(layer, parts.norm_paths(index, kind))
    names += (*family.attention_extras, *family.per_head) if kind == "attention" else ()
    if experts := (parts.experts_of(index) if kind == "mlp" else None):
        return names + _parameters_of(layer, (experts.router, experts.bank, *experts.others))
    for path in (*family.inputs(kind), family.output(kind)):
        linear: Any = layer.get_submodule(path)
        if (
            not is_projection(linear)
            or linear.weight.ndim != 2
            or stores_transposed(linear) != family.transposed
        ):
            wanted = "transformers' Conv1D" if family.transposed else "torch.nn.Linear"
            raise UnsupportedModelError(
                f"layer {index}: {path} is a {type(linear).__name__}, expected {wanted}. "
                "If it is quantised, load the model in bfloat16 or float32."
            )
        names.append(f"{path}.weight")
        if linear.bias is not None:
            names.append(f"{path}.bias")
    return names


def _parameters_of(layer: nn.Module, paths: Iterable[str | None]) -> list[str]:
    modules = {path: layer.get_submodule(path) for path in paths if path is not None}
    return [
        f"{path}.{name}" for path, each in modules.items() for name, _ in each.named_parameters()
    ]


def _owned_by_units(parts: DecoderParts, kind: SubBlockKind, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    family = parts.family
    if family.experts is not None and path in (family.experts.router, family.experts.bank):
        return True
    if name in family.per_head:
        return True
    return path in family.inputs(kind) or (path == family.output(kind) and leaf == "weight")


def _unit_parameters(parts: DecoderParts, index: int, kind: SubBlockKind, units: int) -> int:
    inputs = parts.input_modules(index, kind)
    rows: int = sum(p.numel() for each in inputs for p in each.module.parameters())
    if kind == "attention":
        rows += sum(p.numel() for p in parts.per_head(index).values())
    return (rows + parts.output(index, kind).weight.numel()) // units


def _refuse_contradiction(parts: DecoderParts, index: int, kind: SubBlockKind) -> None:
    """Refuse projections that do not have the rows and columns of the same units."""
    inputs, output = parts.input_modules(index, kind), parts.output(index, kind)
    units, width = parts.units(index, kind), parts.unit_width(index, kind)
    heads = width // parts.head_shape(index)[0] * units if kind == "attention" else 0
    per_head = parts.per_head(index) if kind == "attention" else {}
    consistent = (
        units > 0
        and output.in_features == units * width
        and all(each.out_features == len(each.matrix) for each in inputs)
        # it reads and writes vectors as wide as the residual stream
        and {each.in_features for each in inputs} == {parts.hidden_size} == {output.out_features}
        and all(p.shape == (heads,) for p in per_head.values())
    )
    if consistent:
        return
    family = parts.family
    paths = (*family.inputs(kind), family.output(kind))
    shapes = ", ".join(
        f"{path} {list(each.matrix.shape)}"
        for path, each in zip(paths, (*inputs, output), strict=True)
    )
    if kind == "attention":
        head_dim, queries = parts.head_shape(index)
        shapes += f", head_dim {head_dim}, {queries} query heads per KV group"
    raise UnsupportedModelError(
        f"{family.layers}.{index}.{parts.sub_block_path(kind)} contradicts itself: {shapes}, "
        f"hidden size {parts.hidden_size}."
    )


def _describe_attention(parts: DecoderParts, index: int, fixed: int) -> AttentionSpec:
    _refuse_contradiction(parts, index, "attention")
    head_dim, queries_per_group = parts.head_shape(index)
    groups = parts.units(index, "attention")
    return AttentionSpec(
        name=f"{parts.family.layers}.{index}.{parts.family.attention}",
        num_kv_groups=groups,
        queries_per_group=queries_per_group,
        head_dim=head_dim,
        unit_parameters=_unit_parameters(parts, index, "attention", groups),
        fixed_parameters=fixed,
        output_bias=parts.output(index, "attention").bias is not None,
    )


def _describe_experts(parts: DecoderParts, index: int, routed: Routed, fixed: int) -> ExpertsSpec:
    count, width = routed.num_experts, parts.hidden_size
    name = f"{parts.family.layers}.{index}.{parts.family.mlp}"
    counts: set[object] = {len(parameter) for _, _, parameter in routed.owned}
    counts |= {getattr(module, "num_experts", None) for module in (routed.router, routed.bank)}
    if (
        counts != {count}
        or routed.router.get_parameter("weight").shape != (count, width)
        or not 1 <= routed.top_k <= count
    ):
        shapes = ", ".join(f"{name} {list(p.shape)}" for _, name, p in routed.owned)
        raise UnsupportedModelError(
            f"{name} contradicts itself: {shapes}, experts {sorted(map(str, counts))}, top_k "
            f"{routed.top_k}, hidden size {width}. Every parameter of router and experts must "
            "have one entry for each expert along its first dimension."
        )
    return ExpertsSpec(
        name=name,
        num_experts=count,
        top_k=routed.top_k,
        hidden_size=width,
        unit_parameters=sum(p.numel() for _, _, p in routed.owned) // count,
        fixed_parameters=fixed,
    )


def _describe_mlp(parts: DecoderParts, index: int, fixed: int) -> MlpSpec:
    _refuse_contradiction(parts, index, "mlp")
    channels = parts.units(index, "mlp")
    return MlpSpec(
        name=f"{parts.family.layers}.{index}.{parts.family.mlp}",
        num_channels=channels,
        unit_parameters=_unit_parameters(parts, index, "mlp", channels),
        fixed_parameters=fixed,
        output_bias=parts.output(index, "mlp").bias is not None,
    )
