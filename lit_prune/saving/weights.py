"""Tensors as safetensors files: ties once, shards when large, headers read before data."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_prune.errors import ArtifactError
from lit_prune.saving.files import write_json
from lit_prune.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFERS = "buffers.safetensors"
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_DTYPE_CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what must be stored, and the ties: further name → the name that is stored.

    Example:
        >>> first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        >>> second.weight = first.weight
        >>> stored, ties = tensors_of(torch.nn.Sequential(first, second))
        >>> sorted(stored), ties
        (['0.weight'], {'1.weight': '0.weight'})
    """
    names: dict[tuple[int, ...], str] = {}
    stored: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # the same memory, not only the same object: some wrappers make new Parameter objects
        same = (
            (tensor.data_ptr(), *tensor.shape, *tensor.stride())
            if tensor.data_ptr()
            else (id(tensor),)
        )
        first = names.setdefault(same, name)
        if first == name:
            stored[name] = tensor.detach()
        else:
            ties[name] = first
    return stored, ties


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that no state dict holds: a config makes them (rotary frequencies)."""
    kept = set(model.state_dict())
    return {name: b.detach() for name, b in model.named_buffers() if name not in kept}


def digest_of(model: nn.Module) -> str:
    """Return sha256 over names, shapes, dtypes, bytes and ties of everything that is stored."""
    return digest(*tensors_of(model))


def digest(stored: dict[str, Tensor], ties: dict[str, str]) -> str:
    """Return `digest_of` a model that stores these tensors and ties."""
    whole = hashlib.sha256(repr(sorted(ties.items())).encode())
    for name, tensor in sorted(stored.items()):
        whole.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        whole.update(raw)  # type: ignore[arg-type] # numpy arrays are buffers
    return whole.hexdigest()


def write_weights(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    """Write ``model.safetensors``, or numbered shards with an index as transformers reads it."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and _num_bytes(shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = {"total_size": _num_bytes(tensors.values())}
        write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})


def write_tensors(
    path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None
) -> None:
    """Write one safetensors file.

    Raises:
        ArtifactError: If the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # a view of a larger storage would be refused (or saved whole): copy it
    own = {
        name: t.cpu().contiguous() if t.nbytes == t.untyped_storage().nbytes() else t.cpu().clone()
        for name, t in tensors.items()
    }
    try:
        with whole_file(path) as beside:  # else nobody but the owner could read it
            save_file(own, beside, metadata={"format": "pt", **(about or {})})
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be written: {error}.") from error


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor from the headers alone.

    Raises:
        ArtifactError: If a file is damaged, a name occurs twice, or a dtype is not a float.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    if name in found or part.get_dtype() not in _DTYPE_CODES:
                        raise ArtifactError(
                            f"{path}: {name:.80} is there twice, or not a float "
                            f"({part.get_dtype()})."
                        )
                    found[name] = (tuple(part.get_shape()), _DTYPE_CODES[part.get_dtype()])
        except (SafetensorError, OSError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{path} is not a safetensors file: {error}.") from error
    return found


def read_tensors(
    files: Iterable[Path], device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read every tensor into memory of its own."""
    from safetensors import safe_open

    tensors = {}
    for path in files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                # copied: the file may be replaced while the model lives, and kernels give other
                # last bits on memory that is not aligned as torch aligns its own
                tensors[name] = file.get_tensor(name).to(dtype).clone()
    return tensors


def dtypes_of(model: PreTrainedModel) -> set[torch.dtype]:
    """Return the dtypes of the parameters."""
    return {parameter.dtype for parameter in model.parameters()}


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
