"""Mask streams: a short key becomes as many uniform words as the vector has, added to it or subtracted in place.

The stream is AES-128-CTR (counter block from zero, big-endian) or ChaCha20 (counter and nonce zero), one for the whole
vector, read as little-endian words of the vector's own widths. No temporary is as long as the vector.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher as StreamCipher
from cryptography.hazmat.primitives.ciphers import CipherContext, algorithms, modes

from sottovoce.types import Array
from sottovoce.wire.messages import Cipher, SecAggParameters

_NARROW = np.dtype("<u4")
_WIDE = np.dtype("<u8")
_BLOCK_BYTES = 1 << 17
_ZERO_COUNTER = bytes(16)


class MaskExpander:
    """Adds mask streams to vectors of one shape, through one reused block that stays in the processor's cache."""

    def __init__(self, parameters: SecAggParameters) -> None:
        self._cipher: Cipher = parameters.cipher
        self._split = parameters.vector_bytes - parameters.wide_bytes
        self._pieces = [
            *_pieces(0, self._split, _NARROW),
            *_pieces(self._split, parameters.vector_bytes, _WIDE),
        ]
        block_bytes = min(_BLOCK_BYTES, parameters.vector_bytes)
        self._zeros = memoryview(bytes(block_bytes))
        self._stream = bytearray(block_bytes)

    def add(self, vector: bytearray, key: bytes) -> None:
        """Add the stream of `key` to `vector`, each word modulo 2 to its width."""
        self._apply(np.add, vector, key)

    def subtract(self, vector: bytearray, key: bytes) -> None:
        """Subtract the stream of `key` from `vector`, each word modulo 2 to its width."""
        self._apply(np.subtract, vector, key)

    def erase(self) -> None:
        """Overwrite what is left of the last stream."""
        self._stream[:] = bytes(len(self._stream))

    def _apply(self, operation: np.ufunc, vector: bytearray, key: bytes) -> None:
        context = _context(self._cipher, key)
        stream = memoryview(self._stream)
        for start, count, dtype in self._pieces:
            length = count * dtype.itemsize
            context.update_into(self._zeros[:length], stream[:length])
            target: Array = np.frombuffer(vector, dtype, count=count, offset=start)
            operation(target, np.frombuffer(self._stream, dtype, count=count), out=target)


def _pieces(
    start: int, stop: int, dtype: np.dtype[np.unsignedinteger]
) -> list[tuple[int, int, np.dtype[np.unsignedinteger]]]:
    """Return (byte offset, number of words, dtype) of the blocks between `start` and `stop`."""
    return [(at, min(_BLOCK_BYTES, stop - at) // dtype.itemsize, dtype) for at in range(start, stop, _BLOCK_BYTES)]


def _context(cipher: Cipher, key: bytes) -> CipherContext:
    if cipher == "aes-128-ctr":
        return StreamCipher(algorithms.AES(key), modes.CTR(_ZERO_COUNTER)).encryptor()
    return StreamCipher(algorithms.ChaCha20(key, _ZERO_COUNTER), mode=None).encryptor()
