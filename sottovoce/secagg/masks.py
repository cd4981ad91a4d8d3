"""Mask streams: a short key becomes as many uniform words as the vector has, added to it or subtracted in place.

The stream is AES-128-CTR (counter block from zero, big-endian) or ChaCha20 (counter and nonce zero), one for the whole
vector as it lies in memory, read as little-endian words of its own widths. No temporary is as long as a large vector.

AES-128-CTR is made as what it is, the encryption of the numbers 0, 1, 2 ... each on its own: those of a block are
written down once for all streams. A library's counter mode counts anew for each of them.

Many streams are added block by block, not stream by stream: the sum of a block and the one reused block of stream stay
in the processor's cache until the last stream has passed, both aligned, which a vector need not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher as StreamCipher
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from sottovoce.secagg.segments import Words, segments_of, unpacked_bytes
from sottovoce.wire.messages import Cipher, SecAggParameters

_Encryption: TypeAlias = Callable[[memoryview, memoryview], int]

_LARGEST_BLOCK_BYTES = 1 << 17
_CACHE_LINE_BYTES = 64
_COUNTER = np.dtype((">u8", 2))
_EACH_ON_ITS_OWN = modes.ECB()  # noqa: S305 What is encrypted are counters, no two of them equal.
_ZERO_COUNTER = bytes(16)


@dataclass(frozen=True, slots=True)
class _Block:
    """A part of the vector as long as the reused block of stream, or shorter.

    Attributes:
        place: Where it is in the vector.
        first: Counter of its first 16 bytes.
        plain: What the cipher encrypts, rounded up to whole counters.
        stream: Where the stream's bytes go, with the room to spare that the library wants.
        total: Where the sum is made.
        words: The words of `total` and of `stream`, width by width.
    """

    place: slice
    first: int
    plain: memoryview
    stream: memoryview
    total: memoryview
    words: tuple[tuple[Words, Words], ...]


class MaskExpander:
    """Adds mask streams to vectors of one shape, through reused blocks that stay in the processor's cache."""

    def __init__(self, parameters: SecAggParameters) -> None:
        """Prepare for vectors of the segments that `parameters` name, as they lie in memory."""
        self._cipher: Cipher = parameters.cipher
        length = unpacked_bytes(parameters)
        block_bytes = _block_bytes(length)
        self._plain, self._total = _aligned(block_bytes), _aligned(block_bytes)
        self._stream = _aligned(block_bytes + _COUNTER.itemsize)
        self._numbers = np.arange(block_bytes // _COUNTER.itemsize, dtype=np.uint64)
        self._blocks = [
            self._cut(parameters, at, min(at + block_bytes, length)) for at in range(0, length, block_bytes)
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
        with memoryview(vector) as view:
            for block in self._blocks:
                self._count_from(block.first)
                block.total[:] = view[block.place]
                plain, stream, words = block.plain, block.stream, block.words
                for operation, encrypt_into in streams:
                    encrypt_into(plain, stream)
                    for total, mask in words:
                        operation(total, mask, total)
                view[block.place] = block.total

    def erase(self) -> None:
        """Overwrite what is left of the last stream and of the last sum."""
        self._stream[:] = 0
        self._total[:] = 0

    def _count_from(self, first: int) -> None:
        """Write the counters from `first` on where AES encrypts them; ChaCha20 counts itself and encrypts zeros."""
        if self._cipher == "aes-128-ctr":
            np.add(self._numbers, np.uint64(first), out=self._plain.view(_COUNTER.base)[1::2])

    def _cut(self, parameters: SecAggParameters, start: int, stop: int) -> _Block:
        counters, words = -(-(stop - start) // _COUNTER.itemsize), tuple(self._words(parameters, start, stop))
        plain = self._plain.data[: counters * _COUNTER.itemsize]
        total, first = self._total.data[: stop - start], start // _COUNTER.itemsize
        return _Block(slice(start, stop), first, plain, self._stream.data, total, words)

    def _words(self, parameters: SecAggParameters, start: int, stop: int) -> Iterator[tuple[Words, Words]]:
        for segment in segments_of(parameters):
            first, last = max(segment.start, start), min(segment.stop, stop)
            if first < last:
                place = slice(first - start, last - start)
                yield self._total[place].view(segment.dtype), self._stream[place].view(segment.dtype)


def _block_bytes(length: int) -> int:
    """Return the length of a block: as few blocks as fit, all nearly as long, whole cache lines but for the last."""
    count = -(-length // _LARGEST_BLOCK_BYTES)
    lines = -(-length // (count * _CACHE_LINE_BYTES))
    return lines * _CACHE_LINE_BYTES


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    """Return `size` zero bytes that begin with a cache line: adding words across lines takes a quarter longer."""
    room = np.zeros(size + _CACHE_LINE_BYTES, np.uint8)
    start = -room.ctypes.data % _CACHE_LINE_BYTES
    return room[start : start + size]


def _encryption(cipher: Cipher, key: bytes) -> _Encryption:
    """Return what writes the next bytes of the stream of `key`, given as many counters (AES) or zeros (ChaCha20)."""
    if cipher == "aes-128-ctr":
        return StreamCipher(algorithms.AES128(key), _EACH_ON_ITS_OWN).encryptor().update_into
    return StreamCipher(algorithms.ChaCha20(key, _ZERO_COUNTER), mode=None).encryptor().update_into
