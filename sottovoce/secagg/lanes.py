"""How a device's values become the integers of one masked vector, and how their sum becomes values again.

The vector is [uint32 entries of all uint32-lane aggregations, in plan order][zero padding to 8 bytes][uint64 words:
uint64-lane aggregations in plan order, then `weight`, then `clamped`], little-endian. Everything a device contributes
travels in it, under the same masks. Every lane declares its maximum and n_max * maximum < 2^width, so no lane ever
carries into the next and the sum modulo 2^width is the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from sottovoce.errors import ConfigError, NonFiniteUpdate, PolicyRefusal, ProgramError, RoundAbandoned
from sottovoce.plan import Aggregation, Counted, Plan, Quantised
from sottovoce.types import Array, TensorType
from sottovoce.wire.messages import SecAggParameters

Entropy = Callable[[int], bytes]
"""Returns that many bytes nobody can predict; `os.urandom` outside tests."""

_NARROW = np.dtype("<u4")
_WIDE = np.dtype("<u8")
_BLOCK = 1 << 16
_ROUNDING_SEED_BYTES = 32
_TRAILING_WORDS = 2


@dataclass(frozen=True, slots=True)
class Lane:
    """Where the entries of one aggregation lie in the vector.

    Attributes:
        aggregation: What is summed there.
        start: Byte offset of its first entry.
        dtype: `<u4` or `<u8`.
    """

    aggregation: Aggregation
    start: int
    dtype: np.dtype[np.unsignedinteger]

    @property
    def stop(self) -> int:
        """Byte offset after its last entry."""
        return self.start + self.aggregation.size * self.dtype.itemsize

    def entries(self, vector: bytes | bytearray | memoryview) -> Array:
        """Return a view of this lane's entries in `vector`."""
        return np.frombuffer(vector, self.dtype, count=self.aggregation.size, offset=self.start)


