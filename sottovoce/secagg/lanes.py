"""Where every entry lies in the masked vector of a plan, how wide it is, and how exact its sum can be.

The vector is, little-endian:

    [uint16 and dense aggregations, in plan order, each a packed segment, zeros to a multiple of 64 entries]
    [uint32 aggregations in plan order, zeros to 8 bytes]
    [uint64 words: 3x21 aggregations in plan order, uint64 aggregations in plan order, `weight`, `clamped`]

Everything a device contributes travels in it, under the same masks. Every lane declares its maximum, and
n_max * maximum < 2^width: no lane ever carries into the next, and the sum modulo 2^width is the sum.

| lane   | width w of an entry | bytes on the wire | bits for 256, 1000, 10000 devices |
|--------|---------------------|-------------------|-----------------------------------|
| uint16 | 16                  | 2                 | 8, 6, 2                           |
| 3x21   | 21, three in a word | 8/3               | 13, 11, 7                         |
| uint32 | 32                  | 4                 | 24, 22, 18                        |
| dense  | as the sum needs    | w/8               | any, w = bits + log2(n) rounded up, at most 32 |
| uint64 | 64                  | 8                 | 48, 48, 48                        |

Error. A lane adds without any error; all of it comes from rounding one device's values to b bits, so the lane matters
only by the b that it has room for. With r = half_range and the quantum q = 2r / (2^b - 1), stochastic rounding of a
value has mean 0, magnitude below q, and a variance of at most q^2 / 4, which is q^2 / 6 on average over values spread
over a quantum. For n devices with independent values of root mean square s the relative L2 error of their sum or mean
is therefore sqrt(q^2 / 6) / s = 2r / (s sqrt(6) (2^b - 1)), whatever n is. Of r = 4s that is 3.27 / (2^b - 1): 0.22,
0.052, 0.013, 0.0016 at 4, 6, 8, 11 bits. Clamping Gaussian values to 4s costs another 0.0025, added in squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sottovoce.errors import ConfigError, PolicyRefusal
from sottovoce.plan import Aggregation, Counted, LaneName, Plan, Quantised
from sottovoce.secagg.segments import GROUP, WIDEST_PACKED, Packed, packed_bytes, unpacked_bytes, word_of
from sottovoce.types import Array
from sottovoce.wire.messages import SecAggParameters

_WORD32 = np.dtype("<u4")
_WIDE = np.dtype("<u8")
_WIDTHS: Mapping[LaneName, int] = {"uint16": 16, "3x21": 21, "uint32": 32, "dense": WIDEST_PACKED, "uint64": 64}
"""Most bits that the sum in one entry may have."""
_IN_ORDER: tuple[tuple[LaneName, ...], ...] = (("uint16", "dense"), ("uint32",), ("3x21",), ("uint64",))
_ENTRIES_3X21 = 3
_TRAILING_WORDS = 2


@dataclass(frozen=True, slots=True)
class Lane:
    """Where the entries of one aggregation lie in the vector.

    Attributes:
        aggregation: What is summed there.
        start: Byte offset of its first entry, in memory.
        width: Bits of an entry: the sum of all devices is below 2^width.
    """

    aggregation: Aggregation
    start: int
    width: int

    @property
    def stop(self) -> int:
        """Byte offset after its last entry, in memory."""
        return self.start + self._word_count * self._word.itemsize

    def entries(self, vector: bytes | bytearray | memoryview) -> Array:
        """Return this lane's entries in `vector`: a view, but of a 3x21 lane a copy."""
        words = self._words(vector)
        if self.aggregation.lane != "3x21":
            return words
        entries = np.empty(self.aggregation.size, _WORD32)
        for place in range(_ENTRIES_3X21):
            taken = entries[place::_ENTRIES_3X21]
            taken[:] = (words[: taken.size] >> self._shift(place)) & np.uint64(2**self.width - 1)
        return entries

    def put(self, vector: bytearray, where: slice, values: npt.NDArray[np.float64]) -> None:
        """Write whole numbers from 0 to the aggregation's maximum to the entries `where`, which are still 0."""
        words = self._words(vector)
        if self.aggregation.lane != "3x21":
            words[where] = values
            return
        for place in range(_ENTRIES_3X21):
            first = (place - where.start) % _ENTRIES_3X21
            given = values[first::_ENTRIES_3X21].astype(_WIDE)
            word = (where.start + first) // _ENTRIES_3X21
            words[word : word + given.size] |= given << self._shift(place)

    def unused_bits(self, vector: bytes | bytearray | memoryview) -> int:
        """Return whatever stands in bits of this lane's words that belong to no entry, 0 if nothing does."""
        if self.aggregation.lane != "3x21":
            return 0
        words = self._words(vector)
        in_last_word = self.aggregation.size - _ENTRIES_3X21 * (words.size - 1)
        return int((words >> self._shift(_ENTRIES_3X21)).max()) | int(words[-1] >> self._shift(in_last_word))

    @property
    def _word(self) -> np.dtype[np.unsignedinteger]:
        return _WIDE if self.aggregation.lane == "3x21" else word_of(self.width)

    @property
    def _word_count(self) -> int:
        return -(-self.aggregation.size // _ENTRIES_3X21) if self.aggregation.lane == "3x21" else self.aggregation.size

    def _words(self, vector: bytes | bytearray | memoryview) -> Array:
        return np.frombuffer(vector, self._word, self._word_count, self.start)

    def _shift(self, place: int) -> np.uint64:
        return np.uint64(place * self.width)


@dataclass(frozen=True, slots=True)
class Layout:
    """The masked vector of one plan.

    Attributes:
        lanes: One per aggregation, in plan order.
        weight_cap: Largest weight of one device.
        maximum_clients: Largest cohort that the lanes have room for.
        vector_bytes: Length of the vector on the wire.
        wide_bytes: Bytes at its end that are uint64 words.
        packed: Width and number of entries, zeros included, of every packed segment.
    """

    lanes: tuple[Lane, ...]
    weight_cap: int
    maximum_clients: int
    vector_bytes: int
    wide_bytes: int
    packed: Packed

    @property
    def unpacked_bytes(self) -> int:
        """Length of the vector in memory; more than on the wire if there are dense lanes."""
        return unpacked_bytes(self)

    @property
    def clamped_maximum(self) -> int:
        """Most entries that one device can report as clamped: all of them."""
        return sum(lane.aggregation.size for lane in self.lanes)

    def trailing(self, vector: bytes | bytearray | memoryview) -> Array:
        """Return a view of the last two words of `vector`: weight and clamped."""
        return np.frombuffer(vector, _WIDE, _TRAILING_WORDS, self._trailing_start)

    def padding(self, vector: bytes | bytearray | memoryview) -> bytes:
        """Return the bytes of `vector` between the lanes; they are zero."""
        lanes = sorted((lane.start, lane.stop) for lane in self.lanes)
        edges = pairwise([(0, 0), *lanes, (self._trailing_start, self.unpacked_bytes)])
        return b"".join(bytes(vector[stop:start]) for (_, stop), (start, _) in edges)

    @property
    def _trailing_start(self) -> int:
        return self.unpacked_bytes - _TRAILING_WORDS * _WIDE.itemsize

    def require(self, parameters: SecAggParameters) -> None:
        """Raise PolicyRefusal unless `parameters` describe this very vector, with room for their largest cohort."""
        described = (parameters.vector_bytes, parameters.wide_bytes, parameters.packed)
        own = (self.vector_bytes, self.wide_bytes, self.packed)
        if described != own or parameters.maximum_clients > self.maximum_clients:
            raise PolicyRefusal(
                "lanes",
                f"the session's vector of {described} bytes for {parameters.maximum_clients} clients is not the plan's "
                f"{own} for at most {self.maximum_clients}",
            )


def layout_of(plan: Plan, *, maximum_clients: int) -> Layout:
    """Return the layout of the masked vector of `plan` for cohorts of up to `maximum_clients`.

    Raises:
        ConfigError: The sum of that many devices would not fit into some lane; the text names it and what to change.
    """
    for aggregation in plan.aggregations:
        _check_room(plan, aggregation, maximum_clients)
    placed: dict[str, Lane] = {}
    packed: list[tuple[int, int]] = []
    ends: list[int] = []
    offset = 0
    for names in _IN_ORDER:
        for aggregation in (a for a in plan.aggregations if a.lane in names):
            lane = placed[aggregation.name] = Lane(aggregation, offset, _width(aggregation, maximum_clients))
            offset = lane.stop
            if aggregation.lane in _IN_ORDER[0]:
                packed.append((lane.width, _rounded_up(aggregation.size, GROUP)))
                offset = lane.start + packed[-1][1] * word_of(lane.width).itemsize
        offset = _rounded_up(offset, _WIDE.itemsize)
        ends.append(offset)
    after_packed, after_uint32, *_ = ends
    wide_bytes = offset + _TRAILING_WORDS * _WIDE.itemsize - after_uint32
    layout = Layout(
        lanes=tuple(placed[aggregation.name] for aggregation in plan.aggregations),
        weight_cap=plan.privacy.weight_cap,
        maximum_clients=maximum_clients,
        vector_bytes=packed_bytes(tuple(packed)) + after_uint32 - after_packed + wide_bytes,
        wide_bytes=wide_bytes,
        packed=tuple(packed),
    )
    if maximum_clients * max(layout.weight_cap, layout.clamped_maximum) >= 2**64:
        raise ConfigError(f"plan {plan.name!r}: lower weight_cap, its sum over {maximum_clients} devices must fit 2^64")
    return layout


def _check_room(plan: Plan, aggregation: Aggregation, maximum_clients: int) -> None:
    where = f"plan {plan.name!r}, aggregation {aggregation.name!r}"
    maximum, width = aggregation.encoding.maximum, _WIDTHS[aggregation.lane]
    needed = (maximum_clients * maximum).bit_length()
    if needed > width:
        change = "a smaller maximum"
        if isinstance(aggregation.encoding, Quantised):
            bits = ((2**width - 1) // maximum_clients + 1).bit_length() - 1
            change = f"fewer bits (at most {bits})"
        wider = next((f', lane = "{name}"' for name in ("3x21", "uint32", "uint64") if needed <= _WIDTHS[name]), "")
        raise ConfigError(
            f"{where}: the sum of {maximum_clients} devices, each up to {maximum}, does not fit a {width}-bit lane; "
            f"use {change}{wider} or a smaller maximum_clients"
        )
    if isinstance(aggregation.encoding, Counted) and (aggregation.weighted or aggregation.clip_norm is not None):
        raise ConfigError(f"{where}: counted values are summed exactly; remove weighted and clip_norm, or quantise")


def _width(aggregation: Aggregation, maximum_clients: int) -> int:
    """Return the bits of an entry; in a dense lane the fewest in which the sum of all devices fits."""
    if aggregation.lane == "dense":
        return (maximum_clients * aggregation.encoding.maximum).bit_length()
    return _WIDTHS[aggregation.lane]


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
