"""Federated averaging, as computations of this language (McMahan et al. 2017; server optimizers of Reddi et al. 2021).

`build_fed_avg` returns two computations: `initialize`, the server's first state, and `next`, one round of training.
A program loops over them, anywhere the language runs:

    process = learning.build_fed_avg("har.svp", ClientOptimizer(0.08), server_optimizer.adam(0.01))
    state = process.initialize()
    for _ in range(20):
        state, metrics = process.next(state, sv.collection("har"))

The server's state is a struct: `model`, everything that is broadcast but the learning rate; `optimizer`, the server
optimizer's own tensors, which no device sees; `round`, how many rounds have been averaged. Only the broadcast changes
from round to round, so every round has the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sottovoce.bundle import Bundle, with_initial
from sottovoce.errors import ConfigError, RoundAbandoned
from sottovoce.language.client_programs import client_program
from sottovoce.language.computations import Computation, federated_computation, server_computation
from sottovoce.language.definition import Value
from sottovoce.language.expressions import ClientProgram, Terms
from sottovoce.language.operators import (
    federated_broadcast,
    federated_map,
    federated_mean,
    federated_sum,
    federated_value,
)
from sottovoce.language.ports import Bound
from sottovoce.language.server_optimizer import OptimizerState, ServerOptimizer, sgd
from sottovoce.plan import LocalWork
from sottovoce.tensors import decode_tensors
from sottovoce.types import SERVER, Array, StructType, TensorType, Type, at_clients, at_server
from sottovoce.values import Record

ModelFile: TypeAlias = Bundle | bytes | str | Path
Metrics: TypeAlias = Mapping[str, Bound | None]
"""Metric of the bundle -> the bound of one device's sum; None leaves it open, which only a fleet refuses."""

LEARNING_RATE = "learning_rate"
INT32 = TensorType("int32")
FLOAT32 = TensorType("float32")


@dataclass(frozen=True, slots=True)
class ClientOptimizer:
    """How a device trains: by the bundle's own SGD, at a rate that is broadcast.

    Attributes:
        learning_rate: Of the first round, above 0; None is the bundle's.
        decay: Every round's rate is the one before times this, above 0 and at most 1.
        work: Epochs, batches and which examples.
    """

    learning_rate: float | None = None
    decay: float = 1.0
    work: LocalWork = LocalWork()  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"the client's learning_rate is {self.learning_rate}; write a number above 0")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"the client's decay is {self.decay}; write a number above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class IterativeProcess:
    """A training process as two computations; `str` of it prints their type signatures.

    Attributes:
        initialize: ( -> state@SERVER).
        next: (<state=...@SERVER,examples={...*}@CLIENTS> -> <state=...@SERVER,metrics=...@SERVER>).
        bundle: The model's bundle.
    """

    initialize: Computation
    next: Computation
    bundle: Bundle

    def __str__(self) -> str:
        return f"initialize: {self.initialize.type_signature}\nnext: {self.next.type_signature}"

    def trained(self, state: Any) -> Bundle:
        """Return the bundle with the model in `state` for its initial values: what devices infer with."""
        return with_initial(self.bundle, dict(state.model))


@dataclass(frozen=True, slots=True)
class Averaging:
    """What the server does in a round of federated averaging, as pure functions over values.

    Attributes:
        bundle: The model's bundle; at least one of its results updates broadcast ports.
        client: The devices' rate.
        server: The server optimizer.
    """

    bundle: Bundle
    client: ClientOptimizer
    server: ServerOptimizer

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError(f"bundle {self.bundle.name!r} only sums and updates no model; use sums.build_sums for it")
        if self.client.learning_rate is not None and LEARNING_RATE not in decode_tensors(self.bundle.initial):
            raise ConfigError(f"bundle {self.bundle.name!r} has no port {LEARNING_RATE!r}; leave the client's rate out")

    @property
    def targets(self) -> tuple[str, ...]:
        """The broadcast ports that are trained, in the order of the results' ports."""
        return tuple(target for result in self.bundle.results for target in result.updates)

    @property
    def state_type(self) -> StructType:
        """The type of the server's state."""
        first = self.first_state()
        optimizer = StructType(tuple((part, _type_of_tensors(named)) for part, named in first.optimizer.items()))
        return StructType((("model", model_type(self.bundle)), ("optimizer", optimizer), ("round", INT32)))

    @property
    def delta_type(self) -> StructType:
        """The type of a round's mean updates: one struct of ports for each result that updates."""
        return StructType(
            tuple((r.name, StructType(tuple((p.name, p.tensor_type) for p in r.ports)))
                  for r in self.bundle.results if r.updates)
        )  # fmt: skip

    def first_state(self) -> Record[Any]:
        """Return the state before the first round: the bundle's initial model."""
        values = initial_model(self.bundle)
        trained = {name: values[name] for name in self.targets}
        parts = {part: Record(dict(named)) for part, named in self.server.init(trained).items()}
        return Record({"model": Record(values), "optimizer": Record(parts), "round": np.int32(0)})

    def broadcast(self, state: Any) -> Record[Array]:
        """Return what the devices are sent in the round that `state` precedes."""
        return broadcast_of(self.bundle, state.model, rate=self.rate(int(state.round)))

    def rate(self, number: int) -> float:
        """Return the devices' learning rate in round `number`, counted from 0."""
        first = self.client.learning_rate
        if first is None:
            first = float(decode_tensors(self.bundle.initial).get(LEARNING_RATE, np.ones(1))[0])
        return first * self.client.decay**number

    def advance(self, state: Any, deltas: Any) -> Record[Any]:
        """Return the state after a round whose mean updates are `deltas`, of `delta_type`.

        Raises:
            RoundAbandoned: A weight would not be finite.
        """
        means = [mean for result in deltas.values() for mean in result.values()]
        delta = dict(zip(self.targets, means, strict=True))
        weights = {name: state.model[name] for name in self.targets}
        # A struct without elements has no names, so its value is the empty tuple.
        moments: OptimizerState = (
            {part: dict(named) for part, named in state.optimizer.items()} if state.optimizer else {}
        )
        after, moved = self.server.apply(moments, weights, delta)
        refuse_not_finite(moved)
        parts = {part: Record(dict(named)) for part, named in after.items()}
        return Record(
            {
                "model": Record({**state.model, **moved}),
                "optimizer": Record(parts),
                "round": np.int32(state.round + 1),
            }
        )