@dataclass(frozen=True, slots=True)
class Layout:
    """The masked vector of one plan.

    Attributes:
        lanes: One per aggregation, in plan order.
        weight_cap: Largest weight of one device.
        maximum_clients: Largest cohort that the lanes have room for.
        vector_bytes: Length of the vector.
        wide_bytes: Bytes at its end that are uint64 words.
    """

    lanes: tuple[Lane, ...]
    weight_cap: int
    maximum_clients: int
    vector_bytes: int
    wide_bytes: int

    @property
    def clamped_maximum(self) -> int:
        """Most entries that one device can report as clamped: all of them."""
        return sum(lane.aggregation.size for lane in self.lanes)

    def narrow(self, vector: bytes | bytearray | memoryview) -> Array:
        """Return a view of the uint32 entries of `vector`, padding included."""
        return np.frombuffer(vector, _NARROW, count=(self.vector_bytes - self.wide_bytes) // _NARROW.itemsize)

    def trailing(self, vector: bytes | bytearray | memoryview) -> Array:
        """Return a view of the last two words of `vector`: weight and clamped."""
        offset = self.vector_bytes - _TRAILING_WORDS * _WIDE.itemsize
        return np.frombuffer(vector, _WIDE, count=_TRAILING_WORDS, offset=offset)

    def require(self, parameters: SecAggParameters) -> None:
        """Raise PolicyRefusal unless `parameters` describe this very vector, with room for their largest cohort."""
        described = (parameters.vector_bytes, parameters.wide_bytes)
        if described != (self.vector_bytes, self.wide_bytes) or parameters.maximum_clients > self.maximum_clients:
            raise PolicyRefusal(
                "lanes",
                f"the session's vector of {described} bytes for {parameters.maximum_clients} clients is not the plan's "
                f"{self.vector_bytes, self.wide_bytes} for at most {self.maximum_clients}",
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
    starts: dict[str, int] = {}
    offset = 0
    for width in ("uint32", "uint64"):
        offset = -(-offset // _WIDE.itemsize) * _WIDE.itemsize
        if width == "uint64":
            narrow_bytes = offset
        for aggregation in plan.aggregations:
            if aggregation.lane == width:
                starts[aggregation.name] = offset
                offset += aggregation.size * np.dtype(width).itemsize
    layout = Layout(
        lanes=tuple(Lane(a, starts[a.name], _WIDE if a.lane == "uint64" else _NARROW) for a in plan.aggregations),
        weight_cap=plan.privacy.weight_cap,
        maximum_clients=maximum_clients,
        vector_bytes=offset + _TRAILING_WORDS * _WIDE.itemsize,
        wide_bytes=offset + _TRAILING_WORDS * _WIDE.itemsize - narrow_bytes,
    )
    if maximum_clients * max(layout.weight_cap, layout.clamped_maximum) >= 2**64:
        raise ConfigError(f"plan {plan.name!r}: lower weight_cap, its sum over {maximum_clients} devices must fit 2^64")
    return layout


def encode(layout: Layout, values: Mapping[str, Sequence[Array]], *, weight: int, entropy: Entropy) -> bytearray:
    """Return the plain quantised vector of one device; only its masked form may leave the device.

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
    vector = bytearray(layout.vector_bytes)
    clamped = 0
    for lane in layout.lanes:
        tensors = _checked(lane.aggregation, values[lane.aggregation.name])
        factor = capped / layout.weight_cap if lane.aggregation.weighted else 1.0
        clamped += _encode_lane(lane.aggregation, tensors, lane.entries(vector), factor, rounding)
    layout.trailing(vector)[:] = capped, clamped
    return vector


def decode(layout: Layout, total: bytes | bytearray | memoryview, *, survivors: int) -> Aggregate:
    """Return what the unmasked `total` of `survivors` devices says.

    A quantised entry q of one device stands for q * quantum - half_range, so the sum over the survivors is
    (2 * total - survivors * maximum) * half_range / maximum.

    Raises:
        RoundAbandoned: `impossible_sum`: some lane exceeds survivors * maximum, the padding is not zero, or the weight
            is not in 1 to survivors * weight_cap. The total is garbage and must not be used.
    """
    if len(total) != layout.vector_bytes:
        raise RoundAbandoned("impossible_sum", f"{len(total)} bytes where the layout has {layout.vector_bytes}")
    narrow = sorted((lane for lane in layout.lanes if lane.dtype == _NARROW), key=lambda lane: lane.start)
    padding = bytes(total[narrow[-1].stop if narrow else 0 : layout.vector_bytes - layout.wide_bytes])
    weight, clamped = (int(word) for word in layout.trailing(total))
    _require_possible("padding", int(any(padding)), 0)
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


def add_into(total: bytearray, vector: bytes | bytearray | memoryview, *, wide_bytes: int) -> None:
    """Add `vector` to `total` in place, wrapping around: uint32 words, but uint64 words in the last `wide_bytes`."""
    split = len(total) - wide_bytes
    for start, stop, dtype in ((0, split, _NARROW), (split, len(total), _WIDE)):
        count = (stop - start) // dtype.itemsize
        target = np.frombuffer(total, dtype, count=count, offset=start)
        np.add(target, np.frombuffer(vector, dtype, count=count, offset=start), out=target)


class _Rounding:
    """Uniform numbers in [0, 1) from a ChaCha20 stream under a fresh seed of the system's entropy."""

    def __init__(self, seed: bytes) -> None:
        self._stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
        self._zeros = bytes(_BLOCK * _NARROW.itemsize)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        words = self._stream.update(memoryview(self._zeros)[: count * _NARROW.itemsize])
        return np.frombuffer(words, _NARROW) * np.float64(2.0**-32)


def _check_room(plan: Plan, aggregation: Aggregation, maximum_clients: int) -> None:
    where = f"plan {plan.name!r}, aggregation {aggregation.name!r}"
    width = 32 if aggregation.lane == "uint32" else 64
    maximum = aggregation.encoding.maximum
    if maximum_clients * maximum >= 2**width:
        change = "fewer bits" if isinstance(aggregation.encoding, Quantised) else "a smaller maximum"
        wider = ', lane = "uint64"' if width == 32 else ""
        raise ConfigError(
            f"{where}: the sum of {maximum_clients} devices, each up to {maximum}, does not fit a {width}-bit lane; "
            f"use {change}{wider} or a smaller maximum_clients"
        )
    if isinstance(aggregation.encoding, Counted) and (aggregation.weighted or aggregation.clip_norm is not None):
        raise ConfigError(f"{where}: counted values are summed exactly; remove weighted and clip_norm, or quantise")


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


def _encode_lane(
    aggregation: Aggregation, tensors: Sequence[Array], entries: Array, factor: float, rounding: _Rounding
) -> int:
    """Write one aggregation into its `entries`; return how many values were clamped."""
    factor *= _clip_factor(aggregation, tensors)
    clamped = 0
    for where, block in _blocks(tensors):
        if isinstance(aggregation.encoding, Quantised):
            block *= factor
            clamped += _quantise(block, aggregation.encoding, rounding)
        else:
            clamped += _count(block, aggregation.encoding)
        entries[where] = block
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
