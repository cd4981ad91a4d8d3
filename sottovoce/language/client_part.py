"""The part of a computation that runs on devices, as local bodies that the Tracer makes a client program of.

Flattening turns every step at CLIENTS into one over the value of a single device: `federated_map` becomes a call,
`federated_zip` a struct, a broadcast value a parameter, and a function that holds sequence operators is written out.
A collection is walked batch by batch: each reduction of a sequence becomes an accumulator that `step` carries, and what
follows runs in `finish`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sottovoce.errors import DefinitionError
from sottovoce.language.expressions import Body, Composite, LocalFunction, Slot, Source, Step
from sottovoce.language.ports import Bound
from sottovoce.types import FederatedType, SequenceType, StructType, TensorType, Type, contains
from sottovoce.values import leaves

_SEQUENCE_OPERATORS = ("sequence_map", "sequence_reduce", "sequence_sum")
_NOWHERE = Source("", 0)


@dataclass(frozen=True, slots=True)
class Reduction:
    """One accumulator of a client program over a collection.

    Attributes:
        function: (accumulator, element) -> accumulator; None for the sum.
        kind: The type of the accumulator.
    """

    function: LocalFunction | None
    kind: Type


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor that leaves the program for a sum.

    Attributes:
        leaf: Which leaf of the result of `ClientSource.finish` it is.
        kind: Its type as a port: the aggregation's.
        bound: What its coordinates are clamped to here, before anything else; None leaves it to the encoding, which
            counts what it clamps.
        offset: Subtracted from every coordinate.
        weight: Which leaf it is multiplied by; None for a plain sum.
        weight_bound: What the weight is clamped to.
        weight_cap: What the weight is divided by.
    """

    leaf: int
    kind: TensorType
    bound: Bound | None
    offset: float
    weight: int | None = None
    weight_bound: Bound | None = None
    weight_cap: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSource:
    """A lowered client program before it is made a bundle.

    Attributes:
        name: For people.
        description: One sentence in plain words.
        broadcast: Types of the broadcast values, in order; port `broadcast_I_J` is leaf J of value I.
        columns: Name and type of one element of every column that is read, in the order of the leaves of `rows`.
        rows: Type of one member's value for every parameter at CLIENTS; of a collection, of one element.
        bounds: What is said of each column; its values are clamped to it.
        is_collection: Whether each member's value is a sequence, not a single example.
        sequences: Over the sequences -> a struct of the sequences that are reduced, one for each of `reductions`.
        zeros: Over the broadcast values -> a struct of the accumulators' first values.
        reductions: The accumulators.
        slot: Client state that is read or written.
        finish: Over the rows or accumulators, then the broadcast values, then the slot's value if there is one -> a
            struct of what is summed and, last, the slot's next value.
        outputs: Aggregation name -> its tensors.
    """

    name: str
    description: str
    broadcast: tuple[Type, ...]
    columns: tuple[tuple[str, TensorType], ...]
    rows: tuple[Type, ...]
    bounds: tuple[Bound | None, ...]
    is_collection: bool
    sequences: Body
    zeros: Body
    reductions: tuple[Reduction, ...]
    slot: Slot | None
    finish: Body
    outputs: Mapping[str, tuple[Output, ...]]

    @property
    def broadcast_ports(self) -> tuple[tuple[str, TensorType], ...]:
        """Name and type of every broadcast port."""
        return named_ports("broadcast", self.broadcast)

    @property
    def kept(self) -> tuple[Type, ...]:
        """Types of what goes from step to step: the newest example, or the accumulators."""
        return tuple(reduction.kind for reduction in self.reductions) if self.is_collection else self.rows


def named_ports(prefix: str, kinds: Sequence[Type]) -> tuple[tuple[str, TensorType], ...]:
    """Return name and type of a port for every leaf of `kinds`; what has rank 0 travels as shape [1]."""
    return tuple(
        (f"{prefix}_{value}_{leaf}", kind if kind.shape else TensorType(kind.dtype, (1,)))
        for value, whole in enumerate(kinds)
        for leaf, (_, kind) in enumerate(leaves(whole))
    )


@dataclass(slots=True)
class Flat:
    """The steps at CLIENTS of one computation, over the value of a single device.

    Attributes:
        steps: In order; each reads only earlier ones.
        at: Step of the computation -> step here.
    """

    steps: list[Step] = field(default_factory=list)
    at: dict[int, int] = field(default_factory=dict)

    def add(self, step: Step) -> int:
        """Append `step`, or return the element that it would select."""
        if step.operator == "select":
            source = self.steps[step.inputs[0]]
            if source.operator == "struct":
                return source.inputs[step.index]
        self.steps.append(step)
        return len(self.steps) - 1

    def apply(self, step: Step, function: LocalFunction, argument: int | None) -> int:
        """Append the application of `function`, written out where it holds sequence operators."""
        if isinstance(function, Composite) and _has_sequences(function.body):
            return self._written_out(function.body, argument)
        inputs = () if argument is None else (argument,)
        return self.add(Step("call", inputs, function.result, step.source, functions=(function,)))

    def _written_out(self, body: Body, argument: int | None) -> int:
        at: list[int] = []
        for index, (_, kind) in enumerate(body.parameters):
            assert argument is not None
            select = Step("select", (argument,), kind, body.steps[index].source, index=index)
            at.append(self.add(select) if len(body.parameters) > 1 else argument)
        for step in body.steps[len(body.parameters) :]:
            moved = dataclasses.replace(step, inputs=tuple(at[i] for i in step.inputs))
            if step.operator == "call":
                at.append(self.apply(moved, step.functions[0], moved.inputs[0] if moved.inputs else None))
            else:
                at.append(self.add(moved))
        return at[body.result]


