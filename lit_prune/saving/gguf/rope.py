"""Rotary positions in the terms of llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_prune.errors import FormatError
from lit_prune.saving.gguf.architecture import NAME

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FREQUENCIES = "rope_freqs.weight"


def write_rope(writer: Any, model: PreTrainedModel, head_dim: int) -> Tensor | None:  # noqa: ANN401 - optional package
    """Write the keys; return the divisors ``[head_dim / 2]`` that go into `FREQUENCIES`, if any.

    Raises:
        FormatError: If llama.cpp has no such scaling.
    """
    found = parameters_of(model)
    writer.add_rope_freq_base(float(found["rope_theta"]))
    writer.add_rope_dimension_count(head_dim)
    kind = found["rope_type"]
    if kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(found["factor"]))
    return llama3_divisors(found, head_dim) if kind == "llama3" else None


def parameters_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return ``rope_parameters`` of the config, checked.

    Raises:
        FormatError: If llama.cpp has no such scaling.
    """
    found: dict[str, Any] = dict(getattr(model.config, "rope_parameters", None) or {})
    kind = found.setdefault("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise FormatError(
            NAME,
            f"its rotary positions are scaled by {kind!r}; default, linear and llama3 are known "
            "here",
        )
    if (part := found.get("partial_rotary_factor", 1.0)) != 1.0:
        raise FormatError(NAME, f"only {part:.0%} of each head is rotated")
    return found


def llama3_divisors(found: dict[str, Any], head_dim: int) -> Tensor:
    """Return by what each rotary frequency is divided, ``[head_dim / 2]``, float32.

    Wavelengths below ``original / high_freq_factor`` stay, those above ``original /
    low_freq_factor`` grow by ``factor``; between them the frequency is a mixture (Llama 3.1).

    Example:
        >>> scaling = {"rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        ...            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        >>> llama3_divisors(scaling, 4)
        tensor([1., 8.])
    """
    import torch

    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = found["original_max_position_embeddings"] / (
        2 * torch.pi * float(found["rope_theta"]) ** steps
    )  # of the old context
    low, high = float(found["low_freq_factor"]), float(found["high_freq_factor"])
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / (kept + (1 - kept) / float(found["factor"]))
    return divisors.float()
