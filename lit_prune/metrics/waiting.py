"""How long the threads of this process have waited for a processor: other load, seen from here."""

from __future__ import annotations

import contextlib
from pathlib import Path

_TASKS = Path("/proc/self/task")


def waited_seconds() -> float | None:
    """Return how long this process's threads have been ready to run, but had no processor.

    The difference of two readings is what other work on the machine may have cost in between: it
    counts every thread, so it is an upper bound on the delay of all of them together. What the
    kernel cannot see, such as a crowded memory bus, another user of the GPU, or time that a
    hypervisor takes away, is not in it.

    Returns:
        Seconds since the threads started, or None where the system does not say (only Linux does,
        in ``/proc/self/task/*/schedstat``).
    """
    total, counted = 0, False
    for task in _TASKS.glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(task.read_text().split()[1])
            counted = True
    return total / 1e9 if counted else None
