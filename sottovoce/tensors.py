"""Named tensors as bytes: state blobs, checkpoints and results."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from sottovoce.blobs import Document
from sottovoce.errors import ConfigError, MalformedMessage
from sottovoce.types import Array, TensorType


class _Tensor(Document, array_like=True, frozen=True):
    type: str
    content: bytes


_DECODER = msgspec.msgpack.Decoder(dict[str, _Tensor])


def encode_tensors(tensors: Mapping[str, Array]) -> bytes:
    """Return the canonical bytes of `tensors` (order kept): name -> (type in the notation, little-endian C order)."""
    return msgspec.msgpack.encode(
        {
            name: _Tensor(
                type=str(TensorType(str(array.dtype), array.shape)),
                content=np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes(),
            )
            for name, array in tensors.items()
        }
    )


def decode_tensors(content: bytes | memoryview) -> dict[str, Array]:
    """Return the named tensors in `content`, writable copies.

    Raises:
        MalformedMessage: The bytes are not named tensors, or a type and its content disagree.
    """
    try:
        named = _DECODER.decode(content)
        return {name: _array(tensor) for name, tensor in named.items()}
    except (msgspec.ValidationError, msgspec.DecodeError, ConfigError, ValueError) as error:
        raise MalformedMessage(f"not named tensors: {error}") from error


def _array(tensor: _Tensor) -> Array:
    kind = TensorType.parse(tensor.type)
    if kind.size * kind.numpy_dtype.itemsize != len(tensor.content):
        raise MalformedMessage(f"a tensor {kind} cannot have {len(tensor.content)} bytes")
    flat = np.frombuffer(tensor.content, dtype=kind.numpy_dtype.newbyteorder("<"))
    return flat.astype(kind.numpy_dtype).reshape(tuple(d for d in kind.shape if d is not None))
