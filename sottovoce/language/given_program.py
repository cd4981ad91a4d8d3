"""The client work of a computation whose author brings the client program, as a bundle: a model, for example.

The program travels as it is. So what its results are multiplied by or lowered by cannot be added: results are summed
whole, under the bundle's names, and the one weight there is is the number of examples.
"""

from __future__ import annotations

from dataclasses import dataclass

from sottovoce.bundle import Bundle
from sottovoce.errors import DefinitionError
from sottovoce.language.aggregations import bits_and_lane, declared, lane_of_counts, required
from sottovoce.language.client_part import member_of
from sottovoce.language.expressions import ClientProgram, Step
from sottovoce.language.parts import ClientWork, Parts, client_program_of
from sottovoce.language.ports import Bound
from sottovoce.language.recipes import Recipe, Summand, size_of
from sottovoce.plan import Aggregation, Counted, Encoding, LaneName, Quantised
from sottovoce.types import TensorType
from sottovoce.values import leaves

WEIGHT = "weight"
_ONLY = "after a client program, only its results can be summed, as they are"


@dataclass(frozen=True, slots=True)
class _Summed:
    """One aggregation of a client program's result."""

    at: int
    step: Step
    result: str
    kinds: tuple[TensorType, ...]


def given_program(parts: Parts) -> ClientWork:
    """Return the client's part of a computation that maps an author's client program.

    Raises:
        DefinitionError: It does more on the devices than the program and sums of its results, or a sum has no bound.
    """
    at = parts.program()
    assert at is not None
    step, program = parts.step(at), client_program_of(parts.step(at))
    assert program is not None
    _check_inputs(parts, at, program)
    _check_writes(parts, at)
    summed = [_summed(parts, total, at, program) for total in parts.sums]
    if not summed:
        raise DefinitionError(step.where, "nothing of the program is summed, so there would be no round: sum a result")
    weight_cap = _weight_cap(summed)
    made = [_lowered(parts, each, weight_cap) for each in summed]
    aggregations: dict[str, Aggregation] = {}
    for each, (aggregation, _) in zip(summed, made, strict=True):
        if aggregation is not None and aggregations.setdefault(aggregation.name, aggregation) != aggregation:
            raise DefinitionError(
                each.step.where,
                f"{aggregation.name!r} is summed twice with different bounds or terms, and it leaves a device only "
                "once; give both the same",
            )
    if not aggregations:
        raise DefinitionError(step.where, "only the weight of the program is summed; sum one of its results, too")
    bundle = program.bundle
    return ClientWork(
        columns=tuple(
            (port.name, TensorType(port.tensor_type.dtype, port.tensor_type.shape[1:])) for port in bundle.batch
        ),
        bundle=program.content,
        work=program.work,
        aggregations=tuple(aggregations.values()),
        weight_cap=weight_cap or 1,
        broadcast=tuple((port.name, port.tensor_type) for port in bundle.broadcast),
        recipes=tuple(recipe for _, recipe in made),
    )


def _check_inputs(parts: Parts, at: int, program: ClientProgram) -> None:
    """Refuse a program that is not given exactly the broadcast, its own state, and the examples."""
    step = parts.step(at)
    others = [i for i, other in enumerate(parts.body.steps) if i != at and client_program_of(other) is not None]
    if others:
        raise DefinitionError(
            parts.step(others[0]).where, "a device runs one client program a round; write two computations"
        )
    zipped = parts.step(step.inputs[0])
    inputs = zipped.inputs if zipped.operator == "federated_zip" else ()
    expected = len(program.parameter)
    if len(inputs) != expected or inputs[-1] not in parts.members or len(parts.members) != 1:
        raise DefinitionError(
            step.where,
            "give the program its parts as they come: sv.federated_map(program, (broadcast, examples)), where examples "
            "is the one parameter {T*}@CLIENTS" + (", with slot.read() between them" if expected == 3 else ""),
        )
    if inputs[0] not in parts.broadcast or len(parts.broadcast) != 1:
        raise DefinitionError(
            step.where, "what the program is given at CLIENTS must be one sv.federated_broadcast of a value at SERVER"
        )
    kept = program.bundle.client_state
    if expected == 3 and (inputs[1] not in parts.kept or kept is None or _slot_name(parts, inputs[1]) != kept.slot):
        raise DefinitionError(
            step.where, "the program keeps its own slot: read it with sv.client_state_of(program).read()"
        )


def _check_writes(parts: Parts, at: int) -> None:
    for write in parts.writes:
        if _path(parts, parts.step(write).inputs[0], at) != ("client_state",):
            raise DefinitionError(
                parts.step(write).where,
                "a client program's slot keeps what the program returns as client_state, as it is",
            )


def _slot_name(parts: Parts, at: int) -> str:
    slot = parts.step(at).slot
    return slot.name if slot is not None else ""


