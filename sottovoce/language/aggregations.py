"""From an aggregation of the language to entries of the masked vector, and from their sums back to its value.

Whole numbers are summed exactly: the program subtracts the low end of their bound, and n times it is added afterwards.
Floats are rounded stochastically, around the middle of their bound where there are few bits for them. A weighted mean
is the sum of value times weight over the sum of the weights, or, where the weight is a client program's number of
examples, a weighted aggregation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sottovoce.errors import ConfigError, DefinitionError
from sottovoce.language.bounds import Bounds, within
from sottovoce.language.client_part import Output, member_of
from sottovoce.language.expressions import Step, Terms
from sottovoce.language.ports import Bound, RoundSums
from sottovoce.plan import Aggregation, Counted, Encoding, LaneName, Quantised
from sottovoce.types import Array, TensorType, Type
from sottovoce.values import leaves, unflatten

EXACT_ENTRIES = 1024
"""Up to so many entries a value is rounded to 32 bits in wide lanes; a larger one to 16 bits in lanes of 32."""
_FINE_BITS = 24
"""From so many bits on a step is finer than float32 itself, and subtracting a middle would cost more than it gains."""
_CLIENTS_SMALL, _CLIENTS_LARGE = 2**16, 2**10
"""Devices for whose sum a lane of 32 bits must have room, for a value of few entries and of many."""
_SMALLEST = 1e-30
"""Half the range of a value that can only be 0."""
_ROUNDING = 2.0**-22
"""Relative error allowed for arithmetic in float32 on the device: four roundings of 2^-24."""


@dataclass(frozen=True, slots=True)
class Summand:
    """Where one tensor of an aggregated value lies among the sums of a round.

    Attributes:
        aggregation: Which sum.
        index: Which of its tensors.
        offset: What every device subtracted from each coordinate.
        error: The largest error of one device's coordinate: its quantum and float32's rounding; 0 where exact.
        bound: Of one device's coordinate, before the offset was subtracted.
    """

    aggregation: str
    index: int
    offset: float
    error: float
    bound: Bound


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the value of one aggregation step comes from the sums of a round.

    Attributes:
        kind: `sum`; `mean`; `weighted_mean` of two sums; `lane_mean`, weighted by the number of examples; `weight`, the
            sum of those numbers.
        where: Line and operator.
        type: Of the value.
        summands: One for each tensor of it.
        weight: The sum of the weights, of a `weighted_mean`.
        weight_cap: What a weight is divided by before it multiplies the value.
    """

    kind: Literal["sum", "mean", "weighted_mean", "lane_mean", "weight"]
    where: str
    type: Type
    summands: tuple[Summand, ...]
    weight: Summand | None = None
    weight_cap: float = 1.0

    def value(self, sums: RoundSums) -> Any:
        """Return the value that the sums of a round say.

        Raises:
            ConfigError: A sum does not fit its dtype.
        """
        if self.kind == "weight":
            return _fitted(np.asarray(sums.weight), leaves(self.type)[0][1], self.where)
        divisor = self._divisor(sums)
        found = []
        for summand, (_, kind) in zip(self.summands, leaves(self.type), strict=True):
            total = _total(summand, sums) if self.kind != "lane_mean" else sums.sums[summand.aggregation][summand.index]
            found.append(_fitted(total if divisor is None else total / divisor, kind, self.where))
        return unflatten(self.type, found)

    def errors(self, devices: int) -> tuple[float | None, ...]:
        """Return for each tensor the largest absolute error of a coordinate that encoding and float32 can make.

        Args:
            devices: How many are in the sum, at least 1.

        Returns:
            None where it cannot be said beforehand: of a mean whose weights may all be 0.
        """
        match self.kind:
            case "weight":
                return (0.0,)
            case "sum":
                return tuple(self._stored(s.error * devices, devices * size_of(s.bound)) for s in self.summands)
            case "mean":
                return tuple(self._stored(s.error, size_of(s.bound)) for s in self.summands)
            case "weighted_mean":
                return tuple(self._weighted_error(s) for s in self.summands)
            case "lane_mean":
                # Every weight is at least 1, so the weights' sum is at least the number of devices.
                return tuple(self._stored(s.error * self.weight_cap, size_of(s.bound)) for s in self.summands)

    def _divisor(self, sums: RoundSums) -> Array | None:
        match self.kind:
            case "mean":
                return np.asarray(float(sums.survivors))
            case "weighted_mean":
                assert self.weight is not None
                total = np.asarray(_total(self.weight, sums)).reshape(()) / self.weight_cap
                if not total > 0:
                    raise ConfigError(f"{self.where}: all weights are 0, so there is no mean")
                return np.asarray(total)
            case _:
                return None

    def _stored(self, error: float, largest: float) -> float:
        """Return `error` with that of storing the result in its dtype; a whole number is exact."""
        return error and error + largest * _ROUNDING

    def _weighted_error(self, summand: Summand) -> float | None:
        """The mean is S / W; S is off by at most e_s a device, W by e_w, and W is at least its low end a device."""
        weight = self.weight
        if weight is None or weight.bound.low - weight.error <= 0:
            return None
        low, error = weight.bound.low / self.weight_cap, weight.error / self.weight_cap
        # |S'/W' - S/W| <= (e_s + |S/W| e_w) / W', and |S/W| is at most the largest product over the least weight.
        largest = size_of(summand.bound) / low
        return (summand.error + largest * error) / (low - error) + largest * _ROUNDING


