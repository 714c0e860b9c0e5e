"""From a plan to the edits that carry it out: what is sliced, refitted, removed, and restacked."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.decoder import (
    KINDS,
    LEADING,
    AttentionSpec,
    DecoderParts,
    head_of,
    remainder,
    scaled_norm,
)
from lit_prune.decoder.layout import layout_of
from lit_prune.decoder.projections import kept_lines
from lit_prune.surgery.cache import cache_slots
from lit_prune.surgery.compensation import compensated_inputs, mapped, unit_columns
from lit_prune.surgery.edits import StagedEdits
from lit_prune.surgery.experts import expert_fields, slice_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.decoder import DecoderSpec, SubBlock
    from lit_prune.plan import PruningPlan
    from lit_prune.surgery.compensation import Compensation


def stage(
    model: PreTrainedModel,
    spec: DecoderSpec,
    plan: PruningPlan,
    compensation: Compensation | None = None,
) -> StagedEdits:
    """Prepare every edit that ``plan`` asks for, without changing the model."""
    parts, edits = DecoderParts(model), StagedEdits()
    constants = compensation.constants if compensation else {}
    counts: dict[SubBlock, int] = {
        (index, part.kind): len(plan.layers[index].kept(part.kind))
        for index, part in spec.sub_blocks
    }
    left = remainder(spec, counts, constants)
    biases = {
        holder: torch.stack([constants[place] for place in places]).sum(0)
        for holder, places in left.holders.items()
    }
    for index, part in spec.sub_blocks:
        place: SubBlock = (index, part.kind)
        if index not in left.blocks:
            continue
        if not counts[place]:
            empty = not any(counts.get((index, kind)) for kind in KINDS)
            norms = parts.family.norms(part.kind) if empty else parts.norm_paths(*place)
            _remove(edits, parts, place, norms, biases.get(place) if place == LEADING else None)
            continue
        kept = plan.layers[index].kept(part.kind)
        if part.unit == "expert":
            if len(kept) < part.num_units:
                slice_experts(edits, parts, index, kept)
            continue
        if counts[place] < part.num_units:
            _slice(edits, parts, place, kept, compensation)
        else:
            _refit(edits, parts, place, kept, compensation)
        if place in biases:
            linear = parts.output(*place).module
            bias = biases[place] + (0 if linear.bias is None else linear.bias.double().cpu())
            edits.parameter(
                linear, "bias", bias, like=linear.weight if linear.bias is None else linear.bias
            )
    if compensation is not None and compensation.head_map is not None:
        _refit_head(edits, parts, compensation.head_map)
    if LEADING in biases and spec.blocks[0].attention is None:
        _add_to_constant(edits, parts, biases[LEADING])
    _restack(edits, parts, spec, counts, left.blocks)
    return edits


def _slice(
    edits: StagedEdits,
    parts: DecoderParts,
    place: SubBlock,
    kept: tuple[int, ...],
    compensation: Compensation | None,
) -> None:
    output = parts.output(*place)
    device = output.module.weight.device
    columns = unit_columns(kept, parts.unit_width(*place)).to(device)
    weight = None if compensation is None else compensation.weights.get(place)
    if weight is None:
        weight = output.weight[:, columns]
    dim = output.dim(rows=False)
    edits.parameter(output.module, "weight", output.oriented(weight), kept=(dim, columns))
    edits.attribute(output.module, output.size_names()[1], len(columns))
    others = compensated_inputs(parts, place, kept, compensation)
    for each in parts.input_modules(*place):
        assert each.rows is not None  # noqa: S101 - units own rows of inputs
        lines, module = kept_lines(each.rows, kept).to(device), each.module
        make = others.get(module)
        weight = each.oriented((each.matrix if make is None else make())[lines])
        edits.parameter(module, "weight", weight, kept=(each.dim(rows=True), lines))
        if module.bias is not None:
            edits.parameter(module, "bias", module.bias[lines], kept=(0, lines))
        edits.attribute(module, each.size_names()[0], len(lines))
    if place[1] == "attention":
        for name, value in parts.head_counts(place[0], len(kept)).items():
            edits.attribute(parts.sub_block(*place), name, value)
        heads = unit_columns(kept, parts.head_shape(place[0])[1]).to(device)
        for path, parameter in parts.per_head(place[0]).items():
            owner, _, leaf = path.rpartition(".")
            holder = parts.layers[place[0]].get_submodule(owner)
            edits.parameter(holder, leaf, parameter[heads], kept=(0, heads))


def _refit(
    edits: StagedEdits,
    parts: DecoderParts,
    place: SubBlock,
    kept: tuple[int, ...],
    compensation: Compensation | None,
) -> None:
    """Change the weights of a sub-block that keeps all its units, behind a cut."""
    if compensation is None:
        return
    if place in compensation.weights:
        output = parts.output(*place)
        edits.parameter(output.module, "weight", output.oriented(compensation.weights[place]))
    others = compensated_inputs(parts, place, kept, compensation)
    for each in parts.input_modules(*place):
        if (make := others.get(each.module)) is not None:
            edits.parameter(each.module, "weight", each.oriented(make()))


def _refit_head(edits: StagedEdits, parts: DecoderParts, head_map: Tensor) -> None:
    if head_map.ndim:
        head: Any = head_of(parts.model)
        edits.parameter(head, "weight", mapped(head.weight, head_map))
        return
    for name, value in scaled_norm(parts.final_norm, float(head_map)).items():
        edits.parameter(parts.final_norm, name, value)


def _remove(
    edits: StagedEdits,
    parts: DecoderParts,
    place: SubBlock,
    norms: tuple[str, ...],
    constant: Tensor | None,
) -> None:
    bias = None
    if constant is not None:
        like = parts.output(*place).weight
        bias = nn.Parameter(constant.to(like).clone(), requires_grad=like.requires_grad)
        edits.added(bias, beside=like)
    module = parts.constant(*place, bias)
    module.train(parts.sub_block(*place).training)
    home = parts.sub_block_path(place[1])
    inputs = () if parts.routed(*place) else parts.family.inputs(place[1])
    gone = (*norms, *(path for path in inputs if not path.startswith(f"{home}.")))
    left = {path: nn.Identity().train(module.training) for path in gone}
    for path, new_module in {home: module, **left}.items():
        parent, _, leaf = path.rpartition(".")
        edits.attribute(parts.layers[place[0]].get_submodule(parent), leaf, new_module)


def _add_to_constant(edits: StagedEdits, parts: DecoderParts, constant: Tensor) -> None:
    slot: Any = parts.sub_block(*LEADING)
    like = next(parts.layers[0].parameters()) if slot.bias is None else slot.bias
    if slot.bias is not None:
        constant = constant + slot.bias.double().cpu()
    edits.parameter(slot, "bias", constant, like=like)


def _restack(
    edits: StagedEdits,
    parts: DecoderParts,
    spec: DecoderSpec,
    counts: dict[SubBlock, int],
    blocks: tuple[int, ...],
) -> None:
    """Drop removed blocks; renumber cache slots; let the config say what is so."""
    if len(blocks) < len(spec.blocks):
        stack = nn.ModuleList(parts.layers[index] for index in blocks)
        stack.training = parts.layers.training
        parent, _, leaf = parts.family.layers.rpartition(".")
        edits.attribute(parts.model.get_submodule(parent), leaf, stack)
    types, slots = cache_slots(
        [spec.blocks[index].attention_type for index in blocks],
        [bool(counts.get((index, "attention"))) for index in blocks],
    )
    for position, slot in slots.items():
        attention = parts.sub_block(blocks[position], "attention")
        if attention.layer_idx != slot:
            edits.attribute(attention, "layer_idx", slot)
    attentions = [part for _, part in spec.sub_blocks if isinstance(part, AttentionSpec)]
    groups = {counts.get((index, "attention"), 0) for index in blocks}
    routed = {index for index, part in spec.sub_blocks if part.unit == "expert"}
    channels = {counts.get((index, "mlp"), 0) for index in blocks if index not in routed}
    queries = {part.queries_per_group for part in attentions}
    fields: dict[str, Any] = {
        "num_hidden_layers": len(blocks),
        "head_dim": attentions[0].head_dim,
    }
    # a stock config has one width for all layers: where there are several it keeps the dense ones,
    # and saving writes the widths of each layer beside it
    own = getattr(parts.model.config, "is_heterogeneous", False)
    if own:  # `per_layer_config` holds the widths
        edits.follow(partial(_say_what_layers_hold, parts.model))
    elif len(groups) == 1 and len(queries) == 1:
        fields["num_key_value_heads"] = min(groups)
        fields["num_attention_heads"] = min(groups) * min(queries)
    if not own and len(channels) == 1 and min(channels):
        fields["intermediate_size"] = min(channels)
    fields |= expert_fields(edits, parts, spec, counts, blocks)
    configs = {id(module.config): module.config for module in (parts.model, parts.model.base_model)}
    for name in parts.family.per_layer:
        if (listed := getattr(parts.model.config, name, None)) is not None:
            fields[name] = [listed[index] for index in blocks]
    for config in configs.values():
        if getattr(config, "layer_types", None) is not None:
            fields["layer_types"] = list(types)
        for name, value in parts.family.in_config(fields).items():
            if getattr(config, name, None) != value:
                edits.attribute(config, name, value)


def _say_what_layers_hold(model: PreTrainedModel) -> None:
    held: Any = layout_of(model).per_layer_config()
    model.config.per_layer_config = held
