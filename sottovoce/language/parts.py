"""Which steps of a computation run where: before the round, on the devices, in the sum, and after it.

What a fleet cannot do is refused here, with the author's line and what to write instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sottovoce.errors import DefinitionError
from sottovoce.language.bounds import Bounds, infer
from sottovoce.language.client_part import Flat, flattened, member_of, part
from sottovoce.language.expressions import Body, ClientProgram, Step
from sottovoce.language.recipes import Recipe
from sottovoce.plan import Aggregation, LocalWork
from sottovoce.types import CLIENTS, FederatedType, StructType, TensorType, Type

SUMS = ("federated_sum", "federated_secure_sum", "federated_mean")
_COUNT_INSTEAD = (
    "Count with sv.federated_sum how many values lie in each of a few buckets, and read it from the counts. "
    "On lists of values, outside of a fleet, this computation runs as it is"
)
_REFUSED = {
    "federated_min": f"the smallest value is one device's own, and a fleet only tells sums of many. {_COUNT_INSTEAD}",
    "federated_max": f"the largest value is one device's own, and a fleet only tells sums of many. {_COUNT_INSTEAD}",
    "federated_aggregate": "this aggregate is code of its own, and a fleet only adds up. Write it with "
    "sv.federated_sum and sv.federated_mean, and compute the rest from their results at SERVER",
}


@dataclass(frozen=True, slots=True)
class Parts:
    """A body, sorted by where its steps run. Steps are named by their index.

    Attributes:
        name: Of the computation.
        body: What it does.
        bounds: What is known of every step.
        sums: The aggregations.
        writes: The writes of client state.
        members: Parameters that are one value a device.
        given: Parameters that the caller gives: at SERVER, the same for all clients, or without a placement.
        broadcast: Steps at CLIENTS, or needed there, whose values come from the server.
        kept: Reads of client state.
    """

    name: str
    body: Body
    bounds: tuple[Bounds, ...]
    sums: tuple[int, ...]
    writes: tuple[int, ...]
    members: tuple[int, ...]
    given: tuple[int, ...]
    broadcast: tuple[int, ...]
    kept: tuple[int, ...]

    def step(self, at: int) -> Step:
        """Return step `at`."""
        return self.body.steps[at]

    def program(self) -> int | None:
        """Return the step that runs an author's client program, None without one."""
        found = (at for at, step in enumerate(self.body.steps) if client_program_of(step) is not None)
        return next(found, None)

    def before(self) -> Body:
        """Return server_prepare: from the given parameters to a struct of the broadcast values."""
        sources = [self._source_of(at) for at in self.broadcast]
        flat = flattened(self.body, sources, self._given_names())
        results = [flat.at[at] for at in sources]
        return part(flat, self._given_parameters(flat), results, otherwise="its value is not known before the round")

    def after(self) -> Body:
        """Return server_result: from the given parameters and the aggregated values to a struct of the result alone."""
        entries = {**self._given_names(), **{at: f"sum_{number}" for number, at in enumerate(self.sums)}}
        flat = flattened(self.body, [self.body.result], entries)
        summed = [(flat.at.get(at), entries[at], member_of(self.step(at).type)) for at in self.sums]
        parameters = [*self._given_parameters(flat), *summed]
        return part(flat, parameters, [flat.at[self.body.result]], otherwise="its value never leaves the devices")

    def client_entries(self) -> dict[int, str]:
        """Return the steps whose values come from outside the client's part, and their names there."""
        return {
            **{at: self.body.parameters[at][0] for at in self.members},
            **{at: f"broadcast_{number}" for number, at in enumerate(self.broadcast)},
            **dict.fromkeys(self.kept, "client_state"),
        }

    def _source_of(self, at: int) -> int:
        step = self.step(at)
        return step.inputs[0] if step.operator == "federated_broadcast" else at

    def _given_parameters(self, flat: Flat) -> list[tuple[int | None, str, Type]]:
        return [
            (flat.at.get(at), name, member_of(kind)) for at in self.given for name, kind in (self.body.parameters[at],)
        ]

    def _given_names(self) -> dict[int, str]:
        return {at: self.body.parameters[at][0] for at in self.given}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientWork:
    """What the devices do and what is summed, lowered.

    Attributes:
        columns: Name and element type of every column that is read.
        bundle: The client program; empty where there is nothing to do on devices.
        work: How it walks over the examples.
        aggregations: What is summed.
        weight_cap: Largest weight of one device.
        broadcast: Name and type of every broadcast port.
        recipes: How each aggregation's value comes from the sums.
    """

    columns: tuple[tuple[str, TensorType], ...]
    bundle: bytes
    work: LocalWork
    aggregations: tuple[Aggregation, ...]
    weight_cap: int
    broadcast: tuple[tuple[str, TensorType], ...]
    recipes: tuple[Recipe, ...]