def plain_outputs(
    step: Step, name: str, bounds: Bounds, first_leaf: int
) -> tuple[list[Aggregation], dict[str, tuple[Output, ...]], tuple[Summand, ...]]:
    """Return the aggregations that sum the value of an aggregation step's first input, one for each encoding.

    Args:
        step: The aggregation.
        name: What its sums are called.
        bounds: What is known of the value.
        first_leaf: Position of the value's first tensor among all that the client part returns.

    Raises:
        DefinitionError: A tensor has no bound, or its dtype is not one that devices compute with.
    """
    kinds = [kind for _, kind in leaves(member_of(step.type))]
    known = required(step, declared(step, bounds))
    aggregations, outputs, summands = _grouped(step, name, kinds, known)
    moved = {
        group: tuple(dataclasses.replace(output, leaf=output.leaf + first_leaf) for output in members)
        for group, members in outputs.items()
    }
    return aggregations, moved, summands


def weighted_outputs(
    step: Step, name: str, bounds: tuple[Bounds, Bounds], first_leaf: int, weight_kind: TensorType
) -> tuple[list[Aggregation], dict[str, tuple[Output, ...]], Recipe]:
    """Return the aggregations of a weighted mean, the sums of value times weight and of the weights, and its recipe.

    The weight is taken as a share of `weight_cap`, where there is one, so that `half_range` bounds their product.

    Args:
        step: The mean; its inputs are the value and the weight.
        name: What its sums are called.
        bounds: What is known of the value, and of the weight.
        first_leaf: Position of the value's first tensor; the weight follows its last.
        weight_kind: The weight's type.

    Raises:
        DefinitionError: The value or the weight has no bound, or the terms need a client program.
    """
    if step.terms.clip_norm is not None:
        raise DefinitionError(
            step.where,
            "clip_norm= needs the weight of a client program, its number of examples; with another weight, clip the "
            "value's coordinates by bound=",
        )
    value = within(bounds[0], step.bound)
    weight = _weight_bound(step, bounds[1][0])
    cap = float(step.terms.weight_cap or 1)
    half_range = step.terms.half_range
    limits = None if half_range is None else Bound(-half_range, half_range)
    products = required(step, within(tuple(_product(bound, weight, cap) for bound in value), limits))
    kinds = [kind for _, kind in leaves(member_of(step.type))]
    at = first_leaf + len(kinds)
    aggregations, outputs, summands = _grouped(step, name, kinds, products)
    weighed = {
        group: tuple(
            dataclasses.replace(
                output,
                leaf=output.leaf + first_leaf,
                bound=value[output.leaf],
                weight=at,
                weight_bound=weight,
                weight_cap=cap,
            )
            for output in members
        )
        for group, members in outputs.items()
    }
    plain = dataclasses.replace(step, terms=Terms())
    total, port, of_weight = _grouped(plain, f"{name}_weight", [weight_kind], (weight,))
    outputs_of_weight = {
        group: tuple(dataclasses.replace(output, leaf=at) for output in members) for group, members in port.items()
    }
    recipe = Recipe("weighted_mean", step.where, member_of(step.type), summands, of_weight[0], cap)
    return [*aggregations, *total], {**weighed, **outputs_of_weight}, recipe


def declared(step: Step, bounds: Bounds) -> Bounds:
    """Return `bounds` within what the author declares at the aggregation."""
    terms = step.terms
    found = within(bounds, step.bound)
    for half_range in (terms.half_range, terms.clip_norm):
        if half_range is not None:
            found = within(found, Bound(-half_range, half_range))
    return found


