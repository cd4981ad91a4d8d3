"""What is known of the values inside a computation: an interval for every tensor, inferred step by step.

A sum that leaves a device needs a bound: it decides how values are encoded, and that the sum of all devices fits.
Bounds are declared (`bound=`), come with the collection (`low=`, `high=`), or follow: a truth value and a cast of it
lie in 0..1, a clip within its ends, a mean within the bound of its values; of TensorFlow functions the Tracer knows.
The bound of a sequence is that of its elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.expressions import Body, Builtin, ClientProgram, Composite, HostFunction, LocalFunction, Step
from sottovoce.language.ports import Bound
from sottovoce.types import Array, FederatedType, FunctionType, SequenceType, StructType, TensorType, Type
from sottovoce.values import leaves

Bounds: TypeAlias = tuple[Bound | None, ...]
"""One for each tensor of a type, in the order of `elements_of(type)`; None where nothing is known."""

TRUTH = Bound(0.0, 1.0)
_NARROW = {"bool": TRUTH, "uint8": Bound(0.0, 255.0), "int8": Bound(-128.0, 127.0)}
"""What every value of a dtype lies in, where that says something."""


def elements_of(kind: Type) -> Type:
    """Return `kind` without placements, and with elements where it has sequences: tensors and structs alone."""
    match kind:
        case TensorType():
            return kind
        case StructType():
            return StructType(tuple((name, elements_of(element)) for name, element in kind.elements))
        case SequenceType():
            return elements_of(kind.element)
        case FederatedType():
            return elements_of(kind.member)
        case FunctionType():
            raise ConfigError(f"{kind} is a function, which is no value of a step")


def infer(body: Body, parameters: Sequence[Bounds]) -> list[Bounds]:
    """Return the bounds of every step of `body`.

    Args:
        body: Of a computation or of a local function.
        parameters: What is known of each parameter.
    """
    known: list[Bounds] = []
    for at, step in enumerate(body.steps):
        found = (
            parameters[at] if step.operator == "parameter" else _of_step(step, [known[i] for i in step.inputs], body)
        )
        kinds = leaves(elements_of(step.type))
        known.append(tuple(b or _NARROW.get(kind.dtype) for b, (_, kind) in zip(found, kinds, strict=True)))
    return known


def unknown(kind: Type) -> Bounds:
    """Return the bounds of a value of type `kind` of which nothing is known."""
    return (None,) * len(leaves(elements_of(kind)))


def within(inferred: Bounds, declared: Bound | None) -> Bounds:
    """Return `inferred` after every coordinate has been clamped to `declared`."""
    return tuple(inferred if declared is None else (_clamped(bound, declared) for bound in inferred))


def applied(function: LocalFunction, argument: Bounds) -> Bounds:
    """Return what is known of the result of `function` when that much is known of its argument."""
    match function:
        case Builtin(name="clip", bound=Bound() as bound):
            return within(argument, bound)
        case Builtin(name="cast"):
            kinds = leaves(elements_of(function.result))
            return tuple(_cast(bound, kind) for bound, (_, kind) in zip(argument, kinds, strict=True))
        case Builtin():
            return argument
        case Composite():
            return infer(function.body, _split(function.body, argument))[function.body.result]
        case ClientProgram() | HostFunction():
            return unknown(function.result)
        case _:
            return function.output_bounds(argument)


def _of_step(step: Step, inputs: list[Bounds], body: Body) -> Bounds:
    match step.operator:
        case "literal":
            return tuple(_of_array(array) for array in step.value)
        case "struct" | "federated_zip":
            return tuple(bound for one in inputs for bound in one)
        case "select":
            return _selected(body.steps[step.inputs[0]].type, step.index, inputs[0])
        case "call" | "federated_map" | "federated_eval" | "sequence_map":
            return applied(step.functions[0], inputs[0] if inputs else ())
        case "federated_broadcast" | "federated_value" | "federated_min" | "federated_max" | "client_state_write":
            return inputs[0]
        case "federated_mean":
            return within(inputs[0], step.bound)
        case "sequence_reduce":
            return _reduced(step, inputs)
        case _:
            return unknown(step.type)


def _reduced(step: Step, inputs: list[Bounds]) -> Bounds:
    """A reduction is bounded where its function is, whatever went before; the zero stays if there are no elements."""
    elements, zero = inputs
    found = applied(step.functions[0], (*(None,) * len(zero), *elements))
    return tuple(None if a is None or b is None else _union(a, b) for a, b in zip(zero, found, strict=True))


def _split(body: Body, argument: Bounds) -> list[Bounds]:
    """Return the bounds of each parameter, of those of the struct of all."""
    parts, at = [], 0
    for _, kind in body.parameters:
        count = len(unknown(kind))
        parts.append(argument[at : at + count])
        at += count
    return parts


def _selected(kind: Type, index: int, bounds: Bounds) -> Bounds:
    struct = elements_of(kind)
    assert isinstance(struct, StructType)
    counts = [len(leaves(element)) for _, element in struct.elements]
    start = sum(counts[:index])
    return bounds[start : start + counts[index]]


def _clamped(bound: Bound | None, limits: Bound) -> Bound:
    if bound is None:
        return limits
    low, high = (min(max(end, limits.low), limits.high) for end in (bound.low, bound.high))
    return Bound(low, high)


def _union(a: Bound, b: Bound) -> Bound:
    return Bound(min(a.low, b.low), max(a.high, b.high))


def _cast(bound: Bound | None, kind: TensorType) -> Bound | None:
    """Return the bound after a cast; an integer that cannot hold the value wraps around, and nothing is known then."""
    if bound is None or kind.dtype == "bool" or kind.numpy_dtype.kind == "f":
        return bound if kind.dtype != "bool" else TRUTH
    limits = np.iinfo(kind.numpy_dtype)
    low, high = float(math.trunc(bound.low)), float(math.trunc(bound.high))
    return Bound(low, high) if limits.min <= low and high <= limits.max else None


def _of_array(array: Array) -> Bound | None:
    values = np.asarray(array)
    if values.dtype.kind not in "biuf" or not values.size or not np.isfinite(values).all():
        return None
    return Bound(float(values.min()), float(values.max()))
