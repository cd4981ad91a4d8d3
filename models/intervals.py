"""What is known of a traced function's results when something is known of its arguments: interval arithmetic.

An interval holds for every coordinate of a tensor; an end that is not known is infinite, so that `minimum(x, 1)` of an
unknown x still ends at 1. Each rule gives an interval that surely contains the result whatever the arguments are within
theirs; an operation without a rule gives the whole line. Rounding: the ends are computed in float64, and what a device
computes in float32 may exceed them by its own rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from sottovoce.language.ports import Bound


class Interval(NamedTuple):
    """Where every coordinate of a tensor lies; the ends may be infinite."""

    low: float
    high: float


Rule: TypeAlias = Callable[[Any, Sequence[Interval]], Interval]
"""(operation, intervals of its inputs) -> interval of its outputs."""

UNKNOWN = Interval(-math.inf, math.inf)


def output_bounds(graph: Any, inputs: Sequence[Bound | None]) -> tuple[Bound | None, ...]:
    """Return what is known of each output of `graph`, None where it is not bounded on both sides.

    Args:
        graph: A concrete function.
        inputs: What is known of each of its arguments, in order.
    """
    known = {inside.name: _of_capture(outside) for outside, inside in graph.graph.captures}
    arguments = [tensor for tensor in graph.inputs if tensor.name not in known]
    for tensor, bound in zip(arguments, inputs, strict=True):
        known[tensor.name] = UNKNOWN if bound is None else Interval(bound.low, bound.high)
    for operation in graph.graph.get_operations():
        if operation.type != "Placeholder":
            found = _of_operation(operation, [known[tensor.name] for tensor in operation.inputs])
            known.update((tensor.name, _as_dtype(tensor, found)) for tensor in operation.outputs)
    ends = [known[tensor.name] for tensor in graph.outputs]
    return tuple(Bound(*interval) if all(map(math.isfinite, interval)) else None for interval in ends)


def _of_operation(operation: Any, inputs: Sequence[Interval]) -> Interval:
    rule = _RULES.get(operation.type)
    found = UNKNOWN if rule is None else rule(operation, inputs)
    return UNKNOWN if math.isnan(found.low) or math.isnan(found.high) else found


def _as_dtype(tensor: Any, interval: Interval) -> Interval:
    """Truth values are 0 or 1; an integer that its dtype cannot hold wraps around, and nothing is known of it."""
    if tensor.dtype == tf.bool:
        return Interval(0.0, 1.0)
    wraps = tensor.dtype.is_integer and not (tensor.dtype.min <= interval.low and interval.high <= tensor.dtype.max)
    return UNKNOWN if wraps else interval


def _of_capture(tensor: Any) -> Interval:
    return _of_array(tensor.numpy()) if hasattr(tensor, "numpy") else UNKNOWN


def _of_array(array: object) -> Interval:
    values = np.asarray(array)
    if values.dtype.kind not in "biuf" or not values.size or not np.isfinite(values).all():
        return UNKNOWN
    return Interval(float(values.min()), float(values.max()))


def _union(intervals: Sequence[Interval]) -> Interval:
    """Return the smallest interval that contains all of them."""
    return Interval(min(i.low for i in intervals), max(i.high for i in intervals))


def _of_corners(function: Callable[[float, float], float]) -> Rule:
    """Return the rule of an operation that is monotone in each argument: its extremes are at the corners."""

    def rule(operation: Any, inputs: Sequence[Interval]) -> Interval:
        corners = [function(a, b) for a, b in itertools.product(*inputs)]
        return UNKNOWN if any(map(math.isnan, corners)) else Interval(min(corners), max(corners))

    return rule


def _divide(operation: Any, inputs: Sequence[Interval]) -> Interval:
    divisor = inputs[1]
    return UNKNOWN if divisor.low <= 0 <= divisor.high else _of_corners(lambda a, b: a / b)(operation, inputs)


def _monotone(function: Callable[[float], float]) -> Rule:
    """Return the rule of an operation of one argument that only rises or only falls."""

    def rule(operation: Any, inputs: Sequence[Interval]) -> Interval:
        ends = function(inputs[0].low), function(inputs[0].high)
        return Interval(min(ends), max(ends))

    return rule


def _of_magnitude(function: Callable[[float], float]) -> Rule:
    """Return the rule of an operation that only depends on the size of its argument, and rises with it."""

    def rule(operation: Any, inputs: Sequence[Interval]) -> Interval:
        low, high = inputs[0]
        ends = function(abs(low)), function(abs(high))
        return Interval(function(0.0) if low <= 0 <= high else min(ends), max(ends))

    return rule


def _constantly(low: float, high: float) -> Rule:
    return lambda operation, inputs: Interval(low, high)


def _sum(operation: Any, inputs: Sequence[Interval]) -> Interval:
    """A sum of a known number of terms lies within that many times the interval of one."""
    before, after = (tensor.shape.num_elements() for tensor in (operation.inputs[0], operation.outputs[0]))
    if not before or not after:
        return UNKNOWN
    return Interval(inputs[0].low * (before // after), inputs[0].high * (before // after))


def _index(operation: Any, inputs: Sequence[Interval]) -> Interval:
    """The position along an axis of known length."""
    axis, shape = tf.get_static_value(operation.inputs[1]), operation.inputs[0].shape
    size = shape[int(axis)] if axis is not None and shape.rank is not None else None
    return UNKNOWN if size is None else Interval(0.0, float(size - 1))


def _cast(operation: Any, inputs: Sequence[Interval]) -> Interval:
    """A cast to an integer cuts towards zero, and so do the ends of its interval."""
    if not operation.outputs[0].dtype.is_integer or not all(map(math.isfinite, inputs[0])):
        return inputs[0]
    return Interval(float(math.trunc(inputs[0].low)), float(math.trunc(inputs[0].high)))


def _to_whole(function: Callable[[float], int]) -> Rule:
    return _monotone(lambda a: float(function(a)) if math.isfinite(a) else a)


def _exp(a: float) -> float:
    return math.exp(a) if a < 709 else math.inf


def _log(a: float) -> float:
    return math.log(a) if a > 0 else -math.inf


_SAME_ELEMENTS = (
    "Identity", "Reshape", "ExpandDims", "Squeeze", "GatherV2", "GatherNd", "StridedSlice", "Slice", "Transpose",
    "Tile", "BroadcastTo", "ReverseV2", "StopGradient", "EnsureShape", "Unpack", "SplitV", "Mean", "Max", "Min",
)  # fmt: skip
"""What comes out are elements that went in first, or lies between them."""
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_SAME_ELEMENTS, lambda operation, inputs: inputs[0]),
    "Split": lambda operation, inputs: inputs[1],
    "Const": lambda operation, inputs: _of_array(tf.get_static_value(operation.outputs[0])),
    "Fill": lambda operation, inputs: inputs[1],
    "Cast": _cast,
    "Pack": lambda operation, inputs: _union(inputs),
    "ConcatV2": lambda operation, inputs: _union(inputs[:-1]),
    "Select": lambda operation, inputs: _union(inputs[1:]),
    "SelectV2": lambda operation, inputs: _union(inputs[1:]),
    "OneHot": lambda operation, inputs: _union(inputs[2:4]),
    "Pad": lambda operation, inputs: _union([inputs[0], Interval(0.0, 0.0)]),
    "PadV2": lambda operation, inputs: _union([inputs[0], inputs[2]]),
    **dict.fromkeys(("Add", "AddV2", "BiasAdd"), _of_corners(lambda a, b: a + b)),
    "Sub": _of_corners(lambda a, b: a - b),
    "Mul": _of_corners(lambda a, b: a * b),
    "RealDiv": _divide,
    "Minimum": _of_corners(min),
    "Maximum": _of_corners(max),
    "AddN": lambda operation, inputs: Interval(sum(i.low for i in inputs), sum(i.high for i in inputs)),
    "Sum": _sum,
    "Neg": _monotone(lambda a: -a),
    "Floor": _to_whole(math.floor),
    "Ceil": _to_whole(math.ceil),
    "Round": _to_whole(round),
    "Exp": _monotone(_exp),
    "Log": _monotone(_log),
    "Log1p": _monotone(lambda a: _log(1 + a)),
    "Sqrt": _monotone(lambda a: math.sqrt(a) if a >= 0 else math.nan),
    "Abs": _of_magnitude(lambda a: a),
    "Square": _of_magnitude(lambda a: a * a),
    "Relu": _monotone(lambda a: max(a, 0.0)),
    "Relu6": _monotone(lambda a: min(max(a, 0.0), 6.0)),
    "Sigmoid": _monotone(lambda a: 1 / (1 + _exp(-a))),
    "Tanh": _monotone(math.tanh),
    "Softmax": _constantly(0.0, 1.0),
    **dict.fromkeys(("Sin", "Cos", "Sign"), _constantly(-1.0, 1.0)),
    "ArgMax": _index,
    "ArgMin": _index,
    "ZerosLike": _constantly(0.0, 0.0),
    "OnesLike": _constantly(1.0, 1.0),
}