def required(step: Step, bounds: Bounds) -> tuple[Bound, ...]:
    """Return `bounds`, all known.

    Raises:
        DefinitionError: One is missing; the text says how to give it.
    """
    paths = [path for path, _ in leaves(member_of(step.type))]
    for path, bound in zip(paths, bounds, strict=True):
        if bound is None:
            what = f"the value at {path}" if path else "the value"
            raise DefinitionError(
                step.where,
                f"{what} has no bound, and a fleet can only add up what is bounded: without one a single device could "
                f"make the sum anything, and nobody could say how exact it is. Say between which numbers it lies: "
                f"sv.{step.operator}(value, bound=(low, high)), or sv.latest(name, low=..., high=...) for the "
                "collection, or map sv.clip(low, high) over the value first",
            )
    return tuple(bound for bound in bounds if bound is not None)


@dataclass(frozen=True, slots=True)
class Encoded:
    """How one tensor becomes entries of a sum.

    Attributes:
        encoding: Of every coordinate.
        lane: Width of an entry.
        port: Its type as it leaves the program.
        offset: What the program subtracts.
        clamp: What the program clamps it to, where the encoding does not do all of it.
    """

    encoding: Encoding
    lane: LaneName
    port: TensorType
    offset: float = 0.0
    clamp: Bound | None = None


def encode_as(step: Step, kind: TensorType, bound: Bound, *, size: int) -> Encoded:
    """Return how a tensor is encoded.

    Args:
        step: The aggregation, for its terms and for errors.
        kind: The tensor.
        bound: Of every coordinate.
        size: Entries of the whole value.

    Raises:
        DefinitionError: Devices cannot sum this dtype, or the bound is too wide.
    """
    if kind.numpy_dtype.kind != "f":
        return _encode_whole(step, kind, bound, size=size)
    port = TensorType("float32", kind.shape or (1,))
    bits, lane = bits_and_lane(step.terms, size)
    if step.terms.clip_norm is not None:
        half_range = step.terms.half_range or step.terms.clip_norm
        return Encoded(Quantised(half_range=half_range, bits=bits), lane, port, clamp=step.bound)
    if bits >= _FINE_BITS:
        # The encoding clamps to the wider end on both sides, and counts that; the nearer end is clamped before it.
        is_symmetric = -bound.low == bound.high
        half_range = max(size_of(bound), _SMALLEST)
        return Encoded(Quantised(half_range=half_range, bits=bits), lane, port, clamp=None if is_symmetric else bound)
    middle = float(np.float32((bound.low + bound.high) / 2))
    half_range = max(bound.high - middle, middle - bound.low, abs(middle) * _ROUNDING, _SMALLEST)
    return Encoded(Quantised(half_range=half_range, bits=bits), lane, port, offset=middle)


def _encode_whole(step: Step, kind: TensorType, bound: Bound, *, size: int) -> Encoded:
    if kind.dtype == "uint64":
        raise DefinitionError(
            step.where, "devices cannot compute with uint64; map sv.cast('int64') over the value first"
        )
    low, high = math.ceil(bound.low), math.floor(bound.high)
    maximum = max(high - low, 1)
    if maximum >= 2**48:
        raise DefinitionError(
            step.where, f"the bound {low}..{high} is too wide for a sum; clip to fewer than 2^48 values"
        )
    narrow = kind.dtype not in ("int64", "uint32") and low - 1 > -(2**31) and high + 1 < 2**31 and maximum < 2**31 - 2
    port = TensorType("int32" if narrow else "int64", kind.shape or (1,))
    # One beyond either end is still outside, so that the encoding counts it; much further out, subtracting might wrap
    # around. A single possible value has no room for two.
    clamp = None if low == 0 and high > 0 else Bound(low - 1, high + 1) if high > low else Bound(low, high)
    lane = step.terms.lane or lane_of_counts(maximum, size)
    return Encoded(Counted(maximum=maximum), lane, port, offset=float(low), clamp=clamp)


def error_of(encoding: Encoding, bound: Bound) -> float:
    """Return the largest error of one device's coordinate: below one quantum by stochastic rounding, and float32's."""
    if isinstance(encoding, Counted):
        return 0.0
    return 2 * encoding.half_range / encoding.maximum + size_of(bound) * _ROUNDING


