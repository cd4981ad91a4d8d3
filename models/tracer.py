"""The language's Tracer with TensorFlow: an author's function becomes a graph, once, where it is defined.

Tracing runs the function once, on symbolic tensors. Whatever depends on values a graph does not have yet (an `if` on a
tensor, `.numpy()`, `print`) is therefore a mistake, and is told at once, in words for somebody who meets it first.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

import models
import sottovoce
from models.client_program import bundle_of
from models.conversion import flatbuffer_of
from models.intervals import output_bounds
from sottovoce.bundle import encode_bundle
from sottovoce.errors import BadBundle, ConfigError, DefinitionError
from sottovoce.language.ports import Bound, Traced
from sottovoce.types import DTYPES, Array, SequenceType, StructType, TensorType, Type, contains
from sottovoce.values import Record, leaves, unflatten

if TYPE_CHECKING:
    from sottovoce.language.lowering import ClientSource

_ADVICE = (
    (
        "has no attribute 'numpy'",
        "calls .numpy() on a tensor; compute with TensorFlow operations (tf.math..., tf.cast)",
    ),
    (
        "as a Python `bool`",
        "decides with Python's if, while, and, or, not on a tensor; use tf.where(condition, a, b) or tf.logical_and",
    ),
    (
        "Iterating over a symbolic",
        "loops over a tensor with Python; use TensorFlow's own reductions, such as tf.reduce_sum",
    ),
    (
        "symbolic tf.Tensor",
        "hands a tensor to numpy; use the TensorFlow function of that name, as tf.math.log for np.log",
    ),
    ("float() argument", "turns a tensor into a Python number; leave it a tensor, and use tf.cast to change its dtype"),
    ("int() argument", "turns a tensor into a Python number; leave it a tensor, and use tf.cast to change its dtype"),
    ("that does not match type", "mixes dtypes; cast one side, as in tf.cast(x, tf.float32)"),
    ("to a tensor with type", "mixes dtypes; cast one side, as in tf.cast(x, tf.float32)"),
    ("Tensor conversion requested dtype", "mixes dtypes; cast one side, as in tf.cast(x, tf.float32)"),
)
"""What TensorFlow says -> what the author did, and what to do instead. The first that fits is told."""
_NOT_THE_AUTHORS = tuple(
    str(Path(module.__file__).parent) + os.sep for module in (sottovoce, models, tf, np) if module.__file__
)
"""Folders whose code an author did not write."""
_HARMLESS_STATE = frozenset({"While", "If", "StatefulPartitionedCall"})
_TENSORFLOW_ERRORS = (TypeError, ValueError, AttributeError, NotImplementedError, IndexError, tf.errors.OpError)


class TracedFunction:
    """A function as a TensorFlow graph; implements `sottovoce.language.ports.Traced`."""

    def __init__(self, name: str, parameter: Type | None, result: Type, graph: Any) -> None:
        """Made by `TensorFlowTracer.trace`.

        Args:
            name: The author's name for it.
            parameter: The type of its argument.
            result: The type of what it returns.
            graph: The concrete function, leaf by leaf.
        """
        self._name, self._parameter, self._result, self._graph = name, parameter, result, graph

    def __repr__(self) -> str:
        return f"{self._name}: ({self._parameter or ''} -> {self._result})"

    @property
    def name(self) -> str:
        """See Traced."""
        return self._name

    @property
    def parameter(self) -> Type | None:
        """See Traced."""
        return self._parameter

    @property
    def result(self) -> Type:
        """See Traced."""
        return self._result

    @property
    def graph(self) -> Any:
        """The concrete function, leaf by leaf."""
        return self._graph

    def __call__(self, *arrays: Array) -> list[Array]:
        """See Traced."""
        return [np.asarray(tensor.numpy()) for tensor in self.symbolic(*map(tf.constant, arrays))]

    def symbolic(self, *tensors: Any) -> list[Any]:
        """See Traced."""
        return list(self._graph(*tensors))

    def output_bounds(self, inputs: Sequence[Bound | None]) -> tuple[Bound | None, ...]:
        """See Traced."""
        return output_bounds(self._graph, inputs)


@dataclass(frozen=True, slots=True)
class TensorFlowTracer:
    """Traces, and makes client programs and flatbuffers; implements `sottovoce.language.ports.Tracer`."""

    def trace(self, function: Callable[..., object], parameter: Type | None, *, name: str) -> Traced:
        """See Tracer."""
        where = _where(function, name)
        specs = [] if parameter is None else _specs(parameter, where)
        kinds: list[Type] = []

        def flat(*tensors: Any) -> list[Any]:
            argument = () if parameter is None else (unflatten(parameter, tensors),)
            with _no_output(where):
                returned = function(*argument)
            found, outputs = _result_of(returned, where)
            kinds.append(found)
            return [tf.identity(output) for output in outputs]

        try:
            graph = tf.function(flat, autograph=False).get_concrete_function(*specs)
        except ConfigError:
            raise
        except _TENSORFLOW_ERRORS as error:
            raise DefinitionError(_where(function, name, error), _what_happened(error)) from error
        _refuse_state(graph, where)
        return TracedFunction(name, parameter, kinds[-1], graph)

    def client_bundle(self, source: ClientSource) -> bytes:
        """See Tracer.

        Raises:
            DefinitionError: The program needs an operation that is not a TFLite built-in.
        """
        return encode_bundle(bundle_of(source))

    def flatbuffer(self, traced: Traced) -> bytes:
        """See Tracer.

        Raises:
            DefinitionError: The function needs an operation that is not a TFLite built-in.
        """
        assert isinstance(traced, TracedFunction)
        kinds = [] if traced.parameter is None else [kind for _, kind in leaves(traced.parameter)]
        ports = [(f"input_{at}", kind if kind.shape else TensorType(kind.dtype, (1,))) for at, kind in enumerate(kinds)]

        def function(tensors: Mapping[str, Any]) -> dict[str, Any]:
            given = [
                tensors[name] if kind.shape else tf.reshape(tensors[name], [])
                for (name, _), kind in zip(ports, kinds, strict=True)
            ]
            return {f"output_{at}": tensor for at, tensor in enumerate(traced.symbolic(*given))}

        try:
            return flatbuffer_of(function, ports, what=traced.name)
        except BadBundle as error:
            raise DefinitionError(traced.name, str(error)) from error


def _where(function: Callable[..., object], name: str, error: Exception | None = None) -> str:
    """Return the author's line and the function's name: the line that raised `error`, else the function's first one."""
    if error is not None:
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
            if not frame.f_code.co_filename.startswith(_NOT_THE_AUTHORS):
                return f"{Path(frame.f_code.co_filename).name}:{line}, {name}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None and not code.co_filename.startswith(_NOT_THE_AUTHORS):
        return f"{Path(code.co_filename).name}:{code.co_firstlineno}, {name}"
    for frame, line in traceback.walk_stack(None):
        if not frame.f_code.co_filename.startswith(_NOT_THE_AUTHORS):
            return f"{Path(frame.f_code.co_filename).name}:{line}, {name}"
    return name


