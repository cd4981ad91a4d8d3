"""What this machine can do."""

from __future__ import annotations

import platform
import sys
from pathlib import Path


def has_fast_aes(cpu: str | None = None) -> bool:
    """Say whether this machine has AES instructions.

    Args:
        cpu: Text of /proc/cpuinfo; None reads it.
    """
    if cpu is None:
        if sys.platform == "darwin":
            return platform.machine() == "arm64"
        try:
            cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
    lines = (line.partition(":") for line in cpu.splitlines())
    return any(name.strip() in ("flags", "Features") and "aes" in value.split() for name, _, value in lines)
