"""How far memory rises while something runs: resident memory of the process, or CUDA's own count.

Linux only (it lets a process reset its high-water mark); elsewhere nothing is told.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Rise:
    """Bytes by which memory rose above its present size, once `stop` is called.

    What earlier work freed but the allocator kept would hide the rise: it is handed back first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        # with another C library the rise may come out too small
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        try:
            _RESET.write_text("5")
        except OSError:
            self.before = None
        else:
            self.before = _kilobytes("VmRSS") * 1024

    def stop(self) -> int | None:
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, _kilobytes("VmHWM") * 1024 - self.before)


def _kilobytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