def member_of(kind: Type) -> Type:
    """Return the type of one member's value."""
    return kind.member if isinstance(kind, FederatedType) else kind


def flattened(body: Body, wanted: Sequence[int], entries: Mapping[int, str]) -> Flat:
    """Return the steps that `wanted` (steps at CLIENTS) need, over the value of one device.

    Args:
        body: Of the computation.
        wanted: Its steps whose values are needed.
        entries: Steps whose values come from outside the client's part, and what they are called there.
    """
    needed = set(wanted)
    for at in range(len(body.steps) - 1, -1, -1):
        if at in needed and at not in entries:
            needed.update(body.steps[at].inputs)
    flat = Flat()
    for at in sorted(needed):
        step = body.steps[at]
        if at in entries:
            flat.at[at] = flat.add(Step("parameter", (), member_of(step.type), step.source, name=entries[at]))
        else:
            flat.at[at] = _flatten_step(flat, step)
    return flat


def _flatten_step(flat: Flat, step: Step) -> int:
    inputs = tuple(flat.at[at] for at in step.inputs)
    moved = dataclasses.replace(step, inputs=inputs, type=member_of(step.type))
    match step.operator:
        case "call" | "federated_map" | "federated_eval":
            return flat.apply(moved, step.functions[0], inputs[0] if inputs else None)
        case "struct" | "federated_zip":
            kind = member_of(step.type)
            assert isinstance(kind, StructType)
            unplaced = StructType(tuple((name, member_of(element)) for name, element in kind.elements))
            return flat.add(dataclasses.replace(moved, operator="struct", type=unplaced))
        case "federated_value" | "client_state_write":
            return inputs[0]
        case "literal" | "select" | "sequence_map" | "sequence_reduce" | "sequence_sum" | "federated_select":
            return flat.add(moved)
        case _:
            raise DefinitionError(step.where, "this cannot run on a device")


def part(
    flat: Flat, parameters: Sequence[tuple[int | None, str, Type]], results: Sequence[int], *, otherwise: str
) -> Body:
    """Return the body over `parameters` that computes a struct of the steps `results`.

    Args:
        flat: All steps.
        parameters: The step whose value each parameter is (None where nothing reads it), its name and its type.
        results: Steps of `flat`.
        otherwise: Told where a result needs an entry that is not among the parameters.

    Raises:
        DefinitionError: A result needs such an entry.
    """
    given = {at: position for position, (at, _, _) in enumerate(parameters) if at is not None}
    needed = needed_for(flat, set(results), stop=set(given))
    steps = [Step("parameter", (), kind, _NOWHERE, name=name) for _, name, kind in parameters]
    moved = dict(given)
    for at in sorted(needed - set(given)):
        step = flat.steps[at]
        if step.operator == "parameter":
            raise DefinitionError(step.where, otherwise)
        moved[at] = len(steps)
        steps.append(dataclasses.replace(step, inputs=tuple(moved[i] for i in step.inputs)))
    inputs = tuple(moved[at] for at in results)
    kind = StructType(tuple((None, steps[at].type) for at in inputs))
    steps.append(Step("struct", inputs, kind, _NOWHERE))
    return Body(tuple((name, kind) for _, name, kind in parameters), tuple(steps), len(steps) - 1)


def needed_for(flat: Flat, wanted: set[int], *, stop: set[int] | frozenset[int] = frozenset()) -> set[int]:
    """Return `wanted` and every step that they need, not looking behind those in `stop`."""
    needed = set(wanted)
    for at in range(len(flat.steps) - 1, -1, -1):
        if at in needed and at not in stop:
            needed.update(flat.steps[at].inputs)
    return needed


def reductions_of(flat: Flat, rows: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return the steps that reduce a sequence of the local examples (`rows`) and that `wanted` needs, in order."""
    derived: set[int] = set(rows)
    found = []
    for at, step in enumerate(flat.steps):
        if derived.isdisjoint(step.inputs):
            continue
        if step.operator in ("sequence_reduce", "sequence_sum") and step.inputs[0] in derived:
            found.append(at)
        else:
            derived.add(at)
    needed = needed_for(flat, set(wanted))
    return [at for at in found if at in needed]


def zero_of(flat: Flat, at: int) -> int:
    """Return the step with the first value of the reduction `at`, appending it where it is a sum's."""
    step = flat.steps[at]
    if step.operator == "sequence_reduce":
        return step.inputs[1]
    arrays = tuple(np.zeros([d or 0 for d in kind.shape], kind.numpy_dtype) for _, kind in leaves(step.type))
    return flat.add(Step("literal", (), step.type, step.source, value=arrays))


def _has_sequences(body: Body) -> bool:
    return any(
        step.operator in _SEQUENCE_OPERATORS
        or contains(step.type, SequenceType) is not None
        or any(isinstance(f, Composite) and _has_sequences(f.body) for f in step.functions)
        for step in body.steps
    )
