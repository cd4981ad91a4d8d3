"""From an aggregation of the language to entries of the masked vector; `recipes` has the way back.

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

import numpy as np

from sottovoce.errors import DefinitionError
from sottovoce.language.bounds import Bounds, within
from sottovoce.language.client_part import Output, member_of
from sottovoce.language.expressions import Step, Terms
from sottovoce.language.ports import Bound
from sottovoce.language.recipes import ROUNDING, Recipe, Summand, size_of
from sottovoce.plan import Aggregation, Counted, Encoding, LaneName, Quantised
from sottovoce.types import TensorType
from sottovoce.values import leaves

EXACT_ENTRIES = 1024
"""Up to so many entries a value is rounded to 32 bits in wide lanes; a larger one to 16 bits in lanes of 32."""
_FINE_BITS = 24
"""From so many bits on a step is finer than float32 itself, and subtracting a middle would cost more than it gains."""
_CLIENTS_SMALL, _CLIENTS_LARGE = 2**16, 2**10
"""Devices for whose sum a lane of 32 bits must have room, for a value of few entries and of many."""
_SMALLEST = 1e-30
"""Half the range of a value that can only be 0."""


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
    if size_of(bound) > float(np.finfo(np.float32).max):
        raise DefinitionError(
            step.where, f"the bound {bound} is beyond what devices compute with; give what the values can really be"
        )
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
    half_range = max(bound.high - middle, middle - bound.low, abs(middle) * ROUNDING, _SMALLEST)
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
    return 2 * encoding.half_range / encoding.maximum + size_of(bound) * ROUNDING


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
