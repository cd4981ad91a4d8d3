"""What the devices of a simulated fleet have in their collections: as its author writes it, and by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from sottovoce.types import Array

DeviceExamples: TypeAlias = Sequence[Any] | Array
"""One entry a device: a number or text (one example), an array or list of such, or a mapping from columns to those."""
COLUMN = "value"
"""The column of a collection whose examples are no mappings; a program of one port reads it whatever its name."""
_READINGS = 10
_MEAN_DEGREES, _SPREAD_DEGREES, _NOISE_DEGREES = 21.0, 2.0, 0.3


def temperatures(devices: int, seed: int) -> dict[str, Array]:
    """Return the collection `temperature`: ten readings a device in degrees Celsius, rooms differing by two degrees."""
    generator = np.random.default_rng(seed)
    rooms = generator.normal(_MEAN_DEGREES, _SPREAD_DEGREES, (devices, 1))
    readings = rooms + generator.normal(0.0, _NOISE_DEGREES, (devices, _READINGS))
    return {"temperature": readings.round(2).astype(np.float32)}


def columns_of(entry: Any) -> dict[str, Array]:
    """Return what one device has as columns of equal length.

    Args:
        entry: See `DeviceExamples`.
    """
    columns = entry if isinstance(entry, Mapping) else {COLUMN: entry}
    return {name: np.atleast_1d(np.asarray(column)) for name, column in columns.items()}
