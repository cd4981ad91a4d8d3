"""From the language's lowered client part to a bundle: `begin`, `step` and `finish` over named tensors.

The newest example is kept by `step` as it is, and everything is computed in `finish`; so `begin` and `step` are the
same for all computations that read the same types, and are converted once. Over a collection `step` carries the
accumulators: elements are mapped all at once, sums are taken over the batch, and other reductions walk it in order.

What is NaN or infinite must not be summed, whatever bounds and casts make of it. So a value that is clamped stays NaN,
and a program that casts real numbers to whole ones, which cannot be NaN, has one output more for every role that does:
0, or NaN once such a cast was given no finite number. Devices take no part with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from models.noticed_casts import Casts, casts_reals, has_casts, loses_nan, not_finite, noticed
from models.ops import Tensor
from models.program_export import ProgramSource, Tensors, export_program, run_with_tensorflow, seed_of
from sottovoce.bundle import NEXT, Bundle, ClientState, Port, Result, RoleName
from sottovoce.errors import BadBundle, DefinitionError
from sottovoce.language.client_part import ClientSource, Output, named_ports
from sottovoce.language.expressions import (
    Builtin,
    ClientProgram,
    Composite,
    HostFunction,
    LocalFunction,
    Operator,
    Slot,
    Step,
)
from sottovoce.language.interpreter import Handler, evaluate, local_handlers, unpacked
from sottovoce.language.ports import Bound
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array, TensorType, Type
from sottovoce.values import flatten, leaves, unflatten

_TEST_BATCHES = (3, 1, 4)
_TEST_RANGES = ((0.1, 1.0), (1.0, 2.0), (-1.0, 1.0))
"""Where the self-test's numbers are drawn; the first range in which the program gives finite results is taken."""
_TOLERANCE = 1e-4


_STEP_CASTS, _FINISH_CASTS = "casts_in_step", "casts_in_finish"


@dataclass(frozen=True, slots=True)
class Rows:
    """A sequence while a graph is traced: its elements' leaves, stacked along a first axis."""

    element: Type
    leaves: tuple[Tensor, ...]


def bundle_of(source: ClientSource) -> Bundle:
    """Return the bundle of a lowered client program, with its self-test.

    Raises:
        DefinitionError: It needs an operation that devices do not have.
        SelfTestFailed: This machine's TFLite runtime computes something else than TensorFlow.
    """
    for low, high in _TEST_RANGES:
        program = _program(source, low, high)
        initial = {**program.initial, **program.test_broadcast}
        expected = program.reference(initial, program.test_batches)
        if all(np.isfinite(value).all() for value in expected.values()):
            try:
                return export_program(program)
            except BadBundle as error:
                raise DefinitionError(source.name, str(error)) from error
    raise DefinitionError(
        source.name,
        "its results are not finite numbers for any of the examples that its self-test tries; guard divisions, "
        "logarithms and square roots, as by tf.math.divide_no_nan or tf.maximum(x, 1e-6)",
    )


def _program(source: ClientSource, low: float, high: float) -> ProgramSource:
    """Return the program with a self-test on numbers of [low, high] where nothing else is known of them."""
    random = np.random.default_rng(seed_of(source.name))
    slot = source.slot
    functions: dict[RoleName, Callable[[Tensors], Tensors]] = {
        "begin": lambda tensors: _begin(source, tensors),
        "step": lambda tensors: _step(source, tensors),
        "finish": lambda tensors: _finish(source, tensors),
    }
    broadcast = {name: _draw(random, kind, None, low, high) for name, kind in source.broadcast_ports}
    kept = {name: _draw(random, kind, None, low, high) for name, kind in _slot_ports("client_state", slot)}
    sizes = _TEST_BATCHES if source.is_collection else (1,)
    columns = list(zip(source.columns, source.bounds, strict=True))
    metrics = (_scalar_port(_STEP_CASTS),) if _casts_in_step(source) else ()
    batches = [
        {
            name: np.stack([_draw(random, kind, bound, low, high) for _ in range(size)])
            for (name, kind), bound in columns
        }
        for size in sizes
    ]
    return ProgramSource(
        name=source.name,
        description=source.description,
        functions=functions,
        broadcast=_ports(source.broadcast_ports),
        state=_ports(_state_ports(source)),
        batch=tuple(
            Port(name=name, type=str(TensorType(kind.dtype, (None, *kind.shape)))) for name, kind in source.columns
        ),
        metrics=metrics,
        results=tuple(
            Result(name=name, ports=_ports(_result_ports(name, outputs))) for name, outputs in source.outputs.items()
        )
        + ((Result(name=_FINISH_CASTS, ports=(_scalar_port(_FINISH_CASTS),)),) if _casts_in_finish(source) else ()),
        initial=broadcast,
        test_broadcast={},
        test_batches=batches,
        reference=lambda arrays, given: run_with_tensorflow(
            functions, arrays, given, metrics=[port.name for port in metrics], client_state=kept
        ),
        tolerance=_TOLERANCE,
        client_state=None if slot is None else _client_state(slot),
        test_client_state=kept,
    )


