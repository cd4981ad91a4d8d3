"""Walks the steps of a body. One walk for the reference executor, the server's parts of a lowered computation and,
on symbolic tensors, the tracer; what differs is the table of handlers that each brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language import client_programs
from sottovoce.language.builtins import apply_builtin
from sottovoce.language.expressions import (
    Body,
    Builtin,
    ClientProgram,
    Composite,
    HostFunction,
    LocalFunction,
    Operator,
    Step,
)
from sottovoce.types import StructType, TensorType, Type
from sottovoce.values import flatten, leaves, struct_value, to_value, unflatten

Handler: TypeAlias = Callable[[Step, list[Any]], Any]
"""Takes a step and the values of its inputs, and returns the step's value."""
Apply: TypeAlias = Callable[[LocalFunction, Any], Any]
"""Applies a local function to its argument (None where it takes none)."""


def evaluate(body: Body, arguments: Sequence[Any], handlers: Mapping[Operator, Handler]) -> Any:
    """Return the result of `body`.

    Args:
        body: What to do.
        arguments: One value for each parameter.
        handlers: What each operator does; `parameter` needs none.

    Raises:
        ConfigError: There is no handler for a step; the text names its line.
    """
    values: list[Any] = list(arguments)
    for step in body.steps[len(values) :]:
        handler = handlers.get(step.operator)
        if handler is None:
            raise ConfigError(f"{step.where}: this cannot run here")
        values.append(handler(step, [values[at] for at in step.inputs]))
    return values[body.result]


def local_handlers(apply: Apply) -> dict[Operator, Handler]:
    """Return the handlers of everything that needs no placement.

    They compute with numpy values. On the tensors of a graph, the ones for `literal` and sequences must be replaced.
    """
    return {
        "literal": lambda step, _: unflatten(step.type, step.value),
        "struct": lambda step, inputs: struct_value(_struct(step.type), inputs),
        "select": lambda step, inputs: inputs[0][step.index],
        "call": lambda step, inputs: apply(step.functions[0], inputs[0] if inputs else None),
        "sequence_map": lambda step, inputs: [apply(step.functions[0], element) for element in inputs[0]],
        "sequence_reduce": lambda step, inputs: reduced(step.functions[0], inputs[0], inputs[1], apply),
        "sequence_sum": lambda step, inputs: total(step.type, inputs[0], what=step.where),
    }


def apply(function: LocalFunction, argument: Any) -> Any:
    """Return what `function` makes of `argument` (numpy values in canonical form), computed in this process."""
    match function:
        case Builtin():
            return apply_builtin(function, argument)
        case Composite():
            return evaluate(function.body, unpacked(function.body, argument), _LOCAL)
        case ClientProgram():
            return client_programs.run(function, argument)
        case HostFunction():
            return _call_host(function, argument)
        case _:
            flat = [] if function.parameter is None else flatten(function.parameter, argument)
            returned = function(*map(np.asarray, flat))
            kinds = [kind for _, kind in leaves(function.result)]
            arrays = [np.asarray(a, kind.numpy_dtype)[()] for a, kind in zip(returned, kinds, strict=True)]
            return unflatten(function.result, arrays)


def unpacked(body: Body, argument: Any) -> list[Any]:
    """Return one argument for each parameter of `body` from the one that stands for all."""
    return list(argument) if len(body.parameters) > 1 else [argument] * len(body.parameters)


def reduced(function: LocalFunction, sequence: Sequence[Any], zero: Any, apply: Apply) -> Any:
    """Return `zero` folded with every element of `sequence` in order by `function(accumulator, element)`."""
    accumulator = zero
    for element in sequence:
        accumulator = apply(function, (accumulator, element))
    return accumulator


def total(kind: Type, values: Sequence[Any], *, what: str) -> Any:
    """Return the sum of `values`, each of type `kind`: whole numbers exactly, floats in float64 and then rounded.

    Raises:
        ConfigError: A sum does not fit its dtype.
    """
    columns = list(zip(*(flatten(kind, value) for value in values), strict=True))
    sums = [_sum(leaf, columns[at] if values else (), what) for at, (_, leaf) in enumerate(leaves(kind))]
    return unflatten(kind, sums)


def _sum(kind: TensorType, column: Sequence[Any], what: str) -> Any:
    dtype = kind.numpy_dtype
    if not column:
        return np.zeros([d or 0 for d in kind.shape], dtype)[()]
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # a sum beyond the dtype is infinite, as everywhere in its arithmetic
            return np.asarray(np.sum(np.stack(column), axis=0, dtype=np.float64)).astype(dtype)[()]
    wide = np.int64 if dtype.itemsize <= 4 else object  # Python's integers, where 64 bits could overflow
    exact = np.sum(np.stack(column).astype(wide), axis=0)
    limits = np.iinfo(dtype)
    if np.size(exact) and not (limits.min <= np.min(exact) and np.max(exact) <= limits.max):
        raise ConfigError(
            f"{what}: a sum does not fit {dtype} ({limits.min} to {limits.max}); "
            "sum a wider type: map sv.cast('int64') over the values first"
        )
    return np.asarray(exact, dtype)[()]


def _call_host(function: HostFunction, argument: Any) -> Any:
    if function.parameter is None:
        returned = function.call()
    else:
        what = f"the argument of {function.name}"
        returned = function.call(to_value(function.parameter, argument, what=what))
    return to_value(function.result, returned, what=f"the result of {function.name}")


def _struct(kind: Type) -> StructType:
    assert isinstance(kind, StructType)
    return kind


_LOCAL = local_handlers(apply)
