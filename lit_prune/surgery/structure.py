"""A dense model takes the structure that the weights of a pruned one have, before they are loaded.

Names and shapes tell it all: how many layers there are, what each holds, how wide it is, where
biases were added. Which units once stayed does not matter, since every weight is about to be
replaced.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from lit_prune.decoder import LEADING, DecoderParts, SubBlock, spec_for
from lit_prune.errors import PlanMismatchError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery.compensation import Compensation
from lit_prune.surgery.slicing import stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lit_prune.decoder import Family

    Shapes = Mapping[str, tuple[int, ...]]


def take_structure(model: PreTrainedModel, shapes: Shapes) -> bool:
    """Make ``model`` smaller, in place, until its parameters have these names and shapes.

    Its weights are then some of the dense ones: load the real ones next.

    Args:
        model: A dense model, or one that has the structure already.
        shapes: Of the state dict that is to be loaded, by name in the model.

    Returns:
        Whether anything was changed.

    Raises:
        PlanMismatchError: If these are not weights of this model with parts left out; the model is
            unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> def llama(width):
        ...     return LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=width,
        ...         num_hidden_layers=1, num_attention_heads=2, vocab_size=8)).eval()
        >>> dense, pruned = llama(16), llama(6)
        >>> take_structure(dense, {n: tuple(p.shape) for n, p in pruned.named_parameters()})
        True
        >>> dense.model.layers[0].mlp.up_proj
        Linear(in_features=8, out_features=6, bias=False)
    """
    if not _differences(model, shapes):
        return False
    spec, parts = spec_for(model), DecoderParts(model)
    prefix = re.escape(parts.family.layers)
    found = {int(m[1]) for name in shapes if (m := re.match(rf"{prefix}\.(\d+)\.", name))}
    if not found or max(found) >= len(spec.blocks):
        raise _mismatch(f"they hold {len(found)} layers, this model has {len(spec.blocks)}")
    kinds = {(block.attention_type, *parts.per_layer(block.index)) for block in spec.blocks}
    if len(found) < len(spec.blocks) and len(kinds) > 1:
        raise _mismatch(
            f"they hold {len(found)} of {len(spec.blocks)} layers of {len(kinds)} kinds, and do "
            "not say which"
        )
    layers, constants = [], {}
    for block in spec.blocks:
        kept: dict[str, tuple[int, ...]] = {"attention": (), "mlp": ()}
        for part in block.sub_blocks if block.index in found else ():
            place: SubBlock = (block.index, part.kind)
            count = _units(parts, place, shapes)
            if 0 < count < part.least_units:
                raise _mismatch(
                    f"layer {block.index} has {count} experts there, and a token needs "
                    f"{part.least_units}"
                )
            if count > part.num_units:
                raise _mismatch(
                    f"layer {block.index} {part.kind} has {count} units there, {part.num_units} "
                    "here"
                )
            kept[part.kind] = tuple(range(count))
            added = f"{_layer(parts.family, block.index)}.{_bias(parts, place, count)}"
            if part.takes_constant and added in shapes and not (count and part.output_bias):
                constants[place if count else LEADING] = torch.zeros(spec.hidden_size).double()
        layers.append(LayerPlan(block.index, kept["attention"], kept["mlp"]))
    plan = PruningPlan(spec.fingerprint, tuple(layers))
    with torch.inference_mode(False), torch.no_grad():
        edits = stage(model, spec, plan, Compensation(constants, plan.digest, ""))
        edits.commit()
    if left := _differences(model, shapes):
        edits.rollback()
        raise _mismatch(f"{left[0]} differs")
    return True


def _differences(model: PreTrainedModel, shapes: Shapes) -> list[str]:
    """Return the parameters that one of the two lacks, or has in another shape."""
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = set(model.state_dict()) - set(own)
    names = (own.keys() | shapes.keys()) - tied
    return sorted(name for name in names if own.get(name) != shapes.get(name))


def _units(parts: DecoderParts, place: SubBlock, shapes: Shapes) -> int:
    """Return how many units the weights of a sub-block have; 0 where there are none."""
    family, layer = parts.family, _layer(parts.family, place[0])
    routed = parts.experts_of(place[0]) if place[1] == "mlp" else None
    if routed is not None:
        shape = shapes.get(f"{layer}.{routed.router}.weight")
        return 0 if shape is None else shape[0]
    shape = shapes.get(f"{layer}.{family.output(place[1])}.weight")
    if shape is None:
        return 0
    return shape[parts.output(*place).dim(rows=False)] // parts.unit_width(*place)


def _bias(parts: DecoderParts, place: SubBlock, count: int) -> str:
    """Return where the constant of a sub-block lies in its layer."""
    family, kind = parts.family, place[1]
    if count:
        return f"{family.output(kind)}.bias"
    return f"{family.attention if kind == 'attention' else family.mlp}.bias"


def _layer(family: Family, index: int) -> str:
    return f"{family.layers}.{index}"


def _mismatch(reason: str) -> PlanMismatchError:
    return PlanMismatchError(
        f"these weights do not fit: {reason}. They must be those of this model or of a pruned "
        "version of it. Build the module with the dense model that was pruned, then load."
    )
