"""How a device's values become the whole numbers of one masked vector, and how their sum becomes values again.

Where each of them lies, and how exact that is, says `sottovoce.secagg.lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from sottovoce.errors import NonFiniteUpdate, ProgramError, RoundAbandoned
from sottovoce.plan import Aggregation, Counted, Quantised
from sottovoce.secagg.lanes import Lane, Layout
from sottovoce.types import Array, TensorType

Entropy = Callable[[int], bytes]
"""Returns that many bytes nobody can predict; `os.urandom` outside tests."""

_RANDOM_WORD = np.dtype("<u4")
_BLOCK = 1 << 16
_ROUNDING_SEED_BYTES = 32


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
        self._zeros = bytes(_BLOCK * _RANDOM_WORD.itemsize)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        words = self._stream.update(memoryview(self._zeros)[: count * _RANDOM_WORD.itemsize])
        return np.frombuffer(words, _RANDOM_WORD) * np.float64(2.0**-32)


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
