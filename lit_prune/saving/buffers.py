"""Buffers that no state dict holds: made from the config, not always alike (rotary frequencies).

A module converted to bfloat16 rounds them, and a GPU computes them with other last bits than a CPU.
Where that happened they travel in ``buffers.safetensors``, so that the loaded model computes what
was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.decoder import DecoderParts
from lit_prune.errors import ArtifactError
from lit_prune.saving.weights import computed_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A module with a buffer ``x`` that it has no config to make from holds its value as this and ``x``.
_NUMBER = "scalar_"


def buffers_to_save(model: PreTrainedModel, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Return the buffers of ``model`` that loading would not make again, bit for bit.

    Args:
        model: The model that is saved.
        skeleton: What `build` makes of its config; its buffers become real.
    """
    restore_buffers(skeleton, {}, torch.device("cpu"))
    found = {
        name: _at_rest(model, name, buffer) for name, buffer in computed_buffers(model).items()
    }
    fresh = computed_buffers(skeleton)
    return {
        name: buffer
        for name, buffer in found.items()
        # of an attention type that no layer has any more: read by none
        if name in fresh
        and (buffer.dtype != fresh[name].dtype or not torch.equal(buffer, fresh[name]))
    }


def restore_buffers(model: PreTrainedModel, saved: dict[str, Tensor], device: torch.device) -> None:
    """Make the buffers of an empty model real, on the CPU first; then put ``saved`` in their place.

    Raises:
        ArtifactError: If one is far larger than a head, or a saved one does not fit.
    """
    parts = DecoderParts(model)
    attentions = (layer for layer, kind in parts.places() if kind == "attention")
    head_dim = parts.head_shape(next(attentions))[0]
    empty = computed_buffers(model)
    if huge := [name for name, buffer in empty.items() if buffer.numel() > head_dim]:
        raise ArtifactError(
            f"config.json asks for {empty[huge[0]].numel()} values of {huge[0]}; a head has "
            f"{head_dim}."
        )
    for path in sorted({name.rpartition(".")[0] for name in empty}):
        parent, _, leaf = path.rpartition(".")
        old: Any = model.get_submodule(path)
        if numbers := {n: v for n, v in vars(old).items() if n.startswith(_NUMBER)}:
            for name, value in numbers.items():  # Gemma scales its embeddings by a buffer
                setattr(old, name.removeprefix(_NUMBER), torch.tensor(value, device=device))
            continue
        with torch.device("cpu"):
            new = type(old)(config=old.config)
        setattr(model.get_submodule(parent), leaf, new.to(device).train(old.training))
    made = computed_buffers(model)
    for name, tensor in saved.items():
        if name not in made or made[name].shape != tensor.shape:
            raise ArtifactError(
                f"buffers.safetensors: {name:.80} {tuple(tensor.shape)} belongs to no such buffer."
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, tensor.to(device))


def _at_rest(model: PreTrainedModel, name: str, buffer: Tensor) -> Tensor:
    """Return a buffer as it is before any text: some rotary types move theirs with the length."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    kind = str(getattr(owner, "rope_type", "default"))
    original = getattr(owner, f"original_{leaf}", None)
    moves = "dynamic" in kind or kind == "longrope"
    at_rest = original if moves and isinstance(original, Tensor) else buffer
    return at_rest.detach().cpu().clone()