def _begin(source: ClientSource, tensors: Tensors) -> Tensors:
    """Return the first state: accumulators at their zero, or an empty place for the newest example."""
    given = _values(source.broadcast_ports, source.broadcast, tensors)
    if source.is_collection:
        first = flatten(source.zeros.result_type, evaluate(source.zeros, given, _handlers([])))
    else:
        first = [tf.zeros(_dims(kind), kind.dtype) for row in source.rows for _, kind in leaves(row)]
    passed = [tensors[name] for name, _ in _slot_ports("client_state", source.slot)]
    return _named(_state_ports(source), [*first, *passed])


def _step(source: ClientSource, tensors: Tensors) -> Tensors:
    pairs = zip(source.columns, source.bounds, strict=True)
    columns = [_within(tensors[name], bound) for (name, _), bound in pairs]
    casts: Casts = []
    kept = _reduced(source, columns, tensors, casts) if source.is_collection else [column[-1] for column in columns]
    passed = [tensors[name] for name, _ in _slot_ports("slot", source.slot)]
    flag = {_STEP_CASTS: noticed(casts)} if _casts_in_step(source) else {}
    return {**_named(_state_ports(source), [*kept, *passed]), **flag}


def _finish(source: ClientSource, tensors: Tensors) -> Tensors:
    state = _values(named_ports("kept", source.kept), source.kept, tensors)
    given = _values(source.broadcast_ports, source.broadcast, tensors)
    slot = source.slot
    own = [] if slot is None else _values(_slot_ports("slot", slot), (slot.type,), tensors)
    casts: Casts = []
    if has_casts(source.zeros):
        evaluate(source.zeros, given, _handlers(casts))  # `begin` has no output of its own for what it noticed.
    found = flatten(source.finish.result_type, evaluate(source.finish, [*state, *given, *own], _handlers(casts)))
    named: dict[str, Tensor] = {_FINISH_CASTS: noticed(casts)} if _casts_in_finish(source) else {}
    for name, outputs in source.outputs.items():
        ports = _result_ports(name, outputs)
        named.update(_named(ports, [_summand(output, found) for output in outputs]))
    if slot is not None:
        ports = _slot_ports(f"{NEXT}client_state", slot)
        named.update(_named(ports, found[len(found) - len(ports) :]))
    return named


def _reduced(source: ClientSource, columns: Sequence[Tensor], tensors: Tensors, casts: Casts) -> list[Tensor]:
    """Return the accumulators after one batch."""
    rest = iter(columns)
    rows = [Rows(kind, tuple(next(rest) for _ in leaves(kind))) for kind in source.rows]
    sequences = evaluate(source.sequences, rows, _handlers(casts))
    before = _values(named_ports("kept", source.kept), source.kept, tensors)
    found: list[Tensor] = []
    for reduction, sequence, accumulator in zip(source.reductions, sequences, before, strict=True):
        if reduction.function is None:
            pairs = zip(flatten(reduction.kind, accumulator), sequence.leaves, strict=True)
            found += [total + tf.reduce_sum(column, axis=0) for total, column in pairs]
        else:
            after = _folded(reduction.function, reduction.kind, sequence, accumulator, casts)
            found += flatten(reduction.kind, after)
    return found


def _summand(output: Output, found: Sequence[Tensor]) -> Tensor:
    """Return what leaves the program: the value, or value times weight, minus its offset."""
    value, dtype = tf.cast(found[output.leaf], output.kind.dtype), tf.as_dtype(output.kind.dtype)
    value = value if output.bound is None else _bounded(value, output.bound)
    if output.weight is not None and output.weight_bound is not None:
        weight = _bounded(tf.reshape(tf.cast(found[output.weight], dtype), []), output.weight_bound)
        value = value * (weight / tf.constant(output.weight_cap, dtype))
    offset = int(output.offset) if dtype.is_integer else output.offset
    return value - tf.constant(offset, dtype) if offset else value