def build_fed_avg(
    model: ModelFile,
    client_optimizer: ClientOptimizer = ClientOptimizer(),
    server_optimizer: ServerOptimizer = sgd(),  # noqa: B008 - immutable
    *,
    terms: Terms = Terms(),  # noqa: B008 - immutable
    metrics: Metrics | None = None,
    name: str | None = None,
    purpose: str | None = None,
) -> IterativeProcess:
    """Return federated averaging of `model`.

    Args:
        model: A model's bundle, its bytes, or the path of a `.svp`.
        client_optimizer: How a device trains.
        server_optimizer: What the server makes of the mean update; the default is plain federated averaging.
        terms: How an update is clipped, weighted and encoded: `clip_norm`, `half_range` and `weight_cap` are needed
            on a fleet; without them this runs in the reference executor only.
        metrics: Which of the bundle's metrics are summed, with their bounds; None: all of them, without bounds.
        name: Of the plan; the default is the bundle's.
        purpose: What this is for, in words that a device's owner understands; the default is the bundle's description.

    Raises:
        ConfigError: The bundle trains nothing, a metric is not the bundle's, or a rate is impossible.
        BadBundle: It is no bundle.
    """
    program = program_of(model, client_optimizer.work)
    averaging = Averaging(program.bundle, client_optimizer, server_optimizer)
    bounds = checked_metrics(program.bundle, metrics)
    prepare = server_computation(averaging.state_type, result=part_of(program, "broadcast"))(averaging.broadcast)
    advance = server_computation(averaging.state_type, averaging.delta_type, result=averaging.state_type)(
        averaging.advance
    )

    def train(state: Value, examples: Value) -> object:
        found = federated_map(program, (federated_broadcast(federated_map(prepare, state)), examples))
        deltas = {name: _mean(found, name, terms) for name in averaging.delta_type.names}
        return {
            "state": federated_map(advance, (state, deltas)),
            "metrics": mean_metrics(found, bounds, weight_cap=terms.weight_cap),
        }

    following = defined(
        train,
        at_server(averaging.state_type),
        at_clients(part_of(program, "examples")),
        name=name or program.bundle.name,
        purpose=purpose or program.bundle.description,
    )
    return IterativeProcess(first_value(averaging.first_state()), following, program.bundle)


def build_federated_evaluation(
    model: ModelFile,
    *,
    metrics: Metrics | None = None,
    weight_cap: int | None = None,
    work: LocalWork = LocalWork(batch_size=128),  # noqa: B008 - immutable
    purpose: str | None = None,
) -> Computation:
    """Return (<model=...@SERVER,examples={...*}@CLIENTS> -> metrics@SERVER): the model's scores on all examples.

    It is one pass of the very program that trains, at a learning rate of 0: a device needs no second program, and the
    metrics of a step are those of the model as it was broadcast. The price is a gradient that is thrown away.

    Args:
        model: A model's bundle, its bytes, or the path of a `.svp`.
        metrics: As for `build_fed_avg`.
        weight_cap: Most examples of one device that count; needed on a fleet.
        work: One epoch; batches and which examples.
        purpose: As for `build_fed_avg`.

    Raises:
        ConfigError: The bundle has no port for a learning rate, a metric is not the bundle's, or `work` has more than
            one epoch.
    """
    program = program_of(model, work)
    if LEARNING_RATE not in {port.name for port in program.bundle.broadcast}:
        raise ConfigError(
            f"bundle {program.bundle.name!r} has no port {LEARNING_RATE!r}; it cannot be told not to train"
        )
    if work.epochs != 1:
        raise ConfigError(f"an evaluation is one pass over the examples, not {work.epochs}; set epochs = 1")
    bounds = checked_metrics(program.bundle, metrics)
    kind = model_type(program.bundle)

    @server_computation(kind, result=part_of(program, "broadcast"))
    def prepare(model: Any) -> Record[Array]:
        return broadcast_of(program.bundle, model, rate=0.0)

    def evaluate(model: Value, examples: Value) -> object:
        found = federated_map(program, (federated_broadcast(federated_map(prepare, model)), examples))
        return mean_metrics(found, bounds, weight_cap=weight_cap)

    return defined(
        evaluate,
        at_server(kind),
        at_clients(part_of(program, "examples")),
        name=f"{program.bundle.name}-evaluation",
        purpose=purpose or f"Evaluates: {program.bundle.description}",
    )


