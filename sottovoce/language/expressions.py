"""Computations as data: bodies in single-assignment form, and the local functions that their steps apply.

A body is a list of steps; every step names the operator, the earlier steps it reads (by index), the type of its value
and the author's line. Sharing is explicit, so that lowering is one pass and a body can be saved. Calling a federated
computation inside another copies its steps in: a body holds no calls of federated computations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sottovoce.bundle import Bundle
from sottovoce.language.ports import Bound, Traced
from sottovoce.plan import LaneName, LocalWork
from sottovoce.types import Array, StructType, Type

Operator: TypeAlias = Literal[
    "parameter",
    "literal",
    "struct",
    "select",
    "call",
    "federated_broadcast",
    "federated_map",
    "federated_zip",
    "federated_value",
    "federated_eval",
    "federated_sum",
    "federated_mean",
    "federated_min",
    "federated_max",
    "federated_aggregate",
    "federated_secure_sum",
    "federated_select",
    "sequence_map",
    "sequence_reduce",
    "sequence_sum",
    "client_state_read",
    "client_state_write",
]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the author called an operator.

    Attributes:
        file: The file's name without its folder.
        line: Counted from 1.
        text: The line itself, stripped; "" where it cannot be read.
    """

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Terms:
    """How an aggregation may be encoded for a fleet; every field left None is chosen by lowering.

    Attributes:
        clip_norm: L2 bound over all tensors of one member's value together, applied first.
        half_range: Every coordinate is clamped to [-half_range, half_range].
        weight_cap: Largest weight of one member.
        bits: Width of one coordinate before summation.
        lane: How wide an entry of the masked vector is.
    """

    clip_norm: float | None = None
    half_range: float | None = None
    weight_cap: int | None = None
    bits: int | None = None
    lane: LaneName | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """A named value that a device keeps between rounds (`sv.client_state`).

    Attributes:
        name: Identifier; the device keeps one value under it.
        type: Tensors and structs of them.
        version: Raised by the author when the meaning changes; a device starts anew from `initial` then.
        maximum_bytes: Largest size that the device must keep.
        initial: One array for each leaf of `type`: what a device reads that has written nothing yet.
    """

    name: str
    type: Type
    version: int
    maximum_bytes: int
    initial: tuple[Array, ...]


@dataclass(frozen=True, slots=True)
class Builtin:
    """A function that every executor knows without tracing.

    Attributes:
        name: `cast` (every leaf to the dtype of the result's leaf), `clip` (every coordinate into `bound`) or
            `identity`.
        parameter: Type of its argument.
        result: Type of what it returns.
        bound: Of `clip`.
    """

    name: Literal["cast", "clip", "identity"]
    parameter: Type
    result: Type
    bound: Bound | None = None


@dataclass(frozen=True, slots=True)
class HostFunction:
    """A Python function over numpy values; runs where the program runs, so only at SERVER."""

    name: str
    parameter: Type | None
    result: Type
    call: Callable[..., object]


@dataclass(frozen=True, slots=True)
class ClientProgram:
    """A bundle as a local function of the broadcast and the local examples.

    Attributes:
        name: The bundle's.
        parameter: `<broadcast=<...>,examples=<...>*>`, and `client_state=<...>` between them if the bundle has one.
        result: The bundle's results and metrics by name, `weight` (examples used, int32), and `client_state` if any.
        bundle: The decoded bundle.
        content: Its bytes.
        work: Epochs, batches and which examples.
    """

    name: str
    parameter: StructType
    result: StructType
    bundle: Bundle
    content: bytes
    work: LocalWork


