"""The client program of a computation whose steps at CLIENTS are local functions: written here, made by the Tracer."""

from __future__ import annotations

from collections.abc import Sequence

from sottovoce.errors import DefinitionError
from sottovoce.language.aggregations import names, plain_outputs, weighted_outputs
from sottovoce.language.bounds import elements_of
from sottovoce.language.client_part import (
    ClientSource,
    Flat,
    Output,
    Reduction,
    flattened,
    member_of,
    part,
    reductions_of,
    zero_of,
)
from sottovoce.language.expressions import Slot
from sottovoce.language.parts import ClientWork, Parts
from sottovoce.language.recipes import Recipe
from sottovoce.language.tracing import tracer
from sottovoce.plan import Aggregation, LocalWork
from sottovoce.types import SequenceType, StructType, TensorType, contains
from sottovoce.values import leaves

BATCH_SIZE = 256
"""Examples of a collection that a program takes at once."""
_NAMES = {"federated_sum": "sum", "federated_secure_sum": "sum", "federated_mean": "mean"}
_LATEST = LocalWork(epochs=1, batch_size=1, max_examples=1, order="stored")
_COLLECTION = LocalWork(epochs=1, batch_size=BATCH_SIZE, max_examples=0, order="stored")


def generated_program(parts: Parts, *, description: str) -> ClientWork:
    """Return the client's part of a computation, made into a client program.

    Args:
        parts: The computation, sorted.
        description: One sentence in plain words.

    Raises:
        DefinitionError: It cannot be: nothing is read, sequences and single values are mixed, a sum has no bound.
        ConfigError: TensorFlow is not installed.
    """
    wanted = [at for total in parts.sums for at in parts.step(total).inputs]
    next_states = [parts.step(at).inputs[0] for at in parts.writes] or list(parts.kept[:1])
    columns = columns_of(parts)
    is_collection = _is_collection(parts)
    aggregations, outputs, recipes = _aggregations(parts)
    flat = flattened(parts.body, [*wanted, *next_states], parts.client_entries())
    results = [flat.at[at] for at in (*wanted, *next_states)]
    source = _source(parts, flat, results, columns, outputs, description)
    return ClientWork(
        columns=columns,
        bundle=tracer().client_bundle(source),
        work=_COLLECTION if is_collection else _LATEST,
        aggregations=tuple(aggregations),
        weight_cap=1,
        broadcast=source.broadcast_ports,
        recipes=tuple(recipes),
    )


def columns_of(parts: Parts) -> tuple[tuple[str, TensorType], ...]:
    """Return name and element type of every column: a struct's elements by name, else the parameter's name.

    Raises:
        DefinitionError: Two columns have one name, or a column's shape is not known.
    """
    found: list[tuple[str, TensorType]] = []
    for at in parts.members:
        parameter, kind = parts.body.parameters[at]
        for path, leaf in leaves(elements_of(kind)):
            joined = path.replace(".", "_")
            name = joined if joined and not joined[0].isdigit() else f"{parameter}_{joined}".rstrip("_")
            where = parts.step(at).where
            if None in leaf.shape:
                raise DefinitionError(
                    where, f"{name} is {leaf}; a fleet needs shapes without ?: declare how long it is"
                )
            if leaf.dtype in ("str", "float64", "uint64"):
                raise DefinitionError(
                    where,
                    f"{name} is {leaf}; devices compute with float32, int32, int64 and bool: declare one of those",
                )
            if name in (other for other, _ in found):
                raise DefinitionError(where, f"two columns would be called {name!r}; rename one element or parameter")
            found.append((name, leaf))
    return tuple(found)


def _is_collection(parts: Parts) -> bool:
    """Say whether the members' values are sequences.

    Raises:
        DefinitionError: Some are and some are not, or there are none.
    """
    kinds = [(at, member_of(parts.body.parameters[at][1])) for at in parts.members]
    if not kinds:
        raise DefinitionError(
            parts.step(parts.sums[0] if parts.sums else parts.body.result).where,
            "it reads no values of the devices, and a fleet's devices only answer about examples that they have; add "
            "a parameter {T}@CLIENTS (the newest example) or {T*}@CLIENTS (all of them)",
        )
    found = {isinstance(kind, SequenceType) for _, kind in kinds}
    for at, kind in kinds:
        if isinstance(kind, StructType) and contains(kind, SequenceType):
            raise DefinitionError(
                parts.step(at).where, f"{kind} has a sequence inside; declare a sequence of structs, <a=T,b=U>*"
            )
    if len(found) > 1:
        raise DefinitionError(
            parts.step(kinds[-1][0]).where,
            "one parameter is the newest example and another one all of them, and a round reads either; declare all "
            "parameters as {T*}@CLIENTS, or write two computations",
        )
    return found.pop()


