"""Types of values, in TensorFlow Federated's compact notation: `float32`, `int32[10]`, `float32[?,64]`."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sottovoce.errors import ConfigError

Array: TypeAlias = npt.NDArray[Any]
FloatVector: TypeAlias = npt.NDArray[np.float32]
UintVector: TypeAlias = npt.NDArray[np.uint32]

DTYPES = ("float32", "float64", "int8", "int32", "int64", "uint8", "uint32", "uint64", "bool")
_NOTATION = re.compile(r"(?P<dtype>[a-z]+[0-9]*)(?:\[(?P<shape>(?:\?|\d+)(?:,(?:\?|\d+))*)\])?")


@dataclass(frozen=True, slots=True)
class TensorType:
    """The dtype and shape of a tensor; an unknown dimension is None, printed as `?`."""

    dtype: str
    shape: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")

    def __str__(self) -> str:
        dims = ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.dtype}[{dims}]" if self.shape else self.dtype

    @classmethod
    def parse(cls, notation: str) -> TensorType:
        """Return the type that `notation` (such as `float32[?,64]`) names.

        Raises:
            ConfigError: `notation` is not a tensor type.
        """
        return _parse(notation)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of this type."""
        return np.dtype(self.dtype)

    @property
    def size(self) -> int:
        """Number of elements; a type with an unknown dimension has none and raises ConfigError."""
        if None in self.shape:
            raise ConfigError(f"{self} has an unknown dimension, so its size is not known")
        return math.prod(d for d in self.shape if d is not None)

    def admits(self, array: Array) -> bool:
        """Say whether `array` has this dtype and a shape that fits, unknown dimensions fitting any length."""
        return (
            array.dtype == self.numpy_dtype
            and array.ndim == len(self.shape)
            and all(want is None or want == have for want, have in zip(self.shape, array.shape, strict=True))
        )


@functools.lru_cache(maxsize=1024)
def _parse(notation: str) -> TensorType:
    """Parse once: every port of every batch is held against its type."""
    match = _NOTATION.fullmatch(notation)
    if match is None:
        raise ConfigError(f"{notation!r} is not a tensor type; write for example float32, int32[10] or float32[?,64]")
    dims = match["shape"].split(",") if match["shape"] else []
    return TensorType(match["dtype"], tuple(None if d == "?" else int(d) for d in dims))