def _folded(function: LocalFunction, kind: Type, rows: Rows, zero: Any, casts: Casts) -> Any:
    """Return `zero` folded with every row in order."""
    count = tf.shape(rows.leaves[0])[0]
    flags = [tf.zeros([1])] if casts_reals(function) else []

    def body(at: Tensor, *carried: Tensor) -> list[Tensor]:
        accumulator, before = carried[: len(carried) - len(flags)], carried[len(carried) - len(flags) :]
        inner: Casts = []
        element = unflatten(rows.element, [leaf[at] for leaf in rows.leaves])
        folded = _apply(function, (unflatten(kind, accumulator), element), inner)
        return [at + 1, *flatten(kind, folded), *(each + noticed(inner) for each in before)]

    loop = [tf.constant(0), *map(tf.convert_to_tensor, flatten(kind, zero)), *flags]
    _, *after = tf.while_loop(lambda at, *_: at < count, body, loop)
    casts.extend(after[len(after) - len(flags) :])
    return unflatten(kind, after[: len(after) - len(flags)])


def _mapped(function: LocalFunction, rows: Rows, casts: Casts) -> Rows:
    """Return `function` of every row, all at once."""
    return _each(function, lambda row: unflatten(rows.element, row), list(rows.leaves), casts)


def _each(function: LocalFunction, argument: Callable[[Any], Any], rows: Any, casts: Casts) -> Rows:
    """Return `function` of the argument that is made of every row."""

    def of_one(row: Any) -> list[Tensor]:
        inner: Casts = []
        found = flatten(function.result, _apply(function, argument(row), inner))
        return [tf.identity(leaf) for leaf in [*found, *([noticed(inner)] if casts_reals(function) else [])]]

    made = tf.vectorized_map(of_one, rows)
    if casts_reals(function):
        casts.append(tf.reduce_sum(made.pop(), axis=0))
    return Rows(function.result, tuple(made))


def _sliced(step: Step, inputs: list[Any], casts: Casts) -> Rows:
    """Return the slices of a broadcast value that the keys ask for."""
    keys, whole = inputs
    function, bound = step.functions[0], step.bound
    assert bound is not None
    allowed = tf.clip_by_value(keys, int(bound.low), int(bound.high))
    return _each(function, lambda key: (whole, key), allowed, casts)


def _total(rows: Rows) -> Any:
    return unflatten(rows.element, [tf.reduce_sum(leaf, axis=0) for leaf in rows.leaves])


def _apply(function: LocalFunction, argument: Any, casts: Casts) -> Any:
    """Return what `function` makes of tensors; see `sottovoce.language.interpreter.apply` for arrays.

    Args:
        function: The function.
        argument: Tensors in the form of its parameter.
        casts: What its casts to whole numbers notice is added here.
    """
    match function:
        case Builtin(name="identity"):
            return argument
        case Builtin(name="cast"):
            targets = [kind.dtype for _, kind in leaves(function.result)]
            pairs = list(zip(flatten(function.parameter, argument), targets, strict=True))
            casts += [not_finite(leaf) for leaf, dtype in pairs if loses_nan(leaf.dtype, dtype)]
            return unflatten(function.result, [tf.cast(leaf, dtype) for leaf, dtype in pairs])
        case Builtin(bound=Bound() as bound):
            clipped = [_clip(leaf, bound) for leaf in flatten(function.parameter, argument)]
            return unflatten(function.result, clipped)
        case Composite():
            return evaluate(function.body, unpacked(function.body, argument), _handlers(casts))
        case ClientProgram() | HostFunction() | Builtin():
            raise DefinitionError(function.name, "it cannot be part of a client program")
        case _:
            flat = [] if function.parameter is None else flatten(function.parameter, argument)
            return unflatten(function.result, function.symbolic(*flat))


def _within(column: Tensor, bound: Bound | None) -> Tensor:
    """Return a column with every value clamped to what is said of the collection."""
    return column if bound is None or column.dtype not in (tf.float32, tf.int32, tf.int64) else _clip(column, bound)


def _clip(tensor: Tensor, bound: Bound) -> Tensor:
    """Return `tensor` within `bound`, whose ends may lie outside of an integer's dtype."""
    if not tensor.dtype.is_integer:
        return tf.clip_by_value(tensor, bound.low, bound.high)
    low = max(int(np.ceil(bound.low)), tensor.dtype.min)
    return tf.clip_by_value(tensor, low, min(int(np.floor(bound.high)), tensor.dtype.max))


