"""How a device's values become the integers of one masked vector, and how their sum becomes values again.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from sottovoce.errors import ConfigError, NonFiniteUpdate, PolicyRefusal, ProgramError, RoundAbandoned
from sottovoce.plan import Aggregation, Counted, LaneName, Plan, Quantised
from sottovoce.secagg.segments import GROUP, WIDEST_PACKED, Packed, packed_bytes, unpacked_bytes, word_of
from sottovoce.types import Array, TensorType
from sottovoce.wire.messages import SecAggParameters

Entropy = Callable[[int], bytes]
"""Returns that many bytes nobody can predict; `os.urandom` outside tests."""

_WORD32 = np.dtype("<u4")
_WIDE = np.dtype("<u8")
_WIDTHS: Mapping[LaneName, int] = {"uint16": 16, "3x21": 21, "uint32": 32, "dense": WIDEST_PACKED, "uint64": 64}
"""Most bits that the sum in one entry may have."""
_IN_ORDER: tuple[tuple[LaneName, ...], ...] = (("uint16", "dense"), ("uint32",), ("3x21",), ("uint64",))
_ENTRIES_3X21 = 3
_BLOCK = 1 << 16
_ROUNDING_SEED_BYTES = 32
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


@dataclass(frozen=True, slots=True)
class Aggregate:
    """What the coordinator learns: sums over the survivors, and nothing about any one of them.

    Attributes:
        survivors: How many devices are in the sums.
        weight: Sum of their weights, each capped.
        clamped: How many entries were clamped, over all devices.
        weight_cap: The plan's cap on one weight.
        weighted: Names of the weighted aggregations.
        sums: Per aggregation its tensors, float64; a weighted one is the sum of value * weight / weight_cap.
    """

    survivors: int
    weight: int
    clamped: int
    weight_cap: int
    weighted: frozenset[str]
    sums: dict[str, list[Array]]

    def mean(self, name: str) -> list[Array]:
        """Return the mean of aggregation `name`: weighted by the devices' weights if it is weighted, else plain."""
        divisor = self.weight / self.weight_cap if name in self.weighted else float(self.survivors)
        return [total / divisor for total in self.sums[name]]


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


def encode(layout: Layout, values: Mapping[str, Sequence[Array]], *, weight: int, entropy: Entropy) -> bytearray:
    """Return the plain quantised vector of one device as it lies in memory; only its masked form may leave the device.

    Per aggregation, in this order: clip the L2 norm over all its tensors to `clip_norm`; multiply by
    min(weight, cap) / cap if weighted; clamp to the encoding's range and count what was clamped; round to an integer,
    stochastically for quantised values, to the nearest for counted ones.

    Args:
        layout: Of the plan.
        values: For every aggregation its tensors, of exactly the declared shapes, real numbers.
        weight: This device's weight (number of examples), at least 1.
        entropy: Called once, for the 32-byte seed of the rounding.

    Raises:
        NonFiniteUpdate: A value is NaN or infinite, or so large that its norm is.
        ProgramError: An aggregation is missing or unknown, a shape or dtype is not the declared one, or the weight is
            below 1.
    """
    names = {lane.aggregation.name for lane in layout.lanes}
    if values.keys() != names:
        raise ProgramError(f"the program gave {sorted(values)}, but the plan sums {sorted(names)}")
    if weight < 1:
        raise ProgramError(f"a device's weight is the number of its examples, at least 1, not {weight}")
    capped = min(weight, layout.weight_cap)
    rounding = _Rounding(entropy(_ROUNDING_SEED_BYTES))
    vector = bytearray(layout.unpacked_bytes)
    clamped = 0
    for lane in layout.lanes:
        tensors = _checked(lane.aggregation, values[lane.aggregation.name])
        factor = capped / layout.weight_cap if lane.aggregation.weighted else 1.0
        clamped += _encode_lane(lane, tensors, vector, factor, rounding)
    layout.trailing(vector)[:] = capped, clamped
    return vector


def decode(layout: Layout, total: bytes | bytearray | memoryview, *, survivors: int) -> Aggregate:
    """Return what the unmasked `total` of `survivors` devices says.

    A quantised entry q of one device stands for q * quantum - half_range, so the sum over the survivors is
    (2 * total - survivors * maximum) * half_range / maximum.

    Args:
        layout: Of the plan.
        total: `ServerSession.result`.
        survivors: How many devices are in it.

    Raises:
        RoundAbandoned: `impossible_sum`: some lane exceeds survivors * maximum, the padding is not zero, or the weight
            is not in 1 to survivors * weight_cap. The total is garbage and must not be used.
    """
    if len(total) != layout.unpacked_bytes:
        raise RoundAbandoned("impossible_sum", f"{len(total)} bytes where the layout has {layout.unpacked_bytes}")
    weight, clamped = (int(word) for word in layout.trailing(total))
    _require_possible("padding", int(any(layout.padding(total))), 0)
    _require_possible("weight", weight, survivors * layout.weight_cap)
    _require_possible("clamped", clamped, survivors * layout.clamped_maximum)
    if weight == 0:
        raise RoundAbandoned("impossible_sum", "the weights of all survivors add up to 0")
    return Aggregate(
        survivors=survivors,
        weight=weight,
        clamped=clamped,
        weight_cap=layout.weight_cap,
        weighted=frozenset(lane.aggregation.name for lane in layout.lanes if lane.aggregation.weighted),
        sums={lane.aggregation.name: _decode_lane(lane, total, survivors) for lane in layout.lanes},
    )


