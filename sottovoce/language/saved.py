"""Lowered computations as files (`.svc`): canonical MessagePack, loaded and run without TensorFlow.

Traced functions of the server's parts travel as TFLite flatbuffers, and run on the same runtime as client programs.
The bytes may come from anybody: they are parsed into typed structs, or refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from sottovoce.blobs import MAX_BLOB_BYTES, Document, canonical
from sottovoce.errors import ConfigError, ProgramError, SottovoceError
from sottovoce.language.expressions import (
    Body,
    Builtin,
    ClientProgram,
    Composite,
    HostFunction,
    LocalFunction,
    Operator,
    Source,
    Step,
)
from sottovoce.language.lowered import Lowered
from sottovoce.language.ports import Bound
from sottovoce.language.recipes import Recipe, Summand
from sottovoce.language.saved_checks import check_lowered
from sottovoce.language.tracing import tracer
from sottovoce.plan import Aggregation, LocalWork
from sottovoce.runtime import open_function
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array, FunctionType, TensorType, Type, type_of
from sottovoce.values import leaves

FORMAT = "sottovoce-computation/1"
_LARGEST_DEPTH = 64
_Kind = Literal["sum", "mean", "weighted_mean", "lane_mean", "weight"]


class _Bound(Document, frozen=True):
    low: float
    high: float


class _Function(Document, frozen=True):
    """A local function: a builtin by name, steps, or a flatbuffer."""

    kind: Literal["builtin", "composite", "flatbuffer"]
    name: str
    parameter: str
    result: str
    bound: _Bound | None = None
    body: _Body | None = None
    flatbuffer: bytes = b""


class _Step(Document, frozen=True):
    operator: Operator
    inputs: tuple[int, ...]
    type: str
    where: tuple[str, int]
    functions: tuple[_Function, ...]
    name: str
    index: int
    value: bytes


class _Body(Document, frozen=True):
    parameters: tuple[tuple[str, str], ...]
    steps: tuple[_Step, ...]
    result: int


class _Summand(Document, frozen=True):
    aggregation: str
    index: int
    offset: float
    error: float
    bound: _Bound


class _Recipe(Document, frozen=True):
    kind: _Kind
    where: str
    type: str
    summands: tuple[_Summand, ...]
    weight: _Summand | None
    weight_cap: float


class _Lowered(Document, frozen=True):
    format: str
    name: str
    purpose: str
    parameters: tuple[tuple[str, str], ...]
    result: str
    members: tuple[int, ...]
    columns: tuple[tuple[str, str], ...]
    bundle: bytes
    work: LocalWork
    aggregations: tuple[Aggregation, ...]
    weight_cap: int
    broadcast: tuple[tuple[str, str], ...]
    before: _Body
    after: _Body
    recipes: tuple[_Recipe, ...]
    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SavedFunction:
    """A traced function that was saved: a flatbuffer. Implements `sottovoce.language.ports.Traced`, but for tracing."""

    name: str
    parameter: Type | None
    result: Type
    flatbuffer: bytes

    def __call__(self, *arrays: Array) -> list[Array]:
        """See Traced.

        Raises:
            ProgramError: No TFLite runtime is installed, or it refused the arrays.
        """
        kinds = [kind for _, kind in leaves(self.result)]
        named = {f"input_{at}": _as_port(np.asarray(array)) for at, array in enumerate(arrays)}
        found = open_function(self.flatbuffer)(named)
        try:
            outputs = [found[f"output_{at}"] for at in range(len(kinds))]
            return [out if kind.shape else out.reshape(()) for out, kind in zip(outputs, kinds, strict=True)]
        except (KeyError, ValueError) as error:
            raise ProgramError(f"{self.name}: the flatbuffer does not return {self.result}") from error

    def symbolic(self, *tensors: object) -> list[object]:
        """Refuse: a saved function is no graph any more."""
        raise ConfigError(f"{self.name} was loaded from a file; trace its source to use it in another function")

    def output_bounds(self, inputs: Sequence[Bound | None]) -> tuple[Bound | None, ...]:
        """See Traced; nothing is known of a saved function."""
        return (None,) * len(leaves(self.result))


def encode_lowered(lowered: Lowered) -> bytes:
    """Return the canonical bytes of `lowered`.

    Raises:
        ConfigError: It holds Python code of this process.
    """
    return canonical(
        _Lowered(
            format=FORMAT,
            name=lowered.name,
            purpose=lowered.purpose,
            parameters=_notations(lowered.parameters),
            result=str(lowered.signature.result),
            members=lowered.members,
            columns=_notations(lowered.columns),
            bundle=lowered.bundle,
            work=lowered.work,
            aggregations=lowered.aggregations,
            weight_cap=lowered.weight_cap,
            broadcast=_notations(lowered.broadcast),
            before=_encode_body(lowered.before),
            after=_encode_body(lowered.after),
            recipes=tuple(_encode_recipe(recipe) for recipe in lowered.recipes),
            words=lowered.words,
        )
    )


def decode_lowered(content: bytes) -> Lowered:
    """Parse the bytes of a lowered computation.

    Raises:
        ConfigError: They are not one of this version, or its parts do not fit together.
    """
    if len(content) > MAX_BLOB_BYTES:
        raise ConfigError(f"a lowered computation of {len(content)} bytes is larger than {MAX_BLOB_BYTES}")
    try:
        saved = msgspec.msgpack.decode(content, type=_Lowered)
        if saved.format != FORMAT:
            raise ConfigError(f"format {saved.format!r}; this release reads {FORMAT!r}")
        return _decode(saved)
    except (msgspec.ValidationError, msgspec.DecodeError, SottovoceError, ValueError, RecursionError) as error:
        raise ConfigError(f"not a lowered computation of this version: {error}") from error


def load_lowered(path: str | Path) -> Lowered:
    """Return the lowered computation in the file `path` (`.svc`); TensorFlow is not needed, nor to run it.

    Raises:
        ConfigError: There is no such file, or it is not a lowered computation.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return decode_lowered(content)


