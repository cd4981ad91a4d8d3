"""From the language's lowered client part to a bundle: `begin`, `step` and `finish` over named tensors.

The newest example is kept by `step` as it is, and everything is computed in `finish`; so `begin` and `step` are the
same for all computations that read the same types, and are converted once. Over a collection `step` carries the
accumulators: elements are mapped all at once, sums are taken over the batch, and other reductions walk it in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from models.export import ProgramSource, Tensors, export, run_with_tensorflow, seed_of
from models.ops import Tensor
from sottovoce.bundle import NEXT, Bundle, ClientState, Port, Result, RoleName
from sottovoce.errors import BadBundle, DefinitionError
from sottovoce.language.client_part import ClientSource, Output, named_ports
from sottovoce.language.expressions import Builtin, ClientProgram, Composite, HostFunction, LocalFunction, Slot, Step
from sottovoce.language.interpreter import evaluate, local_handlers, unpacked
from sottovoce.language.ports import Bound
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array, TensorType, Type
from sottovoce.values import flatten, leaves, unflatten

_TEST_BATCHES = (3, 1, 4)
_TEST_RANGES = ((0.1, 1.0), (1.0, 2.0), (-1.0, 1.0))
"""Where the self-test's numbers are drawn; the first range in which the program gives finite results is taken."""
_TOLERANCE = 1e-4


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
                return export(program, quickly=True)
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
        results=tuple(
            Result(name=name, ports=_ports(_result_ports(name, outputs))) for name, outputs in source.outputs.items()
        ),
        initial=broadcast,
        test_broadcast={},
        test_batches=batches,
        reference=lambda arrays, given: run_with_tensorflow(functions, arrays, given, client_state=kept),
        tolerance=_TOLERANCE,
        client_state=None if slot is None else _client_state(slot),
        test_client_state=kept,
    )


def _begin(source: ClientSource, tensors: Tensors) -> Tensors:
    """Return the first state: accumulators at their zero, or an empty place for the newest example."""
    given = _values(source.broadcast_ports, source.broadcast, tensors)
    if source.is_collection:
        first = flatten(source.zeros.result_type, evaluate(source.zeros, given, _HANDLERS))
    else:
        first = [tf.zeros(_dims(kind), kind.dtype) for row in source.rows for _, kind in leaves(row)]
    passed = [tensors[name] for name, _ in _slot_ports("client_state", source.slot)]
    return _named(_state_ports(source), [*first, *passed])


def _step(source: ClientSource, tensors: Tensors) -> Tensors:
    pairs = zip(source.columns, source.bounds, strict=True)
    columns = [_within(tensors[name], bound) for (name, _), bound in pairs]
    kept = _reduced(source, columns, tensors) if source.is_collection else [column[-1] for column in columns]
    passed = [tensors[name] for name, _ in _slot_ports("slot", source.slot)]
    return _named(_state_ports(source), [*kept, *passed])


def _finish(source: ClientSource, tensors: Tensors) -> Tensors:
    state = _values(named_ports("kept", source.kept), source.kept, tensors)
    given = _values(source.broadcast_ports, source.broadcast, tensors)
    slot = source.slot
    own = [] if slot is None else _values(_slot_ports("slot", slot), (slot.type,), tensors)
    found = flatten(source.finish.result_type, evaluate(source.finish, [*state, *given, *own], _HANDLERS))
    named: dict[str, Tensor] = {}
    for name, outputs in source.outputs.items():
        ports = _result_ports(name, outputs)
        named.update(_named(ports, [_summand(output, found) for output in outputs]))
    if slot is not None:
        ports = _slot_ports(f"{NEXT}client_state", slot)
        named.update(_named(ports, found[len(found) - len(ports) :]))
    return named


def _reduced(source: ClientSource, columns: Sequence[Tensor], tensors: Tensors) -> list[Tensor]:
    """Return the accumulators after one batch."""
    rest = iter(columns)
    rows = [Rows(kind, tuple(next(rest) for _ in leaves(kind))) for kind in source.rows]
    sequences = evaluate(source.sequences, rows, _HANDLERS)
    before = _values(named_ports("kept", source.kept), source.kept, tensors)
    found: list[Tensor] = []
    for reduction, sequence, accumulator in zip(source.reductions, sequences, before, strict=True):
        if reduction.function is None:
            pairs = zip(flatten(reduction.kind, accumulator), sequence.leaves, strict=True)
            found += [total + tf.reduce_sum(column, axis=0) for total, column in pairs]
        else:
            after = _folded(reduction.function, reduction.kind, sequence, accumulator)
            found += flatten(reduction.kind, after)
    return found


