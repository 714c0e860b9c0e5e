"""A fixed piece of work, timed beside a model: whether the machine itself got slower or faster."""

from __future__ import annotations

import statistics
import time

import torch

from lit_prune.metrics.device import synchronize

# Products of [_ROWS, _WIDTH] by [_WIDTH, _WIDTH] are bound by arithmetic, as a prefill is; those of
# one row by _LONG x _LONG weights, 16 MB, by reading them, as a decoding step is.
_ROWS, _WIDTH, _LONG = 256, 1024, 2048
# Of an accelerator many small operations in a row, as a decoder starts them.
_PASSES = 64
_RUNS = 10


class Yardstick:
    """Times the same products, whatever the model: before it is measured, and after.

    Two latencies lie seconds or hours apart. What changed in between, other than the model, changes
    the time of these products, too: a crowded memory bus, another user of the GPU, a clock that was
    lowered, a hypervisor that gives less. Float32 everywhere, 21 MB.

    Example:
        >>> yardstick = Yardstick(torch.device("cpu"))
        >>> yardstick.run()
        >>> yardstick.seconds() > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._passes = 1 if device.type == "cpu" else _PASSES
        # ones: no random number is drawn, and no product grows beyond float32
        self._rows = torch.ones(_ROWS, _WIDTH, device=device)
        self._square = torch.ones(_WIDTH, _WIDTH, device=device)
        self._row = torch.ones(1, _LONG, device=device)
        self._long = torch.ones(_LONG, _LONG, device=device)
        self._times: list[float] = []
        self._once()  # first touch of memory and kernels

    def run(self) -> None:
        """Time some runs."""
        self._times += [self._once() for _ in range(_RUNS)]

    def seconds(self) -> float:
        """Return the median of all runs so far."""
        return statistics.median(self._times)

    @torch.no_grad()
    def _once(self) -> float:
        synchronize(self._device)
        started = time.perf_counter()
        for _ in range(self._passes):
            torch.mm(self._rows, self._square)
            torch.mm(self._row, self._long)
        synchronize(self._device)
        return time.perf_counter() - started
