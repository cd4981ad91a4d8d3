"""The coordinator's time, and waiting: for the shells, which hand it to everything else."""

from __future__ import annotations

import time
from collections.abc import Callable


def steady_clock() -> Callable[[], int]:
    """Return a clock in Unix milliseconds that never jumps: deadlines must not depend on somebody setting the time."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda: (time.monotonic_ns() + offset_ns) // 1_000_000


def pause(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)
