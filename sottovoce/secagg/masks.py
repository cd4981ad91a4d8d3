"""Mask streams: a short key becomes as many uniform words as the vector has, added to it or subtracted in place.

The stream is AES-128-CTR (counter block from zero, big-endian) or ChaCha20 (counter and nonce zero), one for the whole
vector as it lies in memory, read as little-endian words of its own widths. No temporary is as long as the vector.

Many streams are added block by block, not stream by stream: a block of the vector and the one reused block of stream
stay in the processor's cache until the last stream has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher as StreamCipher
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from sottovoce.secagg.segments import Segment, Words, segments_of, unpacked_bytes
from sottovoce.wire.messages import Cipher, SecAggParameters

_Encryption: TypeAlias = Callable[[memoryview, memoryview], int]

_BLOCK_BYTES = 1 << 17
_ZEROS = memoryview(bytes(_BLOCK_BYTES))
_ZERO_COUNTER = bytes(16)
_COUNTER_MODE = modes.CTR(_ZERO_COUNTER)


@dataclass(frozen=True, slots=True)
class _Run:
    """Words of one width within a block.

    Attributes:
        start: Byte offset in the vector.
        stream: The stream's words that belong to them.
    """

    start: int
    stream: Words

    def of(self, vector: bytearray) -> Words:
        """Return a view of them in `vector`."""
        return np.frombuffer(vector, self.stream.dtype, self.stream.size, self.start)


@dataclass(frozen=True, slots=True)
class _Block:
    """A part of the vector as long as the reused block of stream, or shorter.

    Attributes:
        zeros: As many zero bytes, what the cipher encrypts.
        stream: Where the stream's bytes go.
        runs: The words in it.
    """

    zeros: memoryview
    stream: memoryview
    runs: tuple[_Run, ...]


class MaskExpander:
    """Adds mask streams to vectors of one shape, through one reused block that stays in the processor's cache."""

    def __init__(self, parameters: SecAggParameters) -> None:
        """Prepare for vectors of the segments that `parameters` name, as they lie in memory."""
        self._cipher: Cipher = parameters.cipher
        length = unpacked_bytes(parameters)
        self._stream = bytearray(min(_BLOCK_BYTES, length))
        self._blocks = [
            self._cut(segments_of(parameters), at, min(at + _BLOCK_BYTES, length))
            for at in range(0, length, _BLOCK_BYTES)
        ]

    def add(self, vector: bytearray, key: bytes) -> None:
        """Add the stream of `key` to `vector`, each word modulo 2 to its width."""
        self.apply(vector, added=(key,))

    def subtract(self, vector: bytearray, key: bytes) -> None:
        """Subtract the stream of `key` from `vector`, each word modulo 2 to its width."""
        self.apply(vector, subtracted=(key,))

    def apply(self, vector: bytearray, *, added: Iterable[bytes] = (), subtracted: Iterable[bytes] = ()) -> None:
        """Add and subtract many streams in one pass over `vector`, each word modulo 2 to its width.

        Args:
            vector: As it lies in memory; changed in place.
            added: Keys of the streams to add. Each needs about 1 kB while this runs.
            subtracted: Keys of the streams to subtract.
        """
        streams: list[tuple[np.ufunc, _Encryption]] = [(np.add, _encryption(self._cipher, key)) for key in added]
        streams += [(np.subtract, _encryption(self._cipher, key)) for key in subtracted]
        for block in self._blocks:
            zeros, stream = block.zeros, block.stream
            runs = [(run.of(vector), run.stream) for run in block.runs]
            for operation, encrypt_into in streams:
                encrypt_into(zeros, stream)
                for target, words in runs:
                    operation(target, words, target)

    def erase(self) -> None:
        """Overwrite what is left of the last stream."""
        self._stream[:] = _ZEROS[: len(self._stream)]

    def _cut(self, segments: Sequence[Segment], start: int, stop: int) -> _Block:
        stream = memoryview(self._stream)[: stop - start]
        return _Block(_ZEROS[: stop - start], stream, tuple(self._runs(segments, start, stop)))

    def _runs(self, segments: Sequence[Segment], start: int, stop: int) -> Iterator[_Run]:
        for segment in segments:
            first, last = max(segment.start, start), min(segment.stop, stop)
            if first < last:
                count = (last - first) // segment.dtype.itemsize
                yield _Run(first, np.frombuffer(self._stream, segment.dtype, count, first - start))


def _encryption(cipher: Cipher, key: bytes) -> _Encryption:
    """Return what writes the next bytes of the stream of `key`, given as many zeros."""
    if cipher == "aes-128-ctr":
        return StreamCipher(algorithms.AES128(key), _COUNTER_MODE).encryptor().update_into
    return StreamCipher(algorithms.ChaCha20(key, _ZERO_COUNTER), mode=None).encryptor().update_into
