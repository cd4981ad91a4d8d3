"""The committed counting programs: which there are, and how they are found. See `models/counting.py` for what they do.

A vocabulary of any size uses the next larger program; the entries that are too many stay 0. From
4096 on the sizes grow by a half and a third in turn, so at most a third of an upload is unused.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final, Literal, TypeAlias

from sottovoce.errors import ConfigError

Family: TypeAlias = Literal["words", "pairs", "amounts", "bins", "groups"]
SIZES: Final = (
    64,
    256,
    1024,
    2048,
    *(size for power in range(12, 16) for size in (2**power, 3 * 2 ** (power - 1))),
    2**16,
)
"""Entries of the programs that count words and pairs: 64, 256, 1024, 2048, 4096, 6144, 8192, 12288 … 65536."""
AMOUNT_SIZES: Final = tuple(size for size in SIZES if size >= 2**12)
"""Entries of the programs that add up amounts."""
BINS: Final = 64
"""Bins of the program that counts values."""
GROUPS: Final = 64
"""Groups of the program that adds up moments."""
START: Final = "start"
"""The broadcast port of every counting program that says what its accumulators start at: [0]."""
_FOLDER = Path(__file__).parent.parent / "counting"


def program_name(family: Family, size: int) -> str:
    """Return the name of a counting program and, with `.svp`, of its file."""
    return f"{family}_{size}"


@functools.lru_cache(maxsize=16)
def counting_program(family: Family, entries: int) -> tuple[bytes, int]:
    """Return the bundle of the smallest program of `family` with at least `entries` entries, and how many it has.

    Raises:
        ConfigError: None is so large.
    """
    sizes = {"bins": (BINS,), "groups": (GROUPS,), "amounts": AMOUNT_SIZES}.get(family, SIZES)
    size = next((size for size in sizes if size >= entries), None)
    if size is None:
        raise ConfigError(f"{entries} entries are too many; {family} are counted up to {sizes[-1]}: use fewer words")
    try:
        return (_FOLDER / f"{program_name(family, size)}.svp").read_bytes(), size
    except OSError as error:
        raise ConfigError(f"{error.filename} is missing; install sottovoce again") from error
