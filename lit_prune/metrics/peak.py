"""Peak memory of one forward."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_prune.decoder import logits_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakMemory:
    """Most bytes that one forward held at a time, weights not counted.

    Attributes:
        num_bytes: Bytes above what was held before the forward.
        method: ``"cuda allocator"`` (`torch.cuda.max_memory_allocated`, all that PyTorch allocated)
            or ``"operator outputs"`` (storages returned by operators and still alive; what a kernel
            allocates inside itself and gives back is not seen). Compare only numbers of one method.
        batch_size: Sequences in the forward.
        prompt_tokens: Tokens of each.
    """

    num_bytes: int
    method: str
    batch_size: int
    prompt_tokens: int


@torch.no_grad()
def measure_peak(model: nn.Module, input_ids: Tensor) -> PeakMemory:
    """Measure the memory that one uncached forward needs besides the weights.

    All logits are computed and held, as in a validation step. On CUDA the peak counter of the
    device is reset.

    Args:
        model: Hugging Face causal language model; runs in the mode it is in.
        input_ids: ``[batch, tokens]``; moved to the device of the model.

    Returns:
        Peak bytes, and how they were counted.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     vocab_size=512)).eval()
        >>> peak = measure_peak(model, torch.ones(2, 16, dtype=torch.int64))
        >>> peak.num_bytes >= 2 * 16 * 512 * 4, peak.method  # the float32 logits alone
        (True, 'operator outputs')
    """
    device = next(model.parameters()).device
    input_ids = input_ids.to(device)
    if device.type == "cuda":
        # the first forward of a process also allocates cuBLAS workspaces, which stay
        logits_of(model, input_ids=input_ids)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        logits_of(model, input_ids=input_ids)
        torch.cuda.synchronize(device)
        num_bytes, method = torch.cuda.max_memory_allocated(device) - held, "cuda allocator"
    else:
        with _LiveOutputs() as live:
            logits_of(model, input_ids=input_ids)
        num_bytes, method = live.peak, "operator outputs"
    return PeakMemory(
        num_bytes=num_bytes,
        method=method,
        batch_size=input_ids.shape[0],
        prompt_tokens=input_ids.shape[1],
    )


class _LiveOutputs(TorchDispatchMode):
    """Count the bytes of storages that operators returned, until each is freed.

    The CPU allocator keeps no peak, the peak RSS of a process never falls, and the profiler's
    memory events have no public reading as a peak. A storage is counted once however many views it
    has; one that existed before (a weight, of which an operator returned a view) is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        self._known.update(_storages((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, num_bytes: int) -> None:
        self._now += num_bytes
        self.peak = max(self.peak, self._now)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