def _path(parts: Parts, at: int, program: int) -> tuple[str, ...]:
    """Return which element of the program's result step `at` is, () where it is none."""
    found: list[str] = []
    while at != program:
        step = parts.step(at)
        if step.operator != "select":
            return ()
        found.append(step.name or str(step.index))
        at = step.inputs[0]
    return tuple(reversed(found))


def _summed(parts: Parts, at: int, program_at: int, program: ClientProgram) -> _Summed:
    step = parts.step(at)
    path = _path(parts, step.inputs[0], program_at)
    if not path:
        raise DefinitionError(
            step.where, f"{_ONLY}: sv.{step.operator}(found.RESULT), where found is what federated_map returned"
        )
    kinds = tuple(kind for _, kind in leaves(member_of(step.type)))
    ports = _ports(program.bundle, path[0])
    if len(kinds) != len(ports):
        raise DefinitionError(
            step.where, f"{_ONLY}, and {path[0]} has {len(ports)} tensors: sum {path[0]} whole, and select from the sum"
        )
    if len(step.inputs) == 2 and _path(parts, step.inputs[1], program_at) != (WEIGHT,):
        raise DefinitionError(
            step.where,
            "a client program's result can only be weighted by its own number of examples: weight=found.weight",
        )
    return _Summed(at, step, path[0], kinds)


def _ports(bundle: Bundle, name: str) -> tuple[TensorType, ...]:
    results = {result.name: tuple(port.tensor_type for port in result.ports) for result in bundle.results}
    metrics = {port.name: (port.tensor_type,) for port in bundle.metrics}
    return {**metrics, **results, WEIGHT: (TensorType("int32", (1,)),)}.get(name, ())


def _weight_cap(summed: list[_Summed]) -> int | None:
    """Return the plan's cap on one device's weight, None where no weight is used.

    Raises:
        DefinitionError: None is given, or two differ.
    """
    caps: dict[int, _Summed] = {}
    for each in summed:
        is_weight = each.result == WEIGHT
        cap = int(each.step.bound.high) if is_weight and each.step.bound is not None else each.step.terms.weight_cap
        if not is_weight and len(each.step.inputs) == 1:
            continue
        if cap is None or cap < 1:
            how = "bound=(0, most examples)" if is_weight else "weight_cap="
            raise DefinitionError(
                each.step.where,
                f"the number of examples has no bound; say for how many a device may count at most: {how}",
            )
        caps[cap] = each
    if len(caps) > 1:
        raise DefinitionError(
            list(caps.values())[-1].step.where,
            f"a device's weight is capped at {' and at '.join(map(str, sorted(caps)))}; a round has one cap",
        )
    return next(iter(caps), None)


def _lowered(parts: Parts, each: _Summed, weight_cap: int | None) -> tuple[Aggregation | None, Recipe]:
    step, kind = each.step, member_of(each.step.type)
    if each.result == WEIGHT:
        if step.operator == "federated_mean":
            raise DefinitionError(step.where, "sum the weight, and divide the sum by a count at SERVER")
        return None, Recipe("weight", step.where, kind, ())
    bounds = required(step, declared(step, parts.bounds[step.inputs[0]]))
    encoding, lane = _encoding(each, bounds)
    weighted = len(step.inputs) == 2
    aggregation = Aggregation(
        name=each.result,
        tensors=tuple(str(port) for port in each.kinds),
        encoding=encoding,
        weighted=weighted,
        clip_norm=step.terms.clip_norm,
        lane=lane,
    )
    quantum = 2 * encoding.half_range / encoding.maximum if isinstance(encoding, Quantised) else 0.0
    summands = tuple(Summand(each.result, at, 0.0, quantum, bound) for at, bound in enumerate(bounds))
    if weighted:
        return aggregation, Recipe("lane_mean", step.where, kind, summands, weight_cap=weight_cap or 1)
    return aggregation, Recipe("mean" if step.operator == "federated_mean" else "sum", step.where, kind, summands)


def _encoding(each: _Summed, bounds: tuple[Bound, ...]) -> tuple[Encoding, LaneName]:
    """Return one encoding for all tensors of a result."""
    step, size = each.step, sum(kind.size for kind in each.kinds)
    largest = max(size_of(bound) for bound in bounds)
    whole = {kind.numpy_dtype.kind in "iub" for kind in each.kinds}
    if whole == {True}:
        if min(bound.low for bound in bounds) < 0:
            raise DefinitionError(
                step.where, "whole numbers of a client program are summed from 0 on; give bound=(0, largest)"
            )
        return Counted(maximum=max(int(largest), 1)), step.terms.lane or lane_of_counts(int(largest), size)
    bits, lane = bits_and_lane(step.terms, size)
    half_range = step.terms.half_range or (step.terms.clip_norm if step.terms.clip_norm is not None else largest)
    return Quantised(half_range=half_range, bits=bits), lane
