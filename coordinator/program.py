"""The federated program of a task, pure: which plan comes next, and what a round's sum makes of the state.

A task is a row of steps. `standardise` is one round of a moments program; `train` is one round of federated averaging
(McMahan et al. 2017) and is repeated; `sum` releases plain sums once. The state between two steps is the broadcast of
the next step, named tensors; together with the number of committed steps it is all that a restart needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from coordinator.task import UNCAPPED_WEIGHT, SumTerms, Task
from sottovoce.bundle import Bundle, Port, decode_bundle
from sottovoce.errors import ConfigError, LocalProtocolError, RoundAbandoned, SottovoceError
from sottovoce.plan import (
    DEFAULT_CHUNK_BYTES,
    Aggregation,
    LaneName,
    LocalWork,
    Plan,
    PrivacyTerms,
    Quantised,
    blob_ref,
    check_plan,
)
from sottovoce.secagg.lanes import Aggregate, layout_of
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array, TensorType

Tensors: TypeAlias = Mapping[str, Array]
StepName: TypeAlias = Literal["standardise", "train", "sum"]
_MOMENTS = ("count", "sum", "sum_of_squares")
_LEARNING_RATE = "learning_rate"


@dataclass(frozen=True, slots=True)
class FederatedProgram:
    """A task with its bundles, checked; made by `build_program`.

    Attributes:
        task: As the operator wrote it.
        bundle: The task's own bundle.
        plan: The plan of its rounds.
        moments_plan: The plan of the standardising round, or None.
        initial: The task's first broadcast, before any round.
    """

    task: Task
    bundle: Bundle
    plan: Plan
    moments_plan: Plan | None
    initial: Tensors

    @property
    def length(self) -> int:
        """How many rounds must commit until the task is done."""
        return self.task.rounds + (self.moments_plan is not None)

    def step_at(self, position: int) -> StepName:
        """Return what round `position` (0-based, counting committed rounds) does."""
        if self.moments_plan is not None and position == 0:
            return "standardise"
        return "train" if self.task.update is not None else "sum"

    def plan_at(self, position: int) -> Plan:
        """Return the plan of round `position`."""
        if self.step_at(position) == "standardise" and self.moments_plan is not None:
            return self.moments_plan
        return self.plan

    @property
    def first_state(self) -> Tensors:
        """The broadcast of round 0."""
        return {} if self.moments_plan is not None else self.initial


@dataclass(frozen=True, slots=True)
class Advance:
    """What a committed round gives.

    Attributes:
        state: The broadcast of the next round, or the trained state after the last.
        metrics: Numbers for people: examples, clamped, and per metric its mean over the examples.
        released: The sums that the task was for, named tensors; empty for training.
    """

    state: Tensors
    metrics: dict[str, float]
    released: Tensors


def build_program(
    task: Task,
    bundle: bytes,
    *,
    fleet: str,
    moments: bytes | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> FederatedProgram:
    """Return the federated program of `task`, after checking that task and bundles fit together.

    Args:
        task: The task.
        bundle: Content of the bundle file that the task names.
        fleet: Name of the fleet.
        moments: Content of the bundle that `standardise` names, if there is such a table.
        chunk_bytes: Largest piece of a blob.

    Raises:
        ConfigError: They do not fit together; the text names the key and says what to write.
        BadBundle: One of the bundles is not one.
    """
    parsed = decode_bundle(bundle)
    aggregations = _aggregations(task, parsed)
    cap = task.update.weight_cap if task.update else UNCAPPED_WEIGHT
    plan = _plan(task, bundle, aggregations, fleet=fleet, name=task.name, weight_cap=cap, chunk_bytes=chunk_bytes)
    initial = _initial(task, parsed)
    moments_plan = None
    if task.standardise is not None:
        if moments is None:
            raise LocalProtocolError("a task with a standardise table needs its moments bundle")
        moments_plan = _moments_plan(task, moments, initial, fleet=fleet, chunk_bytes=chunk_bytes)
    return FederatedProgram(task, parsed, plan, moments_plan, initial)


def apply(program: FederatedProgram, position: int, state: Tensors, aggregate: Aggregate) -> Advance:
    """Return what round `position` makes of `state`, given the sum over its survivors.

    Raises:
        RoundAbandoned: The sum gives no usable state (a moment of nothing, NaN after averaging).
    """
    plan = program.plan_at(position)
    metrics = _metrics(plan, program, aggregate)
    match program.step_at(position):
        case "standardise":
            return Advance(_standardised(program, aggregate), metrics, {})
        case "train":
            return Advance(_averaged(program, state, aggregate), metrics, {})
        case "sum":
            return Advance(state, metrics, _released(program, aggregate))


def _averaged(program: FederatedProgram, state: Tensors, aggregate: Aggregate) -> Tensors:
    """FedAvg: add the weighted mean of the updates, times the server's learning rate, to what they update."""
    rate = program.task.optimizer.server_learning_rate
    changed = dict(state)
    for result in program.bundle.results:
        for target, mean in zip(result.updates, aggregate.mean(result.name), strict=bool(result.updates)):
            changed[target] = (state[target] + rate * mean).astype(state[target].dtype)
            if not np.isfinite(changed[target]).all():
                raise RoundAbandoned("not_finite", f"{target} is not finite after averaging; lower the learning rates")
    return changed