def _slot(parts: Parts) -> Slot | None:
    """Return the client state that is read or written, None without any.

    Raises:
        DefinitionError: There are two.
    """
    steps = [parts.step(at) for at in (*parts.kept, *parts.writes)]
    slots = {slot.name: slot for step in steps if (slot := step.slot) is not None}
    if len(slots) > 1:
        raise DefinitionError(
            steps[-1].where, f"{' and '.join(sorted(slots))} are two slots; keep one, a struct of both values"
        )
    return next(iter(slots.values()), None)


def _aggregations(parts: Parts) -> tuple[list[Aggregation], dict[str, tuple[Output, ...]], list[Recipe]]:
    """Return what is summed, from which leaves of the client part's results, and how values come back from the sums.

    Raises:
        DefinitionError: There is no sum at all, or one has no bound.
    """
    if not parts.sums:
        raise DefinitionError(
            parts.step(parts.writes[0]).where,
            "nothing is summed, so there is no round in which it could be kept; sum something, for example a count",
        )
    aggregations: list[Aggregation] = []
    outputs: dict[str, tuple[Output, ...]] = {}
    recipes = []
    leaf = 0
    for at, name in zip(parts.sums, names(_NAMES[parts.step(at).operator] for at in parts.sums), strict=True):
        step = parts.step(at)
        kind = member_of(step.type)
        bounds = [parts.bounds[i] for i in step.inputs]
        if len(step.inputs) == 1:
            made, ports, summands = plain_outputs(step, name, bounds[0], leaf)
            mean = step.operator == "federated_mean"
            recipes.append(Recipe("mean" if mean else "sum", step.where, kind, summands))
        else:
            ((_, weight_kind),) = leaves(member_of(parts.step(step.inputs[1]).type))
            made, ports, recipe = weighted_outputs(step, name, (bounds[0], bounds[1]), leaf, weight_kind)
            recipes.append(recipe)
        leaf += sum(map(len, bounds))
        aggregations += made
        outputs.update(ports)
    return aggregations, outputs, recipes


def _source(
    parts: Parts,
    flat: Flat,
    results: Sequence[int],
    columns: tuple[tuple[str, TensorType], ...],
    outputs: dict[str, tuple[Output, ...]],
    description: str,
) -> ClientSource:
    rows = [
        (flat.at.get(at), parts.body.parameters[at][0], member_of(parts.body.parameters[at][1])) for at in parts.members
    ]
    broadcast = [
        (flat.at.get(at), f"broadcast_{n}", member_of(parts.step(at).type)) for n, at in enumerate(parts.broadcast)
    ]
    slot = _slot(parts)
    kept = [(flat.at.get(parts.kept[0]) if parts.kept else None, "client_state", slot.type)] if slot else []
    is_collection = _is_collection(parts)
    reduced = reductions_of(flat, [at for at, _, _ in rows if at is not None], results) if is_collection else []
    zeros = [zero_of(flat, at) for at in reduced]
    state = [(at, f"accumulator_{n}", flat.steps[at].type) for n, at in enumerate(reduced)] if is_collection else rows
    return ClientSource(
        name=parts.name,
        description=description,
        broadcast=tuple(kind for _, _, kind in broadcast),
        columns=columns,
        rows=tuple(elements_of(kind) for _, _, kind in rows),
        bounds=tuple(bound for at in parts.members for bound in parts.bounds[at]),
        is_collection=is_collection,
        sequences=part(flat, rows, [flat.steps[at].inputs[0] for at in reduced], otherwise=_ACROSS),
        zeros=part(flat, broadcast, zeros, otherwise=_LATE_ZERO),
        reductions=tuple(Reduction(next(iter(flat.steps[at].functions), None), flat.steps[at].type) for at in reduced),
        slot=slot,
        finish=part(flat, [*state, *broadcast, *kept], results, otherwise=_ACROSS),
        outputs=outputs,
    )


_ACROSS = (
    "it needs a whole collection at once, and a device walks over it batch by batch; reduce it with sv.sequence_sum or "
    "sv.sequence_reduce"
)
_LATE_ZERO = (
    "where a reduction starts must be known before the examples are read: a constant, or a value that is broadcast"
)
