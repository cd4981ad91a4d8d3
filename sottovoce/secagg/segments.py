"""The words of a vector: how they lie in memory, how they are added, and how few bits they take on the wire.

A vector is a row of segments, little-endian:

    [packed segments, each of its own width][uint32 words][uint64 words]

The entries of a segment of width w are added modulo 2^w. In memory each is a whole word, 16 bits for w up to 16, else
32: masking and adding are plain arithmetic on words. Since 2^w divides 2^16 and 2^32, the bits above w may hold
anything until `reduce` clears them. On the wire entry i of a packed segment is bits w*i to w*i + w - 1 of the segment
read as one little-endian number, which for 16 and 32 bits is the form in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from sottovoce.types import Array

Words: TypeAlias = npt.NDArray[np.unsignedinteger]
Packed: TypeAlias = tuple[tuple[int, int], ...]
"""(width in bits, entries) of every packed segment."""

GROUP = 64
"""A packed segment has a multiple of so many entries: then it has whole words in memory and on the wire."""
WIDEST_PACKED = 32
_WORD = np.dtype("<u8")
_WORD_BITS = 64
_BLOCK_ENTRIES = 1 << 16


class VectorShape(Protocol):
    """What fixes the segments of a vector; the parameters of a session and the layout of a plan both do."""

    @property
    def vector_bytes(self) -> int:
        """Length on the wire."""

    @property
    def wide_bytes(self) -> int:
        """Bytes at the end that are uint64 words."""

    @property
    def packed(self) -> Packed:
        """The packed segments, in front."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of entries of one width.

    Attributes:
        width: Bits of an entry: it is added modulo 2^width.
        count: Entries.
        start: Byte offset in memory.
        wire_start: Byte offset on the wire.
    """

    width: int
    count: int
    start: int
    wire_start: int

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of an entry in memory."""
        return word_of(self.width)

    @property
    def stop(self) -> int:
        """Byte offset in memory after its last entry."""
        return self.start + self.count * self.dtype.itemsize

    @property
    def wire_stop(self) -> int:
        """Byte offset on the wire after its last entry."""
        return self.wire_start + self.count * self.width // 8

    @property
    def is_whole_words(self) -> bool:
        """Whether it has the same bytes in memory and on the wire."""
        return self.width == 8 * self.dtype.itemsize

    def words(self, vector: bytes | bytearray | memoryview) -> Words:
        """Return a view of its entries in `vector`, in memory."""
        return np.frombuffer(vector, self.dtype, self.count, self.start)


def word_of(width: int) -> np.dtype[np.unsignedinteger]:
    """Return the little-endian word that holds an entry of `width` bits in memory."""
    return np.dtype("<u2" if width <= 16 else "<u4" if width <= WIDEST_PACKED else "<u8")


def segments_of(shape: VectorShape) -> tuple[Segment, ...]:
    """Return the segments of a vector, in order."""
    return _segments(shape.vector_bytes, shape.wide_bytes, shape.packed)