def _encode_body(body: Body) -> _Body:
    return _Body(parameters=_notations(body.parameters), steps=tuple(map(_encode_step, body.steps)), result=body.result)


def _encode_step(step: Step) -> _Step:
    arrays = {str(at): np.asarray(array) for at, array in enumerate(step.value)}
    if any(array.dtype.kind == "U" for array in arrays.values()):
        raise ConfigError(f"{step.where}: text cannot be saved; give it as an argument, or remove it")
    return _Step(
        operator=step.operator,
        inputs=step.inputs,
        type=str(step.type),
        where=(step.source.file, step.source.line),
        functions=tuple(_encode_function(function, step) for function in step.functions),
        name=step.name,
        index=step.index,
        value=encode_tensors(arrays),
    )


def _encode_function(function: LocalFunction, step: Step) -> _Function:
    parameter = "" if function.parameter is None else str(function.parameter)
    result = str(function.result)
    match function:
        case Builtin():
            bound = None if function.bound is None else _encode_bound(function.bound)
            return _Function(kind="builtin", name=function.name, parameter=parameter, result=result, bound=bound)
        case Composite():
            body = _encode_body(function.body)
            return _Function(kind="composite", name=function.name, parameter=parameter, result=result, body=body)
        case HostFunction():
            raise ConfigError(
                f"{step.source}: {function.name} is Python code of this process (@sv.server_computation), which cannot "
                "be saved. Write it in TensorFlow, @sv.tf_computation, or run the computation without saving it"
            )
        case ClientProgram():
            raise ConfigError(f"{step.where}: a client program cannot run at the server")
        case SavedFunction():
            flatbuffer = function.flatbuffer
        case _:
            flatbuffer = tracer().flatbuffer(function)
    return _Function(kind="flatbuffer", name=function.name, parameter=parameter, result=result, flatbuffer=flatbuffer)


