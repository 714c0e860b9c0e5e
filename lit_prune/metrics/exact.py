"""A torchmetrics `Metric` whose sums keep their precision when the module around it is cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class ExactMetric(Metric):
    """Metric whose states follow the module to another device, but never to another dtype.

    A metric that is an attribute of a LightningModule is a sub-module of it, so
    ``module.to(torch.bfloat16)`` and ``Trainer(precision="bf16-true")`` turn torchmetrics' float64
    states into bfloat16 (``.half()`` does not; reference/ecosystem.md, P10), in which a sum of ones
    stops at 256. Here `set_dtype` and all dtype conversions leave the states alone.

    Example:
        >>> class Total(ExactMetric):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.add_state("total", torch.zeros(()).double(), dist_reduce_fx="sum")
        ...     def update(self, value):
        ...         self.total = self.total + value
        ...     def compute(self):
        ...         return self.total
        >>> module = torch.nn.ModuleDict({"total": Total()}).to(torch.bfloat16)
        >>> module["total"].total.dtype
        torch.float64
    """

    full_state_update = False

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> ExactMetric:
        # `fn` is asked where it would put a tensor, on a value that may be damaged, and the state
        # itself is moved there as it is. MPS has no float64: the few numbers that a metric holds
        # stay on the CPU instead.
        def move(state: Tensor) -> Tensor:
            device = fn(torch.zeros(1, device=state.device)).device
            return state.to("cpu" if device.type == "mps" else device)

        super()._apply(move, exclude_state)  # in place
        return self

    def set_dtype(self, dst_type: str | torch.dtype) -> ExactMetric:
        """Return the metric as it is: its states are float64 and int64 by design."""
        return self