NO_WORK = ClientWork(columns=(), bundle=b"", work=LocalWork(), aggregations=(), weight_cap=1, broadcast=(), recipes=())
"""Of a computation that needs no devices."""


def sort_parts(name: str, body: Body, parameters: Sequence[Bounds]) -> Parts:
    """Return the steps of `body`, sorted.

    Args:
        name: Of the computation.
        body: What it does.
        parameters: What is known of each parameter.

    Raises:
        DefinitionError: A fleet cannot do it; the text names operator, line and cure.
    """
    _refuse_operators(body)
    sums = tuple(at for at, step in enumerate(body.steps) if step.operator in SUMS)
    _refuse_dependent(body, sums)
    _refuse_result(body)
    members = tuple(at for at in range(len(body.parameters)) if _is_member(body.parameters[at][1]))
    return Parts(
        name=name,
        body=body,
        bounds=tuple(infer(body, parameters)),
        sums=sums,
        writes=tuple(at for at, step in enumerate(body.steps) if step.operator == "client_state_write"),
        members=members,
        given=tuple(at for at in range(len(body.parameters)) if at not in members),
        broadcast=_broadcast(body, sums),
        kept=tuple(at for at, step in enumerate(body.steps) if step.operator == "client_state_read"),
    )


def client_program_of(step: Step) -> ClientProgram | None:
    """Return the author's client program that `step` runs, None if it runs none."""
    return next((f for f in step.functions if isinstance(f, ClientProgram)), None)


def at_clients(kind: Type) -> bool:
    """Say whether `kind` is at CLIENTS, or is a struct with an element there."""
    if isinstance(kind, StructType):
        return any(at_clients(element) for _, element in kind.elements)
    return isinstance(kind, FederatedType) and kind.placement is CLIENTS


def _is_member(kind: Type) -> bool:
    return isinstance(kind, FederatedType) and kind.placement is CLIENTS and not kind.all_equal


def _broadcast(body: Body, sums: tuple[int, ...]) -> tuple[int, ...]:
    """Return what the client part needs of the server: broadcasts, and parameters that are the same for all."""
    needed = {at for total in sums for at in body.steps[total].inputs}
    needed |= {at for at, step in enumerate(body.steps) if step.operator == "client_state_write"}
    found = set()
    for at in range(len(body.steps) - 1, -1, -1):
        step = body.steps[at]
        if at not in needed:
            continue
        is_given = step.operator == "parameter" and not _is_member(step.type)
        if is_given or step.operator == "federated_broadcast":
            found.add(at)
        elif step.operator == "federated_select":
            needed.add(step.inputs[0])
            found.add(step.inputs[1])
        else:
            needed.update(step.inputs)
    return tuple(sorted(found))


def _refuse_operators(body: Body) -> None:
    for step in body.steps:
        if step.operator in _REFUSED:
            raise DefinitionError(step.where, _REFUSED[step.operator])


def _refuse_dependent(body: Body, sums: tuple[int, ...]) -> None:
    """Refuse an aggregation of what another one brought: that takes two rounds."""
    after: dict[int, int] = {}
    for at, step in enumerate(body.steps):
        earlier = next((after[i] for i in step.inputs if i in after), None)
        if at in sums:
            if earlier is not None:
                raise DefinitionError(
                    step.where,
                    f"what is summed here needs the result of {body.steps[earlier].where}, and one computation is one "
                    "round. Write a federated program: one computation a round, and give the second one the result "
                    "of the first as an argument at SERVER",
                )
            after[at] = at
        elif earlier is not None:
            after[at] = earlier
            if step.operator == "client_state_write":
                raise DefinitionError(
                    step.where,
                    f"what is kept here needs the result of {body.steps[earlier].where}, which devices do not have "
                    "yet. Write a federated program: broadcast that result in the next round",
                )


def _refuse_result(body: Body) -> None:
    if at_clients(body.result_type):
        raise DefinitionError(
            body.steps[body.result].where,
            f"the result is {body.result_type}, and single values never leave their devices. Return what you want to "
            "know of all of them together, as sv.federated_mean or sv.federated_sum of it",
        )
