"""Whether two models have the same shape, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.decoder import DecoderParts
from lit_prune.decoder.layout import layout_of
from lit_prune.saving.weights import computed_buffers, tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a forward reads from an attention module besides its weights.
_TRAITS = (
    "head_dim",
    "head_size",
    "scaling",
    "sliding_window",
    "is_causal",
    "use_rope",
    "rotary_ndims",
    "attn_logit_softcapping",
)


def difference(rebuilt: PreTrainedModel, model: PreTrainedModel) -> str | None:
    """Say in words where two models differ in shape, or return None."""
    (mine, my_ties), (its, its_ties) = tensors_of(rebuilt), tensors_of(model)
    for name in sorted(mine.keys() | its.keys()):
        shapes = [tuple(x[name].shape) if name in x else None for x in (mine, its)]
        if shapes[0] != shapes[1]:
            return f"{name} ({shapes[0]} for {shapes[1]})"
    if my_ties != its_ties:
        return f"tied weights ({my_ties} for {its_ties})"
    if layout_of(rebuilt).layers != layout_of(model).layers:
        return "the layout of its layers"
    layers = range(len(layout_of(model).layers))
    if (trait := other_trait(rebuilt, model, dict(zip(layers, layers, strict=True)))) is not None:
        return trait
    buffers = [{k: v.shape for k, v in computed_buffers(x).items()} for x in (rebuilt, model)]
    return None if buffers[0] == buffers[1] else "its computed buffers"


def other_trait(
    rebuilt: PreTrainedModel, model: PreTrainedModel, layers: dict[int, int]
) -> str | None:
    """Say in words where attentions compute differently, or return None.

    Args:
        rebuilt: The one.
        model: The other.
        layers: Which layer of ``rebuilt`` stands for which of ``model``.
    """
    a, b = DecoderParts(rebuilt), DecoderParts(model)
    for mine, its in layers.items():
        for trait in _TRAITS if b.exists(its, "attention") else ():
            values = [
                getattr(parts.sub_block(index, "attention"), trait, None)
                for parts, index in ((a, mine), (b, its))
            ]
            if values[0] != values[1]:
                return f"{trait} of layer {its} ({values[0]} for {values[1]})"
    return None