@lru_cache(maxsize=8)
def _segments(vector_bytes: int, wide_bytes: int, packed: Packed) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    start = wire_start = 0
    narrow_bytes = vector_bytes - wide_bytes - packed_bytes(packed)
    for width, count in (*packed, (32, narrow_bytes // 4), (64, wide_bytes // 8)):
        segment = Segment(width, count, start, wire_start)
        start, wire_start = segment.stop, segment.wire_stop
        segments.append(segment)
    return tuple(segments)


def packed_bytes(packed: Packed) -> int:
    """Return how many bytes the packed segments have on the wire."""
    return sum(count * width // 8 for width, count in packed)


def unpacked_bytes(shape: VectorShape) -> int:
    """Return the length of a vector in memory."""
    return segments_of(shape)[-1].stop


def is_possible(packed: Packed) -> bool:
    """Return whether every packed segment has a possible width and a whole number of groups."""
    return all(1 <= width <= WIDEST_PACKED and count > 0 and count % GROUP == 0 for width, count in packed)


def add_into(total: bytearray, vector: bytes | bytearray | memoryview, shape: VectorShape) -> None:
    """Add `vector` to `total` in place, both as they lie in memory; every word wraps around."""
    for segment in segments_of(shape):
        target = segment.words(total)
        np.add(target, segment.words(vector), target)


def add_packed_into(total: bytearray, vector: bytes | bytearray | memoryview, shape: VectorShape) -> None:
    """Add `vector`, as it came from the wire, to `total` as it lies in memory, in place; every word wraps around."""
    for segment in segments_of(shape):
        target = segment.words(total)
        if segment.is_whole_words:
            np.add(target, np.frombuffer(vector, segment.dtype, segment.count, segment.wire_start), target)
            continue
        for block in _blocks(segment):
            wire = np.frombuffer(vector, _WORD, *_wire_place(segment, block))
            piece = target[block]
            np.add(piece, _unpacked(wire, segment.width, piece.size), piece, casting="unsafe")


def pack(vector: bytearray, shape: VectorShape) -> None:
    """Bring `vector` from its form in memory to that on the wire, in place: it becomes shorter, or stays as it is.

    Raises:
        BufferError: Somebody else holds a view of `vector`, which has to shrink.
    """
    if len(vector) == shape.vector_bytes:
        return
    for segment in segments_of(shape):
        if segment.is_whole_words:
            with memoryview(vector) as view:
                view[segment.wire_start : segment.wire_stop] = view[segment.start : segment.stop]
            continue
        # What is written never reaches what is still to be read: an entry is no wider on the wire than in memory.
        for block in _blocks(segment):
            packed = _packed(segment.words(vector)[block], segment.width)
            np.frombuffer(vector, _WORD, *_wire_place(segment, block))[:] = packed.reshape(-1)
    del vector[shape.vector_bytes :]


def reduce(vector: bytearray, shape: VectorShape) -> None:
    """Clear whatever the entries of `vector` have above their width, in place."""
    for segment in segments_of(shape):
        if not segment.is_whole_words:
            words = segment.words(vector)
            np.bitwise_and(words, words.dtype.type(2**segment.width - 1), words)


def _blocks(segment: Segment) -> Iterator[slice]:
    for start in range(0, segment.count, _BLOCK_ENTRIES):
        yield slice(start, min(start + _BLOCK_ENTRIES, segment.count))


def _wire_place(segment: Segment, block: slice) -> tuple[int, int]:
    """Return how many uint64 words `block` of the segment has on the wire, and their byte offset."""
    words = (block.stop - block.start) * segment.width // _WORD_BITS
    return words, segment.wire_start + block.start * segment.width // 8


def _places(width: int) -> Iterator[tuple[int, int, np.uint64, np.uint64 | None]]:
    """Yield, for every entry of a period: index, word, its shift there, and its shift in the next word if it spills.

    After 64 / gcd(64, width) entries the pattern repeats at a word's edge.
    """
    for index in range(_period(width)):
        word, shift = divmod(index * width, _WORD_BITS)
        spill = np.uint64(_WORD_BITS - shift) if shift + width > _WORD_BITS else None
        yield index, word, np.uint64(shift), spill


def _period(width: int) -> int:
    return _WORD_BITS // math.gcd(_WORD_BITS, width)


def _packed(entries: Words, width: int) -> Array:
    """Return the low `width` bits of `entries` as uint64 words, one row a period."""
    period = _period(width)
    columns = np.empty((period, entries.size // period), _WORD)
    columns[:] = entries.reshape(-1, period).T
    columns &= np.uint64(2**width - 1)
    words = np.zeros((period * width // _WORD_BITS, columns.shape[1]), _WORD)
    for index, word, shift, spill in _places(width):
        words[word] |= columns[index] << shift
        if spill is not None:
            words[word + 1] |= columns[index] >> spill
    return np.ascontiguousarray(words.T)


def _unpacked(wire: Words, width: int, count: int) -> Array:
    """Return the `count` entries of `width` bits in the uint64 words `wire`, as uint64."""
    period = _period(width)
    words = np.ascontiguousarray(wire.reshape(-1, period * width // _WORD_BITS).T)
    columns = np.empty((period, words.shape[1]), _WORD)
    for index, word, shift, spill in _places(width):
        np.right_shift(words[word], shift, columns[index])
        if spill is not None:
            columns[index] |= words[word + 1] << spill
    columns &= np.uint64(2**width - 1)
    return columns.T.reshape(count)
