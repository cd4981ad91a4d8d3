"""Constants of the author's inside a computation: what their types are, and what structs are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.types import StructType, TensorType, Type
from sottovoce.values import Record


def constant_type(constant: object) -> Type:
    """Return the type of a Python constant: int is int32 (int64 where it must be), float is float32.

    Raises:
        ConfigError: It is no number, text, array, mapping or tuple of these.
    """
    match constant:
        case bool() | np.bool_():
            return TensorType("bool")
        case np.ndarray() | np.generic():
            return TensorType("str" if constant.dtype.kind == "U" else constant.dtype.name, constant.shape)
        case int():
            return TensorType("int32" if -(2**31) <= constant < 2**31 else "int64")
        case float():
            return TensorType("float32")
        case str():
            return TensorType("str")
        case Mapping() | Record() | tuple() | list():
            names, parts = named_parts(constant)
            return StructType(tuple((name, constant_type(part)) for name, part in zip(names, parts, strict=True)))
    raise ConfigError(f"a {type(constant).__name__} is no number, text, array, dict or tuple of these")


def named_parts(given: Any) -> tuple[list[str | None], list[Any]]:
    """Return the names (None where there is none) and the parts of a mapping, Record, named tuple, tuple or list."""
    if isinstance(given, Record):
        pairs = list(given.elements())
        return [name for name, _ in pairs], [part for _, part in pairs]
    if isinstance(given, Mapping):
        return [str(name) for name in given], list(given.values())
    return list(getattr(given, "_fields", (None,) * len(given))), list(given)
