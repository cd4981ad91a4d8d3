"""Values of the language as bytes and back, so that a program's state outlives its process.

What comes back is what went in: arrays with dtype and shape, numpy scalars, `Record`s, tuples, lists, dicts, numbers,
text. A named tuple comes back as a `Record`, which is read in the same two ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec
import numpy as np

from sottovoce.errors import ConfigError, MalformedMessage
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.values import Record

_PLAIN = (type(None), bool, float, str, bytes)
_LARGEST_PLAIN_INTEGER = 2**63
"""MessagePack has integers of 64 bits; larger ones are written as text."""


def encode_value(value: object, *, what: str = "the value") -> bytes:
    """Return `value` as bytes.

    Args:
        value: Nested records, tuples, lists and dicts of arrays, numpy scalars, Python numbers, text, bytes and None.
        what: Names it in errors.

    Raises:
        ConfigError: Something in it is of another kind; the text says where and what to do.
    """
    return msgspec.msgpack.encode(_written(value, what))


def decode_value(content: bytes) -> Any:
    """Return the value that `encode_value` wrote.

    Raises:
        ConfigError: It was damaged, or another release wrote it.
    """
    try:
        return _read(msgspec.msgpack.decode(content))
    except (msgspec.DecodeError, MalformedMessage, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"this stored value is damaged, or another release wrote it: {error}") from error


def _written(value: Any, what: str) -> Any:
    """Return `value` as MessagePack has it; whatever that does not have is a list that begins with what it is."""
    if type(value) in _PLAIN:
        return value
    if type(value) is int:
        return value if -_LARGEST_PLAIN_INTEGER <= value < _LARGEST_PLAIN_INTEGER else ["int", str(value)]
    if isinstance(value, np.ndarray | np.generic):
        return _written_array(value, what)
    if isinstance(value, Record):
        return ["record", [[name, _written(v, f"{what}.{name}")] for name, v in value.elements()]]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        pairs = zip(value._fields, value, strict=True)
        return ["record", [[name, _written(v, f"{what}.{name}")] for name, v in pairs]]
    if isinstance(value, Mapping):
        return ["dict", [[_written(k, f"a key of {what}"), _written(v, f"{what}[{k!r}]")] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_written(v, f"{what}[{index}]") for index, v in enumerate(value)]]
    _refuse(value, what)


def _written_array(value: Any, what: str) -> list[object]:
    array = np.asarray(value)
    if array.dtype.kind == "U":
        return ["text" if isinstance(value, np.generic) else "texts", list(array.shape), array.ravel().tolist()]
    try:
        return ["scalar" if isinstance(value, np.generic) else "array", encode_tensors({"": array})]
    except ConfigError as error:
        raise ConfigError(f"{what} cannot be stored: {error}") from error


def _refuse(value: object, what: str) -> NoReturn:
    raise ConfigError(
        f"{what} is a {type(value).__name__}, which cannot be stored; make it of numbers, text, numpy arrays, dicts, "
        "lists and tuples (of a TensorFlow tensor or variable: .numpy())"
    )


def _read(written: Any) -> Any:
    if not isinstance(written, list):
        return written
    match written:
        case ["int", text]:
            return int(text)
        case ["record", pairs]:
            return Record([(name, _read(value)) for name, value in pairs])
        case ["dict", pairs]:
            return {_read(key): _read(value) for key, value in pairs}
        case ["list", items]:
            return [_read(item) for item in items]
        case ["tuple", items]:
            return tuple(_read(item) for item in items)
        case ["array", content]:
            return decode_tensors(content)[""]
        case ["scalar", content]:
            return decode_tensors(content)[""][()]
        case ["text" | "texts" as kind, shape, texts]:
            array = np.array(texts, dtype=np.str_).reshape(shape)
            return array if kind == "texts" else array[()]
    raise ValueError(f"nothing is written as {written[:1]}")
