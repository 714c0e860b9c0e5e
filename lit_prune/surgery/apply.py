"""Applying a plan: the only place that changes a model."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.decoder import (
    LEADING,
    AttentionSpec,
    ConstantOutput,
    DecoderParts,
    DecoderSpec,
    SubBlock,
    remainder,
    spec_for,
)
from lit_prune.decoder.layout import layout_of
from lit_prune.plan import PruningPlan
from lit_prune.surgery.cache import cache_slots
from lit_prune.surgery.compare import check_ids, compare, logits_of, masked_logits
from lit_prune.surgery.compensation import Compensation, unit_columns
from lit_prune.surgery.edits import Replaced, StagedEdits
from lit_prune.surgery.experts import expert_fields, slice_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def apply_plan(
    model: PreTrainedModel | str | Path,
    plan: PruningPlan | str | Path,
    compensation: Compensation | str | Path | None = None,
    *,
    verify: bool = True,
) -> PreTrainedModel:
    """Make ``model`` smaller, in place, all or nothing.

    With the base model and the paths of ``plan.json`` and ``compensation.safetensors`` it makes a
    pruned model again, for people who share plans and not weights.

    q/k/v/o and gate/up/down are sliced, removed sub-blocks become constants, removed blocks leave
    the stack; config, KV-cache slots and per-layer lists follow. dtype, device, ``requires_grad``,
    ties and hooks of what stays are kept. The result is compared with the dense model whose cut
    units are masked.

    Args:
        model: The model that the plan was made for, or the directory or hub name that transformers
            loads it from, in the dtype that it is stored in.
        plan: What stays, or the path of a ``plan.json``.
        compensation: Constants for what was cut, made for this plan and these weights, or the path
            of a ``compensation.safetensors``.
        verify: Compare before declaring success.

    Returns:
        The model, now smaller.

    Raises:
        ArtifactError: If a file cannot be read, or is something else.
        PlanMismatchError: If plan or compensation belong to another model.
        SurgeryError: If the result is not what was planned. In every failure the model is
            bit-identical.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_prune.plan import LayerPlan, PruningPlan
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=32)
        >>> model = LlamaForCausalLM(config).eval()
        >>> layers = (LayerPlan(0, (1,), tuple(range(8))), LayerPlan(1, (), ()))
        >>> model = apply_plan(model, PruningPlan(spec_for(model).fingerprint, layers))
        >>> model.config.num_hidden_layers, model.model.layers[0].mlp.down_proj
        (1, Linear(in_features=8, out_features=16, bias=False))
    """
    if isinstance(plan, str | Path):
        plan = PruningPlan.load(Path(plan))
    if isinstance(compensation, str | Path):
        compensation = Compensation.load(Path(compensation))
    dense = _loaded(model) if isinstance(model, str | Path) else model
    with applied(dense, plan, compensation, verify=verify):
        return dense


def _loaded(name: str | Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.eval()  # type: ignore[no-any-return] # untyped upstream


@contextmanager
def applied(
    model: PreTrainedModel,
    plan: PruningPlan,
    compensation: Compensation | None = None,
    *,
    verify: bool = True,
) -> Iterator[tuple[Replaced, ...]]:
    """Apply a plan as `apply_plan` does, and take it back if what the ``with`` holds fails.

    Yields where every parameter that is new comes from, and which ones left. The dense weights are
    freed at its end.
    """
    before = list(model.parameters())
    spec = spec_for(model)
    plan.validate(spec)
    if compensation is not None:
        compensation.check(model, plan)
    # outside inference mode: parameters made inside `Trainer.validate` could never be trained
    with torch.inference_mode(False), torch.no_grad():
        ids = check_ids(model)
        wanted = masked_logits(model, plan, compensation, ids) if verify else None
        edits = stage(model, spec, plan, compensation)
        edits.commit()
    try:
        if wanted is not None:
            with torch.inference_mode(False), torch.no_grad():
                compare(wanted, logits_of(model, ids), ids, routed=spec.has_experts)
        yield edits.record(before, model.parameters())
    except BaseException:
        edits.rollback()
        raise


def stage(
    model: PreTrainedModel,
    spec: DecoderSpec,
    plan: PruningPlan,
    compensation: Compensation | None = None,
) -> StagedEdits:
    """Prepare every edit that ``plan`` asks for, without changing the model."""
    parts, edits = DecoderParts(model), StagedEdits()
    constants = compensation.constants if compensation else {}
    weights = compensation.weights if compensation else {}
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
            _remove(edits, parts, place, biases.get(place) if place == LEADING else None)
            continue
        kept = plan.layers[index].kept(part.kind)
        if part.unit == "expert":
            if len(kept) < part.num_units:
                slice_experts(edits, parts, index, kept)
            continue
        if counts[place] < part.num_units:
            _slice(
                edits,
                parts,
                place,
                kept,
                part.head_dim if isinstance(part, AttentionSpec) else None,
                part.unit_width,
                weights.get(place),
            )
            if part.kind == "attention":
                attention = parts.sub_block(*place)
                for name, count in parts.head_counts(index, len(kept)).items():
                    edits.attribute(attention, name, count)
                heads = unit_columns(kept, parts.head_shape(index)[1])
                for path, parameter in parts.per_head(index).items():
                    owner, _, leaf = path.rpartition(".")
                    rows = heads.to(parameter.device)
                    module = parts.layers[index].get_submodule(owner)
                    edits.parameter(module, leaf, parameter[rows], kept=(0, rows))
        elif place in weights:
            edits.parameter(parts.output(*place), "weight", weights[place])
        if place in biases:
            linear = parts.output(*place)
            bias = biases[place] + (0 if linear.bias is None else linear.bias.double().cpu())
            edits.parameter(
                linear, "bias", bias, like=linear.weight if linear.bias is None else linear.bias
            )
    if LEADING in biases and spec.blocks[0].attention is None:
        _add_to_constant(edits, parts, biases[LEADING])
    _restack(edits, parts, spec, counts, left.blocks)
    return edits


def _slice(
    edits: StagedEdits,
    parts: DecoderParts,
    place: SubBlock,
    kept: tuple[int, ...],
    head_dim: int | None,
    unit_width: int,
    compensated: Tensor | None,
) -> None:
    columns = unit_columns(kept, unit_width)
    output = parts.output(*place)
    edits.parameter(
        output,
        "weight",
        output.weight[:, columns.to(output.weight.device)] if compensated is None else compensated,
        kept=(1, columns),
    )
    edits.attribute(output, "in_features", len(columns))
    for number, linear in enumerate(parts.inputs(*place)):
        # q rows are laid out like o columns, whole groups of query heads; k and v have one head for
        # each group
        rows = columns if head_dim is None or number == 0 else unit_columns(kept, head_dim)
        rows = rows.to(linear.weight.device)
        edits.parameter(linear, "weight", linear.weight[rows], kept=(0, rows))
        if linear.bias is not None:
            edits.parameter(linear, "bias", linear.bias[rows], kept=(0, rows))
        edits.attribute(linear, "out_features", len(rows))


def _remove(
    edits: StagedEdits, parts: DecoderParts, place: SubBlock, constant: Tensor | None
) -> None:
    index, kind = place
    bias = None
    if constant is not None:
        like = parts.output(index, kind).weight
        new = constant.to(device=like.device, dtype=like.dtype).clone()
        bias = nn.Parameter(new, requires_grad=like.requires_grad)
        edits.added(bias, beside=like)
    module = ConstantOutput(bias, returns_weights=parts.returns_pair(index, kind))
    module.train(parts.sub_block(index, kind).training)
    norms = {path: nn.Identity().train(module.training) for path in parts.norm_paths(kind)}
    for path, new_module in {parts.sub_block_path(kind): module, **norms}.items():
        parent, _, leaf = path.rpartition(".")
        edits.attribute(parts.layers[index].get_submodule(parent), leaf, new_module)


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
    fields: dict[str, object] = {
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
        for name, value in fields.items():
            if getattr(config, name, None) != value:
                edits.attribute(config, name, value)


def _say_what_layers_hold(model: PreTrainedModel) -> None:
    held: Any = layout_of(model).per_layer_config()
    model.config.per_layer_config = held
