"""SCAFFOLD on the language: federated averaging whose drift is corrected by control variates kept on the devices.

Karimireddy et al. 2020 (arXiv 1910.06378), Algorithm 1 with Option II for the controls. Where devices hold different
classes, each one's SGD runs towards its own optimum; the control c_i of a device remembers where it drifts to, the
server's control c where all of them go together, and every local step is corrected by c - c_i. The client program is
`models.scaffold`; c_i lives in its slot of client state and never leaves the device, only its change is summed.

With x the weights, N the population and S the devices of a round:

    x = x + learning_rate * mean over S of (y_i - x)
    c = c + 1/N * sum over S of (c_i+ - c_i)

The mean is not weighted by examples, as in the paper: controls are sums over devices, and both must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sottovoce.bundle import Bundle
from sottovoce.errors import ConfigError
from sottovoce.language.client_state import client_state_of
from sottovoce.language.computations import server_computation
from sottovoce.language.definition import Value
from sottovoce.language.expressions import Terms
from sottovoce.language.learning import (
    INT32,
    ClientOptimizer,
    IterativeProcess,
    Metrics,
    ModelFile,
    broadcast_of,
    checked_metrics,
    defined,
    first_value,
    initial_model,
    mean_metrics,
    model_type,
    part_of,
    program_of,
    refuse_not_finite,
)
from sottovoce.language.operators import federated_broadcast, federated_map, federated_mean, federated_sum
from sottovoce.language.ports import Bound
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array, StructType, at_clients, at_server
from sottovoce.values import Record

_CONTROL = "control_"
_RESULTS = ("delta", "control_delta")


@dataclass(frozen=True, slots=True)
class Scaffold:
    """What the server does in a round of SCAFFOLD, as pure functions over values.

    Attributes:
        bundle: A bundle of `models.scaffold`.
        client: The devices' rate.
        learning_rate: The server's, above 0.
        population: Devices in the fleet, N, whether they take part in a round or not.
    """

    bundle: Bundle
    client: ClientOptimizer
    learning_rate: float
    population: int

    def __post_init__(self) -> None:
        if tuple(result.name for result in self.bundle.results) != _RESULTS or self.bundle.client_state is None:
            raise ConfigError(
                f"bundle {self.bundle.name!r} is not a SCAFFOLD program; make one of the model with "
                "models.scaffold.export_scaffold"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"the server's learning_rate is {self.learning_rate}; write a number above 0")
        if self.population < 1:
            raise ConfigError(f"population is {self.population}; write how many devices the fleet has")

    @property
    def targets(self) -> tuple[str, ...]:
        """The broadcast ports that are trained."""
        return self.bundle.results[0].updates

    @property
    def state_type(self) -> StructType:
        """The type of the server's state: the model with its controls, and the number of rounds averaged."""
        return StructType((("model", model_type(self.bundle)), ("round", INT32)))

    @property
    def delta_types(self) -> tuple[StructType, ...]:
        """The types of the results `delta` and `control_delta`."""
        return tuple(
            StructType(tuple((port.name, port.tensor_type) for port in result.ports)) for result in self.bundle.results
        )

    def first_state(self) -> Record[Any]:
        """Return the state before the first round; all controls are as in the bundle, zero."""
        return Record({"model": Record(initial_model(self.bundle)), "round": np.int32(0)})

    def broadcast(self, state: Any) -> Record[Array]:
        """Return what the devices are sent in the round that `state` precedes."""
        first = self.client.learning_rate
        if first is None:
            first = float(decode_tensors(self.bundle.initial)["learning_rate"][0])
        return broadcast_of(self.bundle, state.model, rate=first * self.client.decay ** int(state.round))

    def advance(self, state: Any, delta: Any, control_delta: Any) -> Record[Any]:
        """Return the state after a round.

        Args:
            state: The state before it.
            delta: The mean update.
            control_delta: The sum of the changes of the devices' controls.

        Raises:
            RoundAbandoned: A weight or a control would not be finite.
        """
        moved = {}
        for name, mean, total in zip(self.targets, delta.values(), control_delta.values(), strict=True):
            control = _CONTROL + name
            moved[name] = state.model[name] + np.float32(self.learning_rate) * mean
            moved[control] = state.model[control] + total / np.float32(self.population)
        refuse_not_finite(moved)
        return Record({"model": Record({**state.model, **moved}), "round": np.int32(state.round + 1)})


def build_scaffold(
    model: ModelFile,
    client_optimizer: ClientOptimizer = ClientOptimizer(),  # noqa: B008 - immutable
    *,
    population: int,
    learning_rate: float = 1.0,
    terms: Terms = Terms(),  # noqa: B008 - immutable
    control_bound: float | None = None,
    metrics: Metrics | None = None,
    name: str | None = None,
    purpose: str | None = None,
) -> IterativeProcess:
    """Return SCAFFOLD for a bundle of `models.scaffold`.

    Args:
        model: The bundle, its bytes, or the path of a `.svp`.
        client_optimizer: How a device trains.
        population: Devices in the fleet.
        learning_rate: The server's.
        terms: How an update is clipped and encoded, and a control's change rounded (`bits`, `lane`); on a fleet it
            needs `half_range` (and `weight_cap`, for the number of examples that the metrics are divided by).
        control_bound: Largest absolute change of one coordinate of a device's control that is summed; a gradient's
            size. Needed on a fleet.
        metrics: As for `learning.build_fed_avg`.
        name: Of the plan; the default is the bundle's.
        purpose: What this is for, in words that a device's owner understands; the default is the bundle's description.

    Raises:
        ConfigError: It is no SCAFFOLD program, or a number is impossible.
        BadBundle: It is no bundle.
    """
    program = program_of(model, client_optimizer.work)
    server = Scaffold(program.bundle, client_optimizer, learning_rate, population)
    slot = client_state_of(program)
    bounds = checked_metrics(program.bundle, metrics)
    control_limit = None if control_bound is None else Bound(-control_bound, control_bound)
    prepare = server_computation(server.state_type, result=part_of(program, "broadcast"))(server.broadcast)
    advance = server_computation(server.state_type, *server.delta_types, result=server.state_type)(server.advance)

    def train(state: Value, examples: Value) -> object:
        sent = federated_broadcast(federated_map(prepare, state))
        found = federated_map(program, (sent, slot.read(), examples))
        slot.write(found.client_state)
        delta = federated_mean(
            found.delta, clip_norm=terms.clip_norm, half_range=terms.half_range, bits=terms.bits, lane=terms.lane
        )
        control_delta = federated_sum(found.control_delta, bound=control_limit, bits=terms.bits, lane=terms.lane)
        return {
            "state": federated_map(advance, (state, delta, control_delta)),
            "metrics": mean_metrics(found, bounds, weight_cap=terms.weight_cap),
        }

    following = defined(
        train,
        at_server(server.state_type),
        at_clients(part_of(program, "examples")),
        name=name or program.bundle.name,
        purpose=purpose or program.bundle.description,
    )
    return IterativeProcess(first_value(server.first_state()), following, program.bundle)
