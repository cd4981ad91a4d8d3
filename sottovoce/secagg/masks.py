"""Mask streams: a short key becomes as many uniform words as the vector has, added to it or subtracted in place.

The stream is AES-128-CTR (counter block from zero, big-endian) or ChaCha20 (counter and nonce zero), one for the whole
vector as it lies in memory, read as little-endian words of its own widths. No temporary is as long as the vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher as StreamCipher
from cryptography.hazmat.primitives.ciphers import CipherContext, algorithms, modes

from sottovoce.secagg.segments import Segment, Words, segments_of, unpacked_bytes
from sottovoce.wire.messages import Cipher, SecAggParameters

_BLOCK_BYTES = 1 << 18
_ZERO_COUNTER = bytes(16)
_COUNTER_MODE = modes.CTR(_ZERO_COUNTER)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of words of one width, short enough for the reused block.

    Attributes:
        start: Byte offset in the vector.
        zeros: As many zero bytes, what the cipher encrypts.
        stream: Where the stream's bytes go.
        words: The same bytes as words of this width.
    """

    start: int
    zeros: memoryview
    stream: memoryview
    words: Words


class MaskExpander:
    """Adds mask streams to vectors of one shape, through one reused block that stays in the processor's cache."""

    def __init__(self, parameters: SecAggParameters) -> None:
        """Prepare for vectors of the segments that `parameters` name, as they lie in memory."""
        self._cipher: Cipher = parameters.cipher
        self._stream = bytearray(min(_BLOCK_BYTES, unpacked_bytes(parameters)))
        self._zeros = memoryview(bytes(len(self._stream)))
        self._pieces = [piece for segment in segments_of(parameters) for piece in self._cut(segment)]

    def add(self, vector: bytearray, key: bytes) -> None:
        """Add the stream of `key` to `vector`, each word modulo 2 to its width."""
        self._apply(np.add, vector, key)

    def subtract(self, vector: bytearray, key: bytes) -> None:
        """Subtract the stream of `key` from `vector`, each word modulo 2 to its width."""
        self._apply(np.subtract, vector, key)

    def erase(self) -> None:
        """Overwrite what is left of the last stream."""
        self._stream[:] = bytes(len(self._stream))

    def _cut(self, segment: Segment) -> Iterator[_Piece]:
        stream = memoryview(self._stream)
        for at in range(segment.start, segment.stop, _BLOCK_BYTES):
            length = min(_BLOCK_BYTES, segment.stop - at)
            yield _Piece(at, self._zeros[:length], stream[:length], np.frombuffer(stream[:length], segment.dtype))

    def _apply(self, operation: np.ufunc, vector: bytearray, key: bytes) -> None:
        encrypt_into = _context(self._cipher, key).update_into
        for piece in self._pieces:
            encrypt_into(piece.zeros, piece.stream)
            target = np.frombuffer(vector, piece.words.dtype, piece.words.size, piece.start)
            operation(target, piece.words, target)


def _context(cipher: Cipher, key: bytes) -> CipherContext:
    if cipher == "aes-128-ctr":
        return StreamCipher(algorithms.AES(key), _COUNTER_MODE).encryptor()
    return StreamCipher(algorithms.ChaCha20(key, _ZERO_COUNTER), mode=None).encryptor()