def names(wanted: Iterable[str]) -> list[str]:
    """Return names for sums, each once: a second `mean` becomes `mean2`."""
    found: list[str] = []
    seen: dict[str, int] = {}
    for name in wanted:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}{seen[name]}")
    return found


def _grouped(
    step: Step, name: str, kinds: Sequence[TensorType], bounds: Sequence[Bound]
) -> tuple[list[Aggregation], dict[str, tuple[Output, ...]], tuple[Summand, ...]]:
    """Return the aggregations of one value, one for each encoding, with leaves counted from 0."""
    size = sum(kind.size for kind in kinds)
    encoded = [encode_as(step, kind, bound, size=size) for kind, bound in zip(kinds, bounds, strict=True)]
    groups: dict[tuple[Encoding, LaneName], list[int]] = {}
    for at, one in enumerate(encoded):
        groups.setdefault((one.encoding, one.lane), []).append(at)
    aggregations, outputs, summands = [], {}, {}
    for number, ((encoding, lane), members) in enumerate(groups.items()):
        group = name if len(groups) == 1 else f"{name}_{number + 1}"
        clip_norm = step.terms.clip_norm if isinstance(encoding, Quantised) else None
        types = tuple(str(encoded[at].port) for at in members)
        aggregations.append(Aggregation(name=group, tensors=types, encoding=encoding, lane=lane, clip_norm=clip_norm))
        outputs[group] = tuple(Output(at, encoded[at].port, encoded[at].clamp, encoded[at].offset) for at in members)
        for index, at in enumerate(members):
            summands[at] = Summand(group, index, encoded[at].offset, error_of(encoding, bounds[at]), bounds[at])
    return aggregations, outputs, tuple(summands[at] for at in range(len(kinds)))


def _weight_bound(step: Step, known: Bound | None) -> Bound:
    cap = step.terms.weight_cap
    if known is None and cap is None:
        raise DefinitionError(
            step.where, "the weight has no bound; give the largest weight of one device: weight_cap=..., 1 or more"
        )
    limits = Bound(0.0, float(cap)) if cap is not None else Bound(0.0, max(known.high, 0.0) if known else 0.0)
    found = within((known,), limits)[0]
    assert found is not None
    return found


def _product(value: Bound | None, weight: Bound, cap: float) -> Bound | None:
    if value is None:
        return None
    corners = [a * b / cap for a in (value.low, value.high) for b in (weight.low, weight.high)]
    return Bound(min(corners), max(corners))


def lane_of_counts(maximum: int, size: int) -> LaneName:
    """Return the lane for whole numbers up to `maximum`, `size` of them: the narrow one where a large cohort fits."""
    clients = _CLIENTS_SMALL if size <= EXACT_ENTRIES else _CLIENTS_LARGE
    return "uint32" if maximum * clients < 2**32 else "uint64"


def bits_and_lane(terms: Terms, size: int) -> tuple[int, LaneName]:
    """Return width and lane of quantised values, `size` of them, as the author or else the size says."""
    if terms.lane is None and terms.bits is None:
        return (32, "uint64") if size <= EXACT_ENTRIES else (16, "uint32")
    if terms.lane is None:
        assert terms.bits is not None
        return terms.bits, "uint32" if terms.bits <= 16 else "uint64"
    room: Mapping[LaneName, int] = {"uint16": 6, "3x21": 11, "uint32": 16, "dense": 16, "uint64": 32}
    return terms.bits or room[terms.lane], terms.lane


def _total(summand: Summand, sums: RoundSums) -> Array:
    total: Array = np.asarray(sums.sums[summand.aggregation][summand.index], np.float64)
    return total + sums.survivors * summand.offset


def size_of(bound: Bound) -> float:
    """Return the largest magnitude within `bound`."""
    return max(abs(bound.low), abs(bound.high))


def _fitted(total: Array, kind: TensorType, where: str) -> Array:
    """Return `total` in the dtype and shape of `kind`."""
    dtype = kind.numpy_dtype
    shaped = np.asarray(total).reshape([d or 0 for d in kind.shape])
    if dtype.kind == "f":
        return np.asarray(shaped.astype(dtype))[()]
    limits = np.iinfo(dtype)
    if shaped.size and not (limits.min <= shaped.min() and shaped.max() <= limits.max):
        raise ConfigError(
            f"{where}: a sum does not fit {dtype} ({limits.min} to {limits.max}); "
            "sum a wider type: map sv.cast('int64') over the values first"
        )
    return np.asarray(np.rint(shaped).astype(dtype))[()]