@dataclass(frozen=True, slots=True)
class Step:
    """One value of a body.

    What the operators read:

    | operator | inputs | other fields |
    |---|---|---|
    | parameter | | `name` |
    | literal | | `value` |
    | struct | the elements in order (placed or not); `type` has their names | |
    | select | a struct, or a federated struct (then member by member) | `index`, `name` if it has one |
    | call | the argument, none if the function takes none; nothing is placed | `functions` = (f,) |
    | federated_broadcast | a value at SERVER | |
    | federated_map | a value at CLIENTS or SERVER | `functions` = (f,) |
    | federated_zip | the values in order, all at one placement | |
    | federated_value | a value that is not placed | |
    | federated_eval | | `functions` = (f,) |
    | federated_sum | a value at CLIENTS | `bound`, `terms` |
    | federated_secure_sum | a value at CLIENTS, whole numbers | `bound`, `terms` |
    | federated_mean | a value at CLIENTS, and its weight if it is weighted | `bound`, `terms` |
    | federated_min, federated_max | a value at CLIENTS | |
    | federated_aggregate | a value at CLIENTS, zero (not placed) | `functions` = (accumulate, merge, report) |
    | federated_select | keys `int32[n]` at CLIENTS, a value at SERVER | `functions` = (slice,), `bound` of the keys |
    | sequence_map | a sequence (or a placed one, then member by member) | `functions` = (f,) |
    | sequence_reduce | a sequence, placed or not; zero, not placed | `functions` = (f,) |
    | sequence_sum | a sequence, placed or not | |
    | client_state_read | | `slot` |
    | client_state_write | the new value at CLIENTS; kept though nothing reads it | `slot` |

    Attributes:
        operator: What computes the value.
        inputs: Indices of earlier steps.
        type: The type of the value.
        source: The author's line.
        functions: Local functions.
        name: See the table.
        index: See the table.
        value: One array for each leaf of `type`.
        bound: Declared by the author, for every coordinate; values outside are clamped, on devices and in the
            reference executor alike.
        terms: Encoding that the author asks for.
        slot: See the table.
    """

    operator: Operator
    inputs: tuple[int, ...]
    type: Type
    source: Source
    functions: tuple[LocalFunction, ...] = ()
    name: str = ""
    index: int = 0
    value: tuple[Array, ...] = ()
    bound: Bound | None = None
    terms: Terms = Terms()
    slot: Slot | None = None

    @property
    def where(self) -> str:
        """File, line and operator, as errors begin: `temperature.py:12, federated_sum`."""
        return f"{self.source}, {self.operator}"


@dataclass(frozen=True, slots=True)
class Body:
    """What a computation does.

    Attributes:
        parameters: Name and type of each; the first steps, in the same order, are the `parameter` steps.
        steps: Every step reads only earlier ones.
        result: Index of the step whose value is returned.
    """

    parameters: tuple[tuple[str, Type], ...]
    steps: tuple[Step, ...]
    result: int

    @property
    def parameter(self) -> Type | None:
        """See `parameter_of`."""
        return parameter_of(self.parameters)

    @property
    def result_type(self) -> Type:
        """The type of the result."""
        return self.steps[self.result].type


@dataclass(frozen=True, slots=True)
class Composite:
    """A local function made of steps over values that are not placed.

    Its argument is that of `body.parameter`: with several parameters a struct of them.
    """

    name: str
    body: Body

    @property
    def parameter(self) -> Type | None:
        """The type of its argument, None if it takes none."""
        return self.body.parameter

    @property
    def result(self) -> Type:
        """The type of what it returns."""
        return self.body.result_type


LocalFunction: TypeAlias = Builtin | Composite | ClientProgram | HostFunction | Traced


def parameter_of(parameters: tuple[tuple[str, Type], ...]) -> Type | None:
    """Return the type of the one argument that stands for all: None without any, else itself or a struct by name."""
    if len(parameters) < 2:
        return parameters[0][1] if parameters else None
    return StructType(parameters)


def pruned(body: Body) -> Body:
    """Return `body` without the steps that neither its result nor a write of client state needs."""
    wanted = {body.result, *range(len(body.parameters))}
    wanted |= {at for at, step in enumerate(body.steps) if step.operator == "client_state_write"}
    for at in range(len(body.steps) - 1, -1, -1):
        if at in wanted:
            wanted.update(body.steps[at].inputs)
    moved = {old: new for new, old in enumerate(sorted(wanted))}
    return Body(body.parameters, tuple(_moved(body.steps[at], moved) for at in sorted(wanted)), moved[body.result])


def _moved(step: Step, moved: dict[int, int]) -> Step:
    return dataclasses.replace(step, inputs=tuple(moved[at] for at in step.inputs))