def _specs(parameter: Type, where: str) -> list[Any]:
    if contains(parameter, SequenceType):
        raise DefinitionError(
            where,
            f"a function over tensors takes no sequence such as {parameter}; write it over one element, and use "
            "sv.sequence_map, sv.sequence_reduce or sv.sequence_sum around it",
        )
    return [tf.TensorSpec(kind.shape, _tensorflow_dtype(kind)) for _, kind in leaves(parameter)]


def _tensorflow_dtype(kind: TensorType) -> Any:
    return tf.string if kind.dtype == "str" else tf.as_dtype(kind.dtype)


@contextlib.contextmanager
def _no_output(where: str) -> Iterator[None]:
    """Refuse what a function prints: it would be printed once, now, with no value in it, and never again."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        yield
    if heard.getvalue():
        raise DefinitionError(
            where,
            f"it prints {(heard.getvalue().strip() or ' ').splitlines()[0]!r}. Python runs this function only once, "
            "now, on tensors that have no values yet, and never on a device: remove the print, and return what you "
            "want to see",
        )


def _what_happened(error: Exception) -> str:
    text = str(error)
    told = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    for sign, advice in _ADVICE:
        if sign in text:
            return f"it {advice}"
    return f"it cannot be traced: {told}"


def _result_of(returned: object, where: str) -> tuple[Type, list[Any]]:
    """Return the type of what a function returned, and its tensors in the order of the type's leaves."""
    named = _by_name(returned)
    if named is not None:
        parts = [(str(key), *_result_of(part, where)) for key, part in named.items()]
        return StructType(tuple((key, kind) for key, kind, _ in parts)), [t for _, _, ts in parts for t in ts]
    if isinstance(returned, tuple | list | Record):
        unnamed = [_result_of(part, where) for part in returned]
        return StructType(tuple((None, kind) for kind, _ in unnamed)), [t for _, ts in unnamed for t in ts]
    tensor = _tensor_of(returned, where)
    dtype = "str" if tensor.dtype == tf.string else tensor.dtype.name
    if dtype not in (*DTYPES, "str"):
        raise DefinitionError(
            where, f"it returns {dtype}; use one of {', '.join(DTYPES)}, as by tf.cast(x, tf.float32)"
        )
    if tensor.shape.rank is None:
        raise DefinitionError(where, "it returns a tensor of unknown rank; give it one, as by tf.reshape(x, [-1])")
    return TensorType(dtype, tuple(tensor.shape.as_list())), [tensor]


def _by_name(returned: object) -> Mapping[str, object] | None:
    """Return the parts of a value whose parts all have names, None of any other."""
    if isinstance(returned, Record):
        return dict(returned.items()) if len(returned.keys()) == len(returned) else None
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return dict(zip(returned._fields, returned, strict=True))
    return returned if isinstance(returned, Mapping) else None


def _tensor_of(returned: object, where: str) -> Any:
    if returned is None:
        raise DefinitionError(
            where, "it returns nothing; end it with `return` and a tensor, a dict or a tuple of tensors"
        )
    try:
        return tf.convert_to_tensor(returned)
    except (TypeError, ValueError) as error:
        raise DefinitionError(
            where, f"it returns a {type(returned).__name__}; return a tensor, or a dict or tuple of tensors"
        ) from error


def _refuse_state(graph: Any, where: str) -> None:
    """Refuse what gives another result at every call, or changes something outside: it could not be run again."""
    for operation in graph.graph.get_operations():
        if operation.op_def.is_stateful and operation.type not in _HARMLESS_STATE:
            cure = {
                "PrintV2": "remove tf.print: nobody sees what a device prints",
                "ReadVariableOp": "give the variable's value as an argument",
                "VarHandleOp": "give the variable's value as an argument",
            }.get(operation.type, "draw random numbers outside and give them as an argument")
            raise DefinitionError(
                where, f"it is not a pure function: {operation.type} gives or changes something at every call; {cure}"
            )
