"""Which of the devices that checked in take part."""

from __future__ import annotations

from collections.abc import Callable, Iterable

_DRAW_BYTES = 16


def choose_cohort(checked_in: Iterable[str], *, wanted: int, entropy: Callable[[int], bytes]) -> frozenset[str]:
    """Return `wanted` of the devices, each set equally likely; all of them if there are not more.

    Every device draws 128 bits and the largest draws win, so the choice depends neither on names nor on who came first.

    Args:
        checked_in: Device ids.
        wanted: How many to choose, > 0.
        entropy: Returns that many random bytes.
    """
    draws = sorted((entropy(_DRAW_BYTES), device) for device in sorted(checked_in))
    return frozenset(device for _, device in draws[-wanted:])
