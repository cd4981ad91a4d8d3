"""Many devices on one machine: the only package that imports both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulation.memory_fleet import fleet

__all__ = ["fleet"]


def __getattr__(name: str) -> Any:
    """Import `fleet` on first use: the demos' processes need nothing of it."""
    if name == "fleet":
        from simulation.memory_fleet import fleet

        return fleet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