def _bounded(tensor: Tensor, bound: Bound) -> Tensor:
    """Return what is to be summed within `bound`; infinity does not become an end of it, but NaN."""
    if tensor.dtype.is_integer:
        return _clip(tensor, bound)
    is_finite = tf.abs(tensor) <= tensor.dtype.max
    return tf.where(is_finite, _clip(tensor, bound), tf.constant(np.nan, tensor.dtype))


def _handlers(casts: Casts) -> dict[Operator, Handler]:
    """Return what each operator does with tensors; casts to whole numbers add what they notice to `casts`."""
    return {
        **local_handlers(lambda function, argument: _apply(function, argument, casts)),
        "literal": lambda step, _: unflatten(step.type, [tf.constant(array) for array in step.value]),
        "sequence_map": lambda step, inputs: _mapped(step.functions[0], inputs[0], casts),
        "sequence_reduce": lambda step, inputs: _folded(step.functions[0], step.type, inputs[0], inputs[1], casts),
        "sequence_sum": lambda step, inputs: _total(inputs[0]),
        "federated_select": lambda step, inputs: _sliced(step, inputs, casts),
    }


def _casts_in_step(source: ClientSource) -> bool:
    functions = [reduction.function for reduction in source.reductions if reduction.function is not None]
    return source.is_collection and (has_casts(source.sequences) or any(map(casts_reals, functions)))


def _casts_in_finish(source: ClientSource) -> bool:
    return has_casts(source.zeros) or has_casts(source.finish)


# --- Ports: what has rank 0 travels as shape [1].


def _values(ports: Iterable[tuple[str, TensorType]], kinds: Sequence[Type], tensors: Tensors) -> list[Any]:
    """Return the values of types `kinds` from the tensors of their ports."""
    flat = iter([tensors[name] for name, _ in ports])
    return [
        unflatten(
            kind, [tf.reshape(next(flat), _dims(leaf)) if not leaf.shape else next(flat) for _, leaf in leaves(kind)]
        )
        for kind in kinds
    ]


def _named(ports: Sequence[tuple[str, TensorType]], found: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        name: tf.identity(tf.reshape(tensor, _dims(kind))) for (name, kind), tensor in zip(ports, found, strict=True)
    }


def _state_ports(source: ClientSource) -> tuple[tuple[str, TensorType], ...]:
    return (*named_ports("kept", source.kept), *_slot_ports("slot", source.slot))


def _slot_ports(prefix: str, slot: Slot | None) -> tuple[tuple[str, TensorType], ...]:
    return () if slot is None else named_ports(prefix, (slot.type,))


def _result_ports(name: str, outputs: Sequence[Output]) -> tuple[tuple[str, TensorType], ...]:
    return tuple((f"{name}_{at}", output.kind) for at, output in enumerate(outputs))


def _ports(named: Iterable[tuple[str, TensorType]]) -> tuple[Port, ...]:
    return tuple(Port(name=name, type=str(kind)) for name, kind in named)


def _client_state(slot: Slot) -> ClientState:
    ports = _slot_ports("client_state", slot)
    initial = {name: np.reshape(value, _dims(kind)) for (name, kind), value in zip(ports, slot.initial, strict=True)}
    return ClientState(
        slot=slot.name,
        version=slot.version,
        ports=_ports(ports),
        initial=encode_tensors(initial),
        maximum_bytes=slot.maximum_bytes,
    )


def _dims(kind: TensorType) -> list[int]:
    return [d or 0 for d in kind.shape]


def _draw(random: np.random.Generator, kind: TensorType, bound: Bound | None, low: float, high: float) -> Array:
    """Return an array of `kind` for the self-test: within `bound`, else floats of [low, high] and integers 0 to 2."""
    shape = _dims(kind)
    if kind.dtype == "bool":
        return random.integers(2, size=shape).astype(bool)
    if kind.numpy_dtype.kind == "f":
        ends = (low, high) if bound is None else (bound.low, bound.high)
        return random.uniform(*ends, size=shape).astype(kind.numpy_dtype)
    first, last = (0, 2) if bound is None else (int(np.ceil(bound.low)), int(np.floor(bound.high)))
    return random.integers(first, max(first, last) + 1, size=shape).astype(kind.numpy_dtype)


def _scalar_port(name: str) -> Port:
    return Port(name=name, type="float32[1]")
