"""What the language asks of others: a tracer for local functions, an executor, rounds on a fleet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sottovoce.blobs import Document
from sottovoce.errors import ConfigError
from sottovoce.plan import Aggregation, Extraction, LocalWork, ParticipationTerms
from sottovoce.types import Array, Type

if TYPE_CHECKING:
    from sottovoce.language.computations import Computation
    from sottovoce.language.lowering import ClientSource


@dataclass(frozen=True, slots=True)
class Bound:
    """An interval that every coordinate of a value lies in.

    Attributes:
        low: Smallest value, in the value's own units, finite.
        high: Largest value, finite, not below `low`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ConfigError(f"a bound needs finite numbers, the lower one first, not ({self.low}, {self.high})")

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


class Traced(Protocol):
    """A local function that the Tracer has traced, with types known.

    Values cross as flat lists: one array for each leaf of `parameter` and `result`, in the order of
    `sottovoce.values.leaves`.
    """

    @property
    def name(self) -> str:
        """The author's name for it, used in errors and in the words of `plan()`."""

    @property
    def parameter(self) -> Type | None:
        """The type of its one argument, None if it takes none; several arguments are a struct."""

    @property
    def result(self) -> Type:
        """The type of what it returns."""

    def __call__(self, *arrays: Array) -> list[Array]:
        """Run it on arrays, one for each leaf of `parameter`, and return one for each leaf of `result`."""

    def symbolic(self, *tensors: object) -> list[object]:
        """Apply it to the tensors of a graph that is being traced, leaf by leaf."""

    def output_bounds(self, inputs: Sequence[Bound | None]) -> tuple[Bound | None, ...]:
        """Return what is known of each leaf of the result, given what is known of each leaf of the parameter."""


class Tracer(Protocol):
    """Turns authors' functions over tensors into data. `models.tracer` has the one for TensorFlow."""

    def trace(self, function: Callable[..., object], parameter: Type | None, *, name: str) -> Traced:
        """Trace `function` and return it with its result type.

        Args:
            function: Takes nothing if `parameter` is None, else ONE argument: a symbolic tensor where the type is a
                tensor, a `Record` by name or a tuple where it is a struct. Returns tensors, mappings and tuples.
            parameter: The type of the argument.
            name: The author's name for it.

        Raises:
            DefinitionError: The function failed on symbolic tensors, or returned what is no tensor.
        """

    def client_bundle(self, source: ClientSource) -> bytes:
        """Return the bundle (`.svp`) of a lowered client program, self-test included."""

    def flatbuffer(self, traced: Traced) -> bytes:
        """Return `traced` as a TFLite flatbuffer, so that a saved computation runs it without TensorFlow."""


class Executor(Protocol):
    """Where computations run."""

    def run(self, computation: Computation, arguments: Mapping[str, object]) -> object:
        """Run `computation` and return its result.

        Args:
            computation: A federated computation, or a local one (no placements in its types).
            arguments: Each parameter's value by name, as `sottovoce.values.to_value` returns it: arrays (rank 0: numpy
                scalars), `Record`s and tuples, lists for sequences; `{T}@CLIENTS` a tuple of one value a member, or a
                `DeviceValues` (`sv.latest`, `sv.collection`).

        Returns:
            The value in the same form.
        """


class RoundRequest(Document, frozen=True):
    """One round that a lowered computation asks of a fleet.

    Attributes:
        key: The same key asked again gets the same answer and never a second round; "" has none.
        name: The plan's name: round numbers grow per fleet and name.
        purpose: What it is for, in words a device's owner understands.
        collection: The collection of local examples that the client program reads.
        bundle: The client program (`.svp`).
        work: Epochs, batches and which examples.
        aggregations: What is summed.
        weight_cap: Largest weight of one device.
        broadcast: Named tensors (`sottovoce.tensors`), one for each broadcast port.
        members: Named tensors of examples, one for each device, where the arguments were lists. For the simulation
            only: real devices hold their own values.
        extraction: How messages become the program's rows; None for a collection of numbers.
        threshold: As `PrivacyTerms.threshold`.
        participation: As `PrivacyTerms.participation`.
        publish: As `Plan.publish`.
    """

    key: str
    name: str
    purpose: str
    collection: str
    bundle: bytes
    work: LocalWork
    aggregations: tuple[Aggregation, ...]
    weight_cap: int
    broadcast: bytes
    members: tuple[bytes, ...] = ()
    extraction: Extraction | None = None
    threshold: int = 0
    participation: ParticipationTerms = ParticipationTerms()
    publish: bool = False


@dataclass(frozen=True, slots=True)
class RoundSums:
    """What a committed round brought.

    Attributes:
        sums: Aggregation name -> one array a tensor: the plain sum over the survivors; of a weighted aggregation the
            weighted mean, as `sottovoce.secagg.encoding` gives it.
        weight: Sum of the survivors' weights, each capped.
        survivors: Devices in the sum.
        clamped: Entries that devices had to clamp.
        round: The round's number.
    """

    sums: Mapping[str, list[Array]]
    weight: int
    survivors: int
    clamped: int
    round: int


class Rounds(Protocol):
    """A fleet that runs rounds: simulated or behind a running coordinator."""

    def run(self, request: RoundRequest) -> RoundSums:
        """Run the round that `request` asks for and return its sums.

        Raises:
            RoundAbandoned: The round ended without a result; the text says why.
        """
