"""The vector of docs/SPEC.md, sections 3 and 6: its lanes, its segments in memory and packed, sums modulo their widths.

As slow and as free of sottovoce as `by_the_spec.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from by_the_spec import Parameters, u32, u64, words


@dataclass(frozen=True)
class Segment:
    """A run of entries of `width` bits: each `word` bytes in memory from `start`, packed on the wire."""

    width: int
    count: int
    start: int

    @property
    def word(self) -> int:
        return 2 if self.width <= 16 else 4 if self.width <= 32 else 8

    @property
    def stop(self) -> int:
        return self.start + self.count * self.word


def segments(parameters: Parameters) -> list[Segment]:
    on_wire = sum(width * count // 8 for width, count in parameters["packed"])
    narrow = parameters["vector_bytes"] - parameters["wide_bytes"] - on_wire
    found: list[Segment] = []
    for width, count in (*parameters["packed"], (32, narrow // 4), (64, parameters["wide_bytes"] // 8)):
        found.append(Segment(width, count, found[-1].stop if found else 0))
    return found


def memory_bytes(parameters: Parameters) -> int:
    return segments(parameters)[-1].stop


def packed_vector(parameters: Parameters, vector: bytes) -> bytes:
    """The form on the wire of a vector as it lies in memory."""
    wire = b""
    for part in segments(parameters):
        entries = words(vector[part.start : part.stop], part.word)
        number = sum(entry % 2**part.width << part.width * index for index, entry in enumerate(entries))
        wire += number.to_bytes(part.width * part.count // 8, "little")
    return wire


def unpacked_vector(parameters: Parameters, wire: bytes) -> bytes:
    """The form in memory of a vector as it came from the wire."""
    vector, at = b"", 0
    for part in segments(parameters):
        length = part.width * part.count // 8
        number, at = int.from_bytes(wire[at : at + length], "little"), at + length
        for index in range(part.count):
            vector += (number >> part.width * index & 2**part.width - 1).to_bytes(part.word, "little")
    return vector


def combined(parameters: Parameters, vector: bytes, other: bytes, sign_: int) -> bytes:
    """`vector + sign_ * other`, both as they lie in memory, each entry modulo 2 to its width."""
    result = b""
    for part in segments(parameters):
        ours, theirs = words(vector[part.start : part.stop], part.word), words(other[part.start : part.stop], part.word)
        values = [(a + sign_ * b) % 2**part.width for a, b in zip(ours, theirs, strict=True)]
        result += b"".join(value.to_bytes(part.word, "little") for value in values)
    return result


@dataclass(frozen=True)
class Lane:
    """One aggregation: how many entries, the largest of one device, and its lane."""

    lane: str
    count: int
    maximum: int


def dense_width(lane: Lane, maximum_clients: int) -> int:
    return 16 if lane.lane == "uint16" else (maximum_clients * lane.maximum).bit_length()


def layout(lanes: Sequence[Lane], maximum_clients: int) -> dict[str, Any]:
    """The three parameters that describe the vector."""
    packed_ = [
        [dense_width(lane, maximum_clients), -(-lane.count // 64) * 64]
        for lane in lanes
        if lane.lane in ("uint16", "dense")
    ]
    narrow = -(-4 * sum(lane.count for lane in lanes if lane.lane == "uint32") // 8) * 8
    wide = sum(
        -(-lane.count // 3) if lane.lane == "3x21" else lane.count for lane in lanes if lane.lane in ("3x21", "uint64")
    )
    wide_bytes = 8 * (wide + 2)
    on_wire = sum(width * count // 8 for width, count in packed_)
    return {"vector_bytes": on_wire + narrow + wide_bytes, "wide_bytes": wide_bytes, "packed": packed_}


def laid_out(
    lanes: Sequence[Lane], entries: Sequence[Sequence[int]], *, weight: int, clamped: int, maximum_clients: int
) -> bytes:
    """The plain vector as it lies in memory."""
    given = list(zip(lanes, entries, strict=True))
    packed_ = b""
    for lane, values in given:
        if lane.lane in ("uint16", "dense"):
            word = 2 if dense_width(lane, maximum_clients) <= 16 else 4
            row = b"".join(value.to_bytes(word, "little") for value in values)
            packed_ += row + bytes(word * (-lane.count % 64))
    narrow = b"".join(u32(*values) for lane, values in given if lane.lane == "uint32")
    narrow += bytes(-len(narrow) % 8)
    thirds = [
        u64(sum(value << 21 * place for place, value in enumerate(values[at : at + 3])))
        for lane, values in given
        if lane.lane == "3x21"
        for at in range(0, lane.count, 3)
    ]
    wide = b"".join(u64(*values) for lane, values in given if lane.lane == "uint64")
    return packed_ + narrow + b"".join(thirds) + wide + u64(weight, clamped)