def _encode_recipe(recipe: Recipe) -> _Recipe:
    return _Recipe(
        kind=recipe.kind,
        where=recipe.where,
        type=str(recipe.type),
        summands=tuple(map(_encode_summand, recipe.summands)),
        weight=None if recipe.weight is None else _encode_summand(recipe.weight),
        weight_cap=recipe.weight_cap,
    )


def _encode_summand(summand: Summand) -> _Summand:
    return _Summand(
        aggregation=summand.aggregation,
        index=summand.index,
        offset=summand.offset,
        error=summand.error,
        bound=_encode_bound(summand.bound),
    )


def _encode_bound(bound: Bound) -> _Bound:
    return _Bound(low=bound.low, high=bound.high)


def _notations(named: Sequence[tuple[str, Type]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(kind)) for name, kind in named)


def _decode(saved: _Lowered) -> Lowered:
    parameters = tuple((name, type_of(kind)) for name, kind in saved.parameters)
    parameter = Body(parameters, (), 0).parameter
    lowered = Lowered(
        name=saved.name,
        purpose=saved.purpose,
        signature=FunctionType(parameter, type_of(saved.result)),
        parameters=parameters,
        members=saved.members,
        columns=tuple((name, TensorType.parse(kind)) for name, kind in saved.columns),
        bundle=saved.bundle,
        work=saved.work,
        aggregations=saved.aggregations,
        weight_cap=saved.weight_cap,
        broadcast=tuple((name, TensorType.parse(kind)) for name, kind in saved.broadcast),
        before=_decode_body(saved.before, 0),
        after=_decode_body(saved.after, 0),
        recipes=tuple(map(_decode_recipe, saved.recipes)),
        words=saved.words,
    )
    check_lowered(lowered)
    return lowered


def _decode_body(saved: _Body, depth: int) -> Body:
    if depth > _LARGEST_DEPTH:
        raise ConfigError("its functions are nested too deeply")
    steps = tuple(_decode_step(step, depth) for step in saved.steps)
    parameters = tuple((name, type_of(kind)) for name, kind in saved.parameters)
    return Body(parameters, steps, saved.result)


def _decode_step(saved: _Step, depth: int) -> Step:
    arrays = decode_tensors(saved.value)
    return Step(
        saved.operator,
        saved.inputs,
        type_of(saved.type),
        Source(*saved.where),
        functions=tuple(_decode_function(function, depth + 1) for function in saved.functions),
        name=saved.name,
        index=saved.index,
        value=tuple(array[()] for array in arrays.values()),
    )


def _decode_function(saved: _Function, depth: int) -> LocalFunction:
    parameter = type_of(saved.parameter) if saved.parameter else None
    result = type_of(saved.result)
    match saved:
        case _Function(kind="builtin", name="cast" | "clip" | "identity" as name) if parameter is not None:
            bound = None if saved.bound is None else Bound(saved.bound.low, saved.bound.high)
            return Builtin(name, parameter, result, bound)
        case _Function(kind="composite", body=_Body() as body):
            return Composite(saved.name, _decode_body(body, depth))
        case _Function(kind="flatbuffer"):
            return SavedFunction(saved.name, parameter, result, saved.flatbuffer)
        case _:
            raise ConfigError(f"{saved.name!r} is no function of this version")


def _decode_recipe(saved: _Recipe) -> Recipe:
    return Recipe(
        kind=saved.kind,
        where=saved.where,
        type=type_of(saved.type),
        summands=tuple(map(_decode_summand, saved.summands)),
        weight=None if saved.weight is None else _decode_summand(saved.weight),
        weight_cap=saved.weight_cap,
    )


def _decode_summand(saved: _Summand) -> Summand:
    return Summand(saved.aggregation, saved.index, saved.offset, saved.error, Bound(saved.bound.low, saved.bound.high))


def _as_port(array: Array) -> Array:
    """Return `array` as it travels: rank 0 as shape [1], which runtimes on ARM cannot do without."""
    return np.ascontiguousarray(array.reshape(1) if array.ndim == 0 else array)
