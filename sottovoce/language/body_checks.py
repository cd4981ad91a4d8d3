"""Holds the steps of a loaded body against their types: what a file says may be anything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.bounds import elements_of
from sottovoce.language.expressions import Body, Builtin, Composite, LocalFunction, Operator, Step
from sottovoce.types import SequenceType, StructType, TensorType, Type
from sottovoce.values import leaves


def check_body(body: Body) -> None:
    """Raise ConfigError unless every step of `body` reads earlier ones, of the types that it needs.

    Only the operators of a server's part are known here: nothing in it is placed.
    """
    if not 0 <= body.result < len(body.steps):
        raise ConfigError("a body has no result")
    for at, step in enumerate(body.steps):
        if not all(0 <= earlier < at for earlier in step.inputs):
            raise ConfigError("a step reads one that does not come before it")
        if (step.operator == "parameter") != (at < len(body.parameters)):
            raise ConfigError("a parameter stands among the other steps")
        check = _CHECKS.get(step.operator)
        if check is None:
            raise ConfigError(f"{step.operator} does not run at a server")
        inputs = [body.steps[earlier].type for earlier in step.inputs]
        if not check(step, inputs):
            raise ConfigError(f"a step {step.operator} does not fit its type {step.type}")
    for (_, kind), step in zip(body.parameters, body.steps, strict=False):
        if kind != step.type:
            raise ConfigError("a parameter is of another type than its step")


def _tensors(*kinds: Type | None) -> list[TensorType]:
    return [leaf for kind in kinds if kind is not None for _, leaf in leaves(elements_of(kind))]


def _accepts(wanted: Sequence[TensorType], found: Sequence[TensorType]) -> bool:
    """Say whether tensors of the types `found` can be used where `wanted` are declared."""
    return len(wanted) == len(found) and all(
        a.dtype == b.dtype
        and len(a.shape) == len(b.shape)
        and all(want is None or want == have for want, have in zip(a.shape, b.shape, strict=True))
        for a, b in zip(wanted, found, strict=True)
    )


def _literal(step: Step, inputs: Sequence[Type]) -> bool:
    kinds = _tensors(step.type)
    return len(kinds) == len(step.value) and all(
        kind.admits(np.asarray(array)) for kind, array in zip(kinds, step.value, strict=True)
    )


def _struct(step: Step, inputs: Sequence[Type]) -> bool:
    if not isinstance(step.type, StructType):
        return False
    pairs = itertools.zip_longest((kind for _, kind in step.type.elements), inputs)
    return all(_accepts(_tensors(element), _tensors(kind)) for element, kind in pairs)


def _select(step: Step, inputs: Sequence[Type]) -> bool:
    (struct,) = inputs
    if not isinstance(struct, StructType) or not 0 <= step.index < len(struct):
        return False
    return _accepts(_tensors(step.type), _tensors(struct.elements[step.index][1]))


def _call(step: Step, inputs: Sequence[Type]) -> bool:
    (function,) = step.functions
    return _is_sound(function) and _applies(function, _tensors(*inputs), step.type)


def _sequence_map(step: Step, inputs: Sequence[Type]) -> bool:
    (sequence,) = inputs
    return isinstance(sequence, SequenceType) and isinstance(step.type, SequenceType) and _call(step, inputs)


def _sequence_reduce(step: Step, inputs: Sequence[Type]) -> bool:
    (function,) = step.functions
    sequence, zero = inputs
    return (
        isinstance(sequence, SequenceType)
        and _is_sound(function)
        and _applies(function, _tensors(zero, sequence), zero)
        and _accepts(_tensors(step.type), _tensors(zero))
    )


def _sequence_sum(step: Step, inputs: Sequence[Type]) -> bool:
    (sequence,) = inputs
    return isinstance(sequence, SequenceType) and _accepts(_tensors(step.type), _tensors(sequence))


def _applies(function: LocalFunction, given: Sequence[TensorType], result: Type) -> bool:
    return _accepts(_tensors(function.parameter), given) and _accepts(_tensors(result), _tensors(function.result))


def _is_sound(function: LocalFunction) -> bool:
    """Say whether a function's parts have the types that it declares; a flatbuffer is held to them when it runs."""
    match function:
        case Composite():
            check_body(function.body)
            return True
        case Builtin(name="clip", bound=bound):
            return bound is not None and function.parameter == function.result
        case Builtin(name="identity"):
            return function.parameter == function.result
        case Builtin():
            shapes = [kind.shape for kind in _tensors(function.parameter)]
            return shapes == [kind.shape for kind in _tensors(function.result)]
        case _:
            return True


_CHECKS: Mapping[Operator, Callable[[Step, Sequence[Type]], bool]] = {
    "parameter": lambda step, inputs: not inputs,
    "literal": _literal,
    "struct": _struct,
    "select": _select,
    "call": _call,
    "sequence_map": _sequence_map,
    "sequence_reduce": _sequence_reduce,
    "sequence_sum": _sequence_sum,
}
