"""How long the threads of this process wait for a processor: other load, seen from here."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

# On an idle machine threads wait for a processor for one or two hundredths of the time.
BUSY = 0.05

_TASKS = Path("/proc/self/task")


class Waiting:
    """Runs from when it is made; says which share of the time threads have waited.

    Ready to run they were, and had no processor, because other work held it. Every thread counts:
    the share is an upper bound on the delay of all of them together, and may exceed 1. What the
    kernel cannot see, such as a crowded memory bus, another user of the GPU, or time that a
    hypervisor takes away, is not in it.

    Example:
        >>> waiting = Waiting()
        >>> share = waiting.share()
        >>> share is None or share >= 0
        True
    """

    def __init__(self) -> None:
        self._started, self._waited = time.perf_counter(), _waited_seconds()

    def share(self) -> float | None:
        """Return the share until now; None where the system does not say (only Linux does)."""
        now = _waited_seconds()
        if now is None or self._waited is None:
            return None
        # a thread that ended took its count along
        return max(now - self._waited, 0.0) / (time.perf_counter() - self._started)


def _waited_seconds() -> float | None:
    """Add up what ``/proc/self/task/*/schedstat`` says of the threads since they started."""
    total, counted = 0, False
    for task in _TASKS.glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(task.read_text().split()[1])
            counted = True
    return total / 1e9 if counted else None