def _standardised(program: FederatedProgram, aggregate: Aggregate) -> Tensors:
    """Fill the ports `mean` and `std` from the moments; a feature that never varies gets std 1."""
    count, total, squares = (aggregate.sums[name][0] for name in _MOMENTS)
    if count[0] < 1:
        raise RoundAbandoned("no_examples", "the moments program counted nothing")
    mean = total / count[0]
    variance = squares / count[0] - mean**2
    std = np.sqrt(np.where(variance > 0, variance, 1.0))
    return {**program.initial, "mean": mean.astype(np.float32), "std": std.astype(np.float32)}


def _released(program: FederatedProgram, aggregate: Aggregate) -> Tensors:
    named = [
        (port.name, value)
        for r in program.bundle.results
        for port, value in _port_values(r.ports, aggregate.sums[r.name])
    ]
    return dict(named)


def _port_values(ports: tuple[Port, ...], values: list[Array]) -> list[tuple[Port, Array]]:
    return list(zip(ports, values, strict=True))


def _metrics(plan: Plan, program: FederatedProgram, aggregate: Aggregate) -> dict[str, float]:
    """Return totals, and each collected metric of the bundle divided by the number of examples."""
    names = {port.name for port in program.bundle.metrics} & {a.name for a in plan.aggregations}
    means = {name: float(aggregate.sums[name][0].sum()) / aggregate.weight for name in sorted(names)}
    return {"examples": float(aggregate.weight), "clamped": float(aggregate.clamped), **means}


# --- from a task to plans ---------------------------------------------------------------------------------------------


def _plan(
    task: Task,
    bundle: bytes,
    aggregations: tuple[Aggregation, ...],
    *,
    fleet: str,
    name: str,
    weight_cap: int,
    chunk_bytes: int,
) -> Plan:
    work = LocalWork(epochs=task.work.epochs, batch_size=task.work.batch_size, max_examples=task.work.max_examples)
    plan = Plan(
        fleet=fleet,
        name=name,
        collection=task.collection,
        program=blob_ref(bundle, chunk_bytes=chunk_bytes),
        work=work,
        aggregations=aggregations,
        privacy=PrivacyTerms(purpose=task.purpose, minimum_cohort=task.cohort.minimum, weight_cap=weight_cap),
    )
    check_plan(plan)
    layout_of(plan, maximum_clients=task.cohort.wanted)
    return plan


def _aggregations(task: Task, bundle: Bundle) -> tuple[Aggregation, ...]:
    updates = [result for result in bundle.results if result.updates]
    sums = [result for result in bundle.results if not result.updates]
    if updates and task.update is None:
        raise ConfigError(
            f"update: bundle {bundle.name!r} trains a model; add the table [update] with clip_norm, "
            "half_range and weight_cap"
        )
    if not updates and (task.update is not None or task.rounds != 1):
        raise ConfigError(
            f"bundle {bundle.name!r} only sums and updates no model; leave out [update] and set rounds = 1"
        )
    if unknown := set(task.metrics) - {port.name for port in bundle.metrics}:
        raise ConfigError(_no_such("metrics", unknown, [port.name for port in bundle.metrics], bundle))
    if unknown := set(task.results) - {result.name for result in sums}:
        raise ConfigError(_no_such("results", unknown, [result.name for result in sums], bundle))
    return (
        *(_update_aggregation(task, result.name, result.ports) for result in updates),
        *(_sum_aggregation(task, "results", result.name, result.ports, task.results) for result in sums),
        *(
            _sum_aggregation(task, "metrics", p.name, (p,), task.metrics)
            for p in bundle.metrics
            if p.name in task.metrics
        ),
    )