class _Rounding:
    """Uniform numbers in [0, 1) from a ChaCha20 stream under a fresh seed of the system's entropy."""

    def __init__(self, seed: bytes) -> None:
        self._stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
        self._zeros = bytes(_BLOCK * _WORD32.itemsize)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        words = self._stream.update(memoryview(self._zeros)[: count * _WORD32.itemsize])
        return np.frombuffer(words, _WORD32) * np.float64(2.0**-32)


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


def _checked(aggregation: Aggregation, tensors: Sequence[Array]) -> list[Array]:
    declared = [TensorType.parse(notation).shape for notation in aggregation.tensors]
    arrays = [np.asarray(tensor) for tensor in tensors]
    if [array.shape for array in arrays] != declared or any(array.dtype.kind not in "fiub" for array in arrays):
        got = ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays)
        raise ProgramError(
            f"aggregation {aggregation.name!r}: {got} where {', '.join(aggregation.tensors)} is declared"
        )
    if not all(np.isfinite(array).all() for array in arrays):
        raise NonFiniteUpdate(f"aggregation {aggregation.name!r} holds NaN or infinity: training diverged?")
    return arrays


def _blocks(tensors: Sequence[Array]) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
    """Yield every tensor piece by piece as float64, with its place in the lane: no temporary of the whole size."""
    at = 0
    for tensor in tensors:
        flat = tensor.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            yield slice(at, at + block.size), block
            at += block.size


def _clip_factor(aggregation: Aggregation, tensors: Sequence[Array]) -> float:
    if aggregation.clip_norm is None:
        return 1.0
    with np.errstate(over="ignore"):
        norm = float(np.sqrt(sum(float(np.dot(block, block)) for _, block in _blocks(tensors))))
    if not np.isfinite(norm):
        raise NonFiniteUpdate(f"aggregation {aggregation.name!r} is so large that its norm overflows")
    return min(1.0, aggregation.clip_norm / norm) if norm > 0 else 1.0


def _encode_lane(lane: Lane, tensors: Sequence[Array], vector: bytearray, factor: float, rounding: _Rounding) -> int:
    """Write one aggregation into its lane of `vector`; return how many values were clamped."""
    aggregation = lane.aggregation
    factor *= _clip_factor(aggregation, tensors)
    clamped = 0
    for where, block in _blocks(tensors):
        if isinstance(aggregation.encoding, Quantised):
            block *= factor
            clamped += _quantise(block, aggregation.encoding, rounding)
        else:
            clamped += _count(block, aggregation.encoding)
        lane.put(vector, where, block)
    return clamped


def _quantise(block: npt.NDArray[np.float64], encoding: Quantised, rounding: _Rounding) -> int:
    """Map `block` in place from [-half_range, half_range] to 0..maximum; return how many values were clamped."""
    half_range = encoding.half_range
    clamped = int(np.count_nonzero(np.abs(block) > half_range))
    np.clip(block, -half_range, half_range, out=block)
    block += half_range
    block *= encoding.maximum / (2 * half_range)
    block += rounding.uniform(block.size)
    np.floor(block, out=block)
    # At 48 bits the sum of the largest level and a fraction close to one can round up to the next level.
    np.minimum(block, encoding.maximum, out=block)
    return clamped


def _count(block: npt.NDArray[np.float64], encoding: Counted) -> int:
    """Round `block` in place to whole numbers in 0..maximum; return how many values were clamped."""
    np.rint(block, out=block)
    clamped = int(np.count_nonzero((block < 0) | (block > encoding.maximum)))
    np.clip(block, 0, encoding.maximum, out=block)
    return clamped


def _decode_lane(lane: Lane, total: bytes | bytearray | memoryview, survivors: int) -> list[Array]:
    entries = lane.entries(total)
    encoding = lane.aggregation.encoding
    _require_possible(f"what is beside {lane.aggregation.name}", lane.unused_bits(total), 0)
    _require_possible(lane.aggregation.name, int(entries.max()), survivors * encoding.maximum)
    flat = entries.astype(np.float64)
    if isinstance(encoding, Quantised):
        flat *= 2
        flat -= survivors * encoding.maximum
        flat *= encoding.half_range / encoding.maximum
    shapes = [TensorType.parse(notation) for notation in lane.aggregation.tensors]
    pieces = np.split(flat, np.cumsum([kind.size for kind in shapes])[:-1])
    return [piece.reshape([d or 0 for d in kind.shape]) for piece, kind in zip(pieces, shapes, strict=True)]


def _require_possible(name: str, found: int, maximum: int) -> None:
    if found > maximum:
        raise RoundAbandoned("impossible_sum", f"{name} sums to {found}, more than {maximum}")
