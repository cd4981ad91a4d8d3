"""Client programs (bundles) as local functions of the language: `federated_map(program, (broadcast, examples))`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sottovoce.bundle import NEXT, Bundle, Port, decode_bundle, encode_bundle
from sottovoce.errors import BadExamples, ConfigError
from sottovoce.language.expressions import ClientProgram
from sottovoce.plan import LocalWork, OrderName
from sottovoce.runtime import Program, open_program
from sottovoce.types import Array, SequenceType, StructType, TensorType, Type
from sottovoce.values import Record, struct_value


def client_program(
    source: Bundle | bytes | str | Path,
    *,
    epochs: int = 1,
    batch_size: int = 32,
    max_examples: int = 0,
    order: OrderName = "shuffled",
) -> ClientProgram:
    """Return a bundle as a local function for `federated_map` at CLIENTS.

    Its parameter is `<broadcast=<...>,examples=<...>*>`, with `client_state=<...>` between them if the program keeps
    any; its result has the bundle's results (a struct of ports each), its metrics, `weight` (the examples used, int32)
    and `client_state`.

    Args:
        source: A bundle, its bytes, or the path of a `.svp` file.
        epochs: Passes over the examples, >= 1.
        batch_size: Examples in a batch, >= 1.
        max_examples: At most so many examples; 0 is all.
        order: `shuffled`, or `stored`: the newest ones, oldest first.

    Raises:
        ConfigError: There is no such file, or a number is impossible.
        BadBundle: It is not a bundle.
    """
    if epochs < 1 or batch_size < 1 or max_examples < 0:
        raise ConfigError("client_program: epochs and batch_size must be at least 1, max_examples 0 (all) or more")
    bundle, content = _read(source)
    work = LocalWork(epochs=epochs, batch_size=batch_size, max_examples=max_examples, order=order)
    return ClientProgram(bundle.name, _parameter(bundle), _result(bundle), bundle, content, work)


def run(function: ClientProgram, argument: Any) -> Any:
    """Return what the program makes of one member's examples, in stored order, on this machine's TFLite runtime.

    Args:
        function: The program.
        argument: A value of its parameter type.

    Raises:
        BadExamples: There are no examples.
        ProgramError: No runtime is installed, or it refused a value.
    """
    bundle, parts = function.bundle, _by_name(function.parameter, argument)
    program = _opened(function.content)
    broadcast = _arrays(bundle.broadcast, parts["broadcast"])
    kept = _arrays(bundle.client_state_ports, parts.get("client_state", ()))
    columns = _columns(function, parts["examples"])
    count = len(next(iter(columns.values())))
    state, metrics = program.begin(broadcast, kept), {}
    for _ in range(function.work.epochs):
        metrics = {port.name: np.zeros(1) for port in bundle.metrics}
        for start in range(0, count, function.work.batch_size):
            batch = {name: column[start : start + function.work.batch_size] for name, column in columns.items()}
            state, found = program.step(state, batch)
            metrics = {name: value + found[name] for name, value in metrics.items()}
    finished = program.finish(state, broadcast)
    return _record(function, finished, metrics, count)


def _read(source: Bundle | bytes | str | Path) -> tuple[Bundle, bytes]:
    if isinstance(source, Bundle):
        return source, encode_bundle(source)
    if not isinstance(source, bytes):
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read the bundle {source}: {error.strerror}") from error
        return decode_bundle(content), content
    return decode_bundle(source), source


def _struct(ports: Sequence[Port]) -> StructType:
    return StructType(tuple((port.name, port.tensor_type) for port in ports))


def _parameter(bundle: Bundle) -> StructType:
    example = StructType(
        tuple((port.name, TensorType(port.tensor_type.dtype, port.tensor_type.shape[1:])) for port in bundle.batch)
    )
    kept: tuple[tuple[str, Type], ...] = ()
    if bundle.client_state:
        kept = (("client_state", _struct(bundle.client_state.ports)),)
    return StructType((("broadcast", _struct(bundle.broadcast)), *kept, ("examples", SequenceType(example))))


def _result(bundle: Bundle) -> StructType:
    elements: list[tuple[str | None, Type]] = [(result.name, _struct(result.ports)) for result in bundle.results]
    elements += [(port.name, port.tensor_type) for port in bundle.metrics]
    elements.append(("weight", TensorType("int32")))
    if bundle.client_state:
        elements.append(("client_state", _struct(bundle.client_state.ports)))
    return StructType(tuple(elements))


@functools.lru_cache(maxsize=8)
def _opened(content: bytes) -> Program:
    return open_program(decode_bundle(content))


def _by_name(kind: StructType, value: Any) -> dict[str, Any]:
    """Return the elements of `value` by the names of `kind`; it may be unnamed itself."""
    return dict(zip(kind.names, value, strict=True))


def _arrays(ports: Sequence[Port], value: Any) -> dict[str, Array]:
    return {port.name: np.asarray(part) for port, part in zip(ports, value, strict=True)}


def _columns(function: ClientProgram, examples: Sequence[Any]) -> dict[str, Array]:
    limit = function.work.max_examples
    used = examples[-limit:] if limit else examples
    if not len(used):
        raise BadExamples(f"{function.name}: a member has no examples; leave it out, as a fleet does")
    rows = zip(*used, strict=True)
    return {port.name: np.stack(column) for port, column in zip(function.bundle.batch, rows, strict=True)}


def _record(function: ClientProgram, finished: Mapping[str, Array], metrics: Mapping[str, Array], count: int) -> Any:
    bundle = function.bundle
    parts: list[Any] = [Record({port.name: finished[port.name] for port in result.ports}) for result in bundle.results]
    parts += [metrics[port.name].astype(port.tensor_type.numpy_dtype) for port in bundle.metrics]
    parts.append(np.int32(count))
    if bundle.client_state:
        parts.append(Record({port.name: finished[NEXT + port.name] for port in bundle.client_state.ports}))
    return struct_value(function.result, parts)