def _summand(output: Output, found: Sequence[Tensor]) -> Tensor:
    """Return what leaves the program: the value, or value times weight, minus its offset."""
    value, dtype = tf.cast(found[output.leaf], output.kind.dtype), tf.as_dtype(output.kind.dtype)
    value = value if output.bound is None else _clip(value, output.bound)
    if output.weight is not None and output.weight_bound is not None:
        weight = _clip(tf.reshape(tf.cast(found[output.weight], dtype), []), output.weight_bound)
        value = value * (weight / tf.constant(output.weight_cap, dtype))
    offset = int(output.offset) if dtype.is_integer else output.offset
    return value - tf.constant(offset, dtype) if offset else value


def _folded(function: LocalFunction, kind: Type, rows: Rows, zero: Any) -> Any:
    """Return `zero` folded with every row in order."""
    count = tf.shape(rows.leaves[0])[0]

    def body(at: Tensor, *accumulator: Tensor) -> list[Tensor]:
        element = unflatten(rows.element, [leaf[at] for leaf in rows.leaves])
        folded = _apply(function, (unflatten(kind, accumulator), element))
        return [at + 1, *flatten(kind, folded)]

    loop = [tf.constant(0), *map(tf.convert_to_tensor, flatten(kind, zero))]
    return unflatten(kind, tf.while_loop(lambda at, *_: at < count, body, loop)[1:])


def _mapped(function: LocalFunction, rows: Rows) -> Rows:
    """Return `function` of every row, all at once."""

    def of_one(row: Sequence[Tensor]) -> list[Tensor]:
        return [tf.identity(leaf) for leaf in flatten(function.result, _apply(function, unflatten(rows.element, row)))]

    return Rows(function.result, tuple(tf.vectorized_map(of_one, list(rows.leaves))))


def _sliced(step: Step, inputs: list[Any]) -> Rows:
    """Return the slices of a broadcast value that the keys ask for."""
    keys, whole = inputs
    function, bound = step.functions[0], step.bound
    assert bound is not None
    allowed = tf.clip_by_value(keys, int(bound.low), int(bound.high))

    def of_one(key: Tensor) -> list[Tensor]:
        return [tf.identity(leaf) for leaf in flatten(function.result, _apply(function, (whole, key)))]

    return Rows(function.result, tuple(tf.vectorized_map(of_one, allowed)))


def _total(rows: Rows) -> Any:
    return unflatten(rows.element, [tf.reduce_sum(leaf, axis=0) for leaf in rows.leaves])


def _apply(function: LocalFunction, argument: Any) -> Any:
    """Return what `function` makes of tensors; see `sottovoce.language.interpreter.apply` for arrays."""
    match function:
        case Builtin(name="identity"):
            return argument
        case Builtin(name="cast"):
            targets = [kind.dtype for _, kind in leaves(function.result)]
            pairs = zip(flatten(function.parameter, argument), targets, strict=True)
            return unflatten(function.result, [tf.cast(leaf, dtype) for leaf, dtype in pairs])
        case Builtin(bound=Bound() as bound):
            clipped = [_clip(leaf, bound) for leaf in flatten(function.parameter, argument)]
            return unflatten(function.result, clipped)
        case Composite():
            return evaluate(function.body, unpacked(function.body, argument), _HANDLERS)
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


_HANDLERS = {
    **local_handlers(_apply),
    "literal": lambda step, _: unflatten(step.type, [tf.constant(array) for array in step.value]),
    "sequence_map": lambda step, inputs: _mapped(step.functions[0], inputs[0]),
    "sequence_reduce": lambda step, inputs: _folded(step.functions[0], step.type, *inputs),
    "sequence_sum": lambda step, inputs: _total(inputs[0]),
    "federated_select": _sliced,
}


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
