"""Plain sums of a client program's results, and the moments that standardise a model's inputs, as computations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sottovoce.bundle import Bundle
from sottovoce.errors import ConfigError, RoundAbandoned
from sottovoce.language.computations import Computation, server_computation
from sottovoce.language.definition import Value
from sottovoce.language.expressions import ClientProgram
from sottovoce.language.learning import ModelFile, defined, part_of, program_of
from sottovoce.language.operators import federated_broadcast, federated_map, federated_sum, federated_value
from sottovoce.language.ports import Bound
from sottovoce.plan import LocalWork
from sottovoce.tensors import decode_tensors
from sottovoce.types import SERVER, Array, StructType, at_clients
from sottovoce.values import Record

MOMENTS = ("count", "sum", "sum_of_squares")
"""The results of a moments program: how many samples, their sum and the sum of their squares, feature by feature."""


def build_sums(
    model: ModelFile,
    *,
    work: LocalWork = LocalWork(),  # noqa: B008 - immutable
    broadcast: Mapping[str, Array] | None = None,
    bounds: Mapping[str, Bound] | None = None,
    metrics: tuple[str, ...] = (),
    name: str | None = None,
    purpose: str | None = None,
) -> Computation:
    """Return ({examples*}@CLIENTS -> <RESULT=<PORT=...,...>,METRIC=float32[1],...,weight=int32>@SERVER).

    Args:
        model: A bundle, its bytes, or the path of a `.svp`.
        work: Epochs, batches and which examples.
        broadcast: What is sent to the devices instead of the bundle's initial values, by port.
        bounds: Result, metric or `weight` -> bound of every coordinate of one device's value; needed on a fleet.
        metrics: Which metrics are summed beside the results.
        name: Of the plan; the default is the bundle's.
        purpose: What this is for, in words that a device's owner understands; the default is the bundle's description.

    Raises:
        ConfigError: The bundle has no such metric, or a port without an initial value.
        BadBundle: It is no bundle.
    """
    program = program_of(model, work)
    if unknown := sorted(set(metrics) - {port.name for port in program.bundle.metrics}):
        raise ConfigError(f"bundle {program.bundle.name!r} has no metric {unknown[0]!r}")
    names = (*(result.name for result in program.bundle.results), *metrics, "weight")
    limits = dict(bounds or {})
    sent = _broadcast(program, broadcast or {})

    def sums(examples: Value) -> object:
        start = federated_broadcast(federated_value(sent, SERVER))
        found = federated_map(program, (start, examples))
        return {each: federated_sum(found[each], bound=limits.get(each)) for each in names}

    return defined(
        sums,
        at_clients(part_of(program, "examples")),
        name=name or program.bundle.name,
        purpose=purpose or program.bundle.description,
    )


def build_standardisation(
    model: ModelFile,
    *,
    work: LocalWork = LocalWork(),  # noqa: B008 - immutable
    bounds: Mapping[str, Bound] | None = None,
    name: str | None = None,
    purpose: str | None = None,
) -> Computation:
    """Return ({examples*}@CLIENTS -> <mean=float32[n],variance=float32[n]>@SERVER), without pooling any measurements.

    Args:
        model: A moments bundle (`models.zoo.moments`), its bytes, or the path of a `.svp`.
        work: Batches and which examples.
        bounds: `count`, `sum` and `sum_of_squares` -> bound of one device's value; needed on a fleet.
        name: Of the plan; the default is the bundle's.
        purpose: As for `build_sums`.

    Raises:
        ConfigError: It is not a moments program.
        BadBundle: It is no bundle.
    """
    program = program_of(model, work)
    kinds = moment_types(program.bundle)
    limits = dict(bounds or {})
    both = StructType((("mean", kinds.elements[1][1]), ("variance", kinds.elements[1][1])))
    sent = _broadcast(program, {})
    finish = server_computation(kinds, result=both)(mean_and_variance)

    def standardise(examples: Value) -> object:
        found = federated_map(program, (federated_broadcast(federated_value(sent, SERVER)), examples))
        return federated_map(finish, {n: federated_sum(found[n][0], bound=limits.get(n)) for n in MOMENTS})

    return defined(
        standardise,
        at_clients(part_of(program, "examples")),
        name=name or program.bundle.name,
        purpose=purpose or program.bundle.description,
    )


def moment_types(bundle: Bundle) -> StructType:
    """Return `<count=...,sum=...,sum_of_squares=...>`, the types of a moments program's results.

    Raises:
        ConfigError: The bundle is not a moments program.
    """
    ports = {result.name: result.ports for result in bundle.results}
    if set(ports) != set(MOMENTS) or any(len(each) != 1 for each in ports.values()) or bundle.broadcast:
        raise ConfigError(
            f"{bundle.name!r} is not a moments program; it must broadcast nothing and return {', '.join(MOMENTS)}"
        )
    return StructType(tuple((name, ports[name][0].tensor_type) for name in MOMENTS))


def mean_and_variance(moments: Any) -> Record[Array]:
    """Return mean and variance of every feature; one that never varies gets the variance 1.

    Raises:
        RoundAbandoned: Nothing was counted.
    """
    count, total, squares = (np.asarray(moments[name], np.float64) for name in MOMENTS)
    if count[0] < 1:
        raise RoundAbandoned("no_examples", "the moments program counted nothing")
    mean = total / count[0]
    variance = squares / count[0] - mean**2
    spread = np.where(variance > 0, variance, 1.0)
    return Record({"mean": mean.astype(np.float32), "variance": spread.astype(np.float32)})


def _broadcast(program: ClientProgram, values: Mapping[str, Array]) -> Record[Array]:
    given = {**decode_tensors(program.bundle.initial), **values}
    if missing := [port.name for port in program.bundle.broadcast if port.name not in given]:
        raise ConfigError(f"bundle {program.bundle.name!r} has no initial value for {missing[0]!r}; give `broadcast`")
    return Record({port.name: given[port.name] for port in program.bundle.broadcast})