def _no_such(table: str, unknown: set[str], known: list[str], bundle: Bundle) -> str:
    return (
        f"{table}.{sorted(unknown)[0]}: bundle {bundle.name!r} has no such name; "
        f"it has {', '.join(known) if known else 'none'}"
    )


def _update_aggregation(task: Task, name: str, ports: tuple[Port, ...]) -> Aggregation:
    update = task.update
    if update is None:
        raise LocalProtocolError("an update needs its terms")
    return Aggregation(
        name=name,
        tensors=tuple(port.type for port in ports),
        encoding=Quantised(half_range=update.half_range, bits=update.bits),
        weighted=True,
        clip_norm=update.clip_norm,
        lane=update.lane,
    )


def _sum_aggregation(
    task: Task, table: str, name: str, ports: tuple[Port, ...], terms: Mapping[str, SumTerms]
) -> Aggregation:
    if name not in terms:
        raise ConfigError(f"{table}.{name}: say how it is encoded: maximum, or half_range and bits")
    encoding = terms[name].encoding(f"{table}.{name}")
    fits: LaneName = "uint32" if task.cohort.wanted * encoding.maximum < 2**32 else "uint64"
    return Aggregation(
        name=name,
        tensors=tuple(port.type for port in ports),
        encoding=encoding,
        clip_norm=terms[name].clip_norm,
        lane=fits,
    )


def _initial(task: Task, bundle: Bundle) -> Tensors:
    """Return the bundle's initial broadcast with the task's learning rate, in the order of the ports."""
    try:
        given = decode_tensors(bundle.initial)
        ordered = {port.name: given[port.name] for port in bundle.broadcast}
    except (SottovoceError, KeyError) as error:
        raise ConfigError(f"bundle {bundle.name!r} has no initial value for every broadcast port: {error}") from error
    for port in bundle.broadcast:
        if not port.tensor_type.admits(ordered[port.name]):
            raise ConfigError(f"bundle {bundle.name!r}: the initial value of {port.name!r} is not {port.type}")
    rate = task.optimizer.learning_rate
    if rate is None:
        return ordered
    if _LEARNING_RATE not in ordered:
        raise ConfigError(f"optimizer.learning_rate: bundle {bundle.name!r} has no port {_LEARNING_RATE!r}; remove it")
    return {**ordered, _LEARNING_RATE: np.full_like(ordered[_LEARNING_RATE], rate)}


def _moments_plan(task: Task, content: bytes, initial: Tensors, *, fleet: str, chunk_bytes: int) -> Plan:
    terms = task.standardise
    if terms is None:
        raise LocalProtocolError("no standardise table")
    bundle = decode_bundle(content)
    ports = {result.name: result.ports for result in bundle.results}
    if set(ports) != set(_MOMENTS) or any(len(each) != 1 for each in ports.values()) or bundle.broadcast:
        raise ConfigError(
            f"standardise.bundle: {bundle.name!r} is not a moments program; it must broadcast nothing "
            f"and return {', '.join(_MOMENTS)}"
        )
    for name in ("mean", "std"):
        if name not in initial:
            raise ConfigError(f"standardise: the task's bundle has no broadcast port {name!r}; remove the table")
        if TensorType.parse(ports["sum"][0].type).shape != initial[name].shape:
            raise ConfigError(
                f"standardise.bundle: it sums {ports['sum'][0].type}, but {name!r} is {initial[name].shape}"
            )
    if unknown := set(terms.results) - set(_MOMENTS):
        raise ConfigError(_no_such("standardise.results", unknown, list(_MOMENTS), bundle))
    aggregations = tuple(
        _sum_aggregation(task, "standardise.results", name, ports[name], terms.results) for name in _MOMENTS
    )
    name = f"{task.name}-moments"
    return _plan(
        task, content, aggregations, fleet=fleet, name=name, weight_cap=UNCAPPED_WEIGHT, chunk_bytes=chunk_bytes
    )