# --- what the other processes of learning are made of too -------------------------------------------------------------


def program_of(model: ModelFile, work: LocalWork) -> ClientProgram:
    """Return the client program of a bundle, its bytes or its file, that does `work`."""
    return client_program(
        model,
        epochs=work.epochs,
        batch_size=work.batch_size,
        max_examples=work.max_examples,
        order=work.order,
    )


def part_of(program: ClientProgram, name: str) -> Type:
    """Return the type of the element `name` of the program's parameter."""
    return program.parameter.elements[program.parameter.index(name)][1]


def model_type(bundle: Bundle) -> StructType:
    """Return the type of a model: every broadcast port but the learning rate."""
    return StructType(tuple((p.name, p.tensor_type) for p in bundle.broadcast if p.name != LEARNING_RATE))


def initial_model(bundle: Bundle) -> dict[str, Array]:
    """Return the bundle's initial values of everything in `model_type`, in that order.

    Raises:
        ConfigError: The bundle has no initial value for a port.
    """
    given = decode_tensors(bundle.initial)
    if missing := [port.name for port in bundle.broadcast if port.name not in given]:
        raise ConfigError(f"bundle {bundle.name!r} has no initial value for the broadcast port {missing[0]!r}")
    return {name: given[name] for name in model_type(bundle).names}


def broadcast_of(bundle: Bundle, model: Any, *, rate: float) -> Record[Array]:
    """Return the broadcast of `model`: its tensors and the learning rate, in the order of the bundle's ports."""
    values = {**model, LEARNING_RATE: np.array([rate], np.float32)}
    return Record({port.name: values[port.name] for port in bundle.broadcast})


def checked_metrics(bundle: Bundle, metrics: Metrics | None) -> Metrics:
    """Return which metrics are summed; all of the bundle's, without bounds, where `metrics` is None.

    Raises:
        ConfigError: One of them is not the bundle's.
    """
    known = [port.name for port in bundle.metrics]
    if metrics is None:
        return dict.fromkeys(known)
    if unknown := sorted(set(metrics) - set(known)):
        raise ConfigError(
            f"metrics.{unknown[0]}: bundle {bundle.name!r} has no such name; it has {', '.join(known) or 'none'}"
        )
    return {name: metrics[name] for name in known if name in metrics}


def mean_metrics(found: Value, bounds: Metrics, *, weight_cap: int | None) -> Value:
    """Return `<examples=int32,METRIC=float32,...>@SERVER`: each metric's sum divided by the number of examples."""
    examples = federated_sum(found.weight, bound=None if weight_cap is None else Bound(0, weight_cap))
    totals = {name: federated_sum(found[name], bound=bound) for name, bound in bounds.items()}
    sums = StructType(tuple((name, TensorType("float32", (1,))) for name in bounds))
    means = StructType((("examples", INT32), *((name, FLOAT32) for name in bounds)))

    @server_computation(INT32, sums, result=means)
    def divide(examples: Any, sums: Any) -> Record[Any]:
        return Record(
            {"examples": examples, **{name: np.float32(total[0] / max(examples, 1)) for name, total in sums.items()}}
        )

    return federated_map(divide, (examples, totals)) if bounds else federated_map(_counted, examples)


@server_computation("int32", result="<examples=int32>")
def _counted(examples: Any) -> Record[Any]:
    return Record({"examples": examples})


def first_value(state: Record[Any]) -> Computation:
    """Return ( -> state@SERVER)."""
    return defined(lambda: federated_value(state, SERVER), name="initialize", purpose="The first state.")


def defined(function: Callable[..., object], *types: Type, name: str, purpose: str) -> Computation:
    """Return `function` over values of `types` as a federated computation; a plan takes its name and purpose of it."""
    function.__name__, function.__doc__ = name, purpose
    computation: Computation = federated_computation(*types)(function)
    return computation


def refuse_not_finite(tensors: Mapping[str, Array]) -> None:
    """Raise RoundAbandoned if one of `tensors` holds NaN or infinity."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise RoundAbandoned("not_finite", f"{name} is not finite after averaging; lower the learning rates")


def _mean(found: Value, result: str, terms: Terms) -> Value:
    return federated_mean(
        found[result],
        weight=found.weight,
        clip_norm=terms.clip_norm,
        half_range=terms.half_range,
        weight_cap=terms.weight_cap,
        bits=terms.bits,
        lane=terms.lane,
    )


def _type_of_tensors(tensors: Mapping[str, Array]) -> StructType:
    return StructType(tuple((name, TensorType(str(v.dtype), v.shape)) for name, v in tensors.items()))
