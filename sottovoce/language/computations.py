"""Computations: typed functions that an author defines once and calls with numbers, or inside other computations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import numpy as np

from sottovoce.errors import ConfigError, DefinitionError
from sottovoce.language import interpreter
from sottovoce.language.arguments import bind, checked
from sottovoce.language.context import current_executor
from sottovoce.language.definition import (
    Value,
    current_definition,
    define,
    described,
    site,
)
from sottovoce.language.expressions import Body, Composite, HostFunction, LocalFunction, parameter_of
from sottovoce.language.relations import check_assignable
from sottovoce.language.sources import here
from sottovoce.language.tracing import is_symbolic, trace
from sottovoce.types import FederatedType, FunctionType, SequenceType, StructType, Type, contains, type_of
from sottovoce.values import flatten, struct_value, unflatten

if TYPE_CHECKING:
    from sottovoce.language.lowered import Lowered

_Decorator: TypeAlias = Callable[[Callable[..., object]], "Computation"]
_Described: TypeAlias = Type | str | Mapping[str, Any] | tuple[Any, ...] | list[Any] | np.dtype[Any]
_T = TypeVar("_T")


class Computation:
    """A typed function. Calling it runs it in the current executor; inside a definition it becomes a part of that.

    Attributes:
        name: The author's name for it.
        kind: The decorator that made it, such as `federated_computation`.
        body: What it does, as data.
        local: It as a local function, for `federated_map` and the like; None if anything in it is placed.
    """

    def __init__(self, kind: str, function: Callable[..., object], body: Body, local: LocalFunction | None) -> None:
        """Made by the decorators of this module."""
        functools.update_wrapper(self, function.func if isinstance(function, functools.partial) else function)
        self.name = _name_of(function)
        self.kind = kind
        self.body = body
        self.local = local

    @property
    def type_signature(self) -> FunctionType:
        """The type: one parameter stands for itself, several are a struct by name."""
        return FunctionType(self.body.parameter, self.body.result_type)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name} {self.type_signature}>"

    def __call__(self, *arguments: object, **named: object) -> Any:
        """Run it, or inside a definition add it.

        Args:
            *arguments: As the author's function takes them; by position or by name.
            **named: See `arguments`.

        Raises:
            DefinitionError: Arguments are missing or too many.
            TypeMismatch: An argument is not of the declared type; the text prints both.
        """
        where = f"{here()}, {self.name}"
        given = bind(self.name, self.body.parameters, arguments, named, where)
        if is_symbolic():
            return self._apply_symbolically(given, where)
        if current_definition() is not None:
            return self._add(given)
        stray = next((value for value in given if isinstance(value, Value)), None)
        if stray is not None:
            raise DefinitionError(where, f"{described(stray)} is of a definition that is over; give a number")
        values = {
            parameter: checked(self.name, parameter, kind, value)
            for (parameter, kind), value in zip(self.body.parameters, given, strict=True)
        }
        if self.local is not None:
            return interpreter.apply(self.local, _packed(self.body, list(values.values())))
        return current_executor().run(self, values)

    def plan(self, *arguments: object, **named: object) -> str:
        """Return what a device would be asked, in words that a device's owner understands.

        Args:
            *arguments: Optional: the arguments of the call that is meant, as `sv.latest("temperature", 0, 40)`.
            **named: See `arguments`.

        Raises:
            ConfigError: It cannot run on a fleet; the text names the operator, the line and the cure.
        """
        lowered, values = self._lowered(arguments, named)
        return lowered.describe(collection=lowered.collection_of(values))

    def save(self, path: str | Path, *arguments: object, **named: object) -> None:
        """Write it, lowered, to a file that runs without TensorFlow; see `plan`."""
        lowered, _ = self._lowered(arguments, named)
        lowered.save(Path(path))

    def _lowered(self, arguments: Sequence[object], named: Mapping[str, object]) -> tuple[Lowered, dict[str, Any]]:
        """Return it lowered for the arguments of the call that is meant, and these; none where none are given."""
        from sottovoce.language.lowering import lower

        if not arguments and not named:
            return lower(self), {}
        given = bind(self.name, self.body.parameters, arguments, named, f"{here()}, {self.name}")
        values = {
            parameter: checked(self.name, parameter, kind, value)
            for (parameter, kind), value in zip(self.body.parameters, given, strict=True)
        }
        return lower(self, values), values

    def _add(self, given: Sequence[object]) -> Value:
        """Add this computation to the definition that is going on."""
        place = site(self.name)
        if self.local is None and not place.definition.placed:
            place.refuse(
                f"it is a federated computation, and {place.definition.name} is mapped over the values of one member; "
                "call it beside federated_map instead"
            )
        kinds = [kind for _, kind in self.body.parameters]
        values = [place.value(value, kind) for value, kind in zip(given, kinds, strict=True)]
        for (parameter, kind), value in zip(self.body.parameters, values, strict=True):
            self._check_placement(place.where, kind, value)
            what = f"{place.where}: argument {parameter}"
            check_assignable(kind, value.type_signature, what=what)
        if self.local is None:
            return place.definition.inline(self.body, values)
        if len(values) > 1:
            parts = zip(self.body.parameters, values, strict=True)
            kind = StructType(tuple((name, value.type_signature) for (name, _), value in parts))
            values = [place.step("struct", values, kind)]
        return place.step("call", values, self.local.result, functions=(self.local,))

    def _check_placement(self, where: str, kind: Type, value: Value) -> None:
        given = value.type_signature
        if isinstance(given, FederatedType) and not isinstance(kind, FederatedType):
            raise DefinitionError(
                where,
                f"{described(value)} is placed, and {self.name} takes values without a placement: "
                f"use sv.federated_map({self.name}, value), which applies it where the value is",
            )
        if isinstance(kind, FederatedType) and not contains(given, FederatedType):
            raise DefinitionError(
                where,
                f"{described(value)} is not placed, and {self.name} takes {kind}: "
                f"use sv.federated_value(value, sv.{kind.placement})",
            )

    def _apply_symbolically(self, given: Sequence[object], where: str) -> Any:
        """Apply it to tensors of the graph that is being traced."""
        symbolic = getattr(self.local, "symbolic", None)
        if symbolic is None:
            raise DefinitionError(
                where,
                f"a {self.kind} cannot be called inside a function that TensorFlow traces; "
                "call it beside that function, or decorate it with @sv.tf_computation",
            )
        leaves = [
            leaf for (_, kind), value in zip(self.body.parameters, given, strict=True) for leaf in flatten(kind, value)
        ]
        return unflatten(self.body.result_type, symbolic(*leaves))


@overload
def tf_computation(function: Callable[..., object], /, *types: Any) -> Computation: ...
@overload
def tf_computation(*types: _Described) -> _Decorator: ...
def tf_computation(*types: Any) -> Computation | _Decorator:
    """Return a decorator for a function over tensors, written in TensorFlow; it may be mapped at CLIENTS.

    The function is traced once, when it is decorated, so that it travels as data.

    Args:
        *types: The types of its parameters, as `sottovoce.types.type_of` takes them. A function may come first
            (`sv.tf_computation(lambda x: x + 1, "int32")`), and without parameters the decorator needs no brackets.

    Raises:
        ConfigError: TensorFlow is not installed, or the types do not fit the function's parameters.
        DefinitionError: The function cannot be traced.
    """

    def decorate(function: Callable[..., object], kinds: Sequence[Type]) -> Computation:
        parameters = _parameters("tf_computation", function, kinds)
        for name, kind in parameters:
            _refuse_placed("tf_computation", function, name, kind)
            if contains(kind, SequenceType):
                text = (
                    f"parameter {name} is {kind}; TensorFlow gets one element: use sv.sequence_map or sequence_reduce"
                )
                raise DefinitionError(_where(function), text)
        single = _single_argument(function, len(parameters))
        traced = trace(single, parameter_of(parameters), name=_name_of(function))
        return _local_computation("tf_computation", function, parameters, traced)

    return _decorator(types, decorate)


def server_computation(*types: Any, result: object) -> _Decorator:
    """Return a decorator for a Python function over numpy values; it runs where the program runs, so only at SERVER.

    Args:
        *types: The types of its parameters.
        result: The type of what it returns; the value is checked against it.

    Raises:
        ConfigError: The types do not fit the function's parameters, or are placed.
    """
    returned = type_of(result)

    def decorate(function: Callable[..., object], kinds: Sequence[Type]) -> Computation:
        parameters = _parameters("server_computation", function, kinds)
        for name, kind in (*parameters, ("result", returned)):
            _refuse_placed("server_computation", function, name, kind)
        single = _single_argument(function, len(parameters))
        host = HostFunction(_name_of(function), parameter_of(parameters), returned, single)
        return _local_computation("server_computation", function, parameters, host)

    kinds = tuple(map(type_of, types))
    return lambda function: decorate(function, kinds)


@overload
def federated_computation(function: Callable[..., object], /, *types: Any) -> Computation: ...
@overload
def federated_computation(*types: _Described) -> _Decorator: ...
def federated_computation(*types: Any) -> Computation | _Decorator:
    """Return a decorator for a function over placed values, described with the operators of this language.

    The function runs once, when it is decorated; types are checked then.

    Args:
        *types: The types of its parameters, such as `"{float32}@CLIENTS"`; see `tf_computation`.

    Raises:
        DefinitionError: The function needs a number, or an operator cannot be used as it is.
        TypeMismatch: A value is not of the type that an operator needs.
    """

    def decorate(function: Callable[..., object], kinds: Sequence[Type]) -> Computation:
        parameters = _parameters("federated_computation", function, kinds)
        name = _name_of(function)
        placed = any(contains(kind, FederatedType) for kind in kinds)
        body = define(name, function, parameters, placed=True)
        placed = placed or any(contains(step.type, FederatedType) for step in body.steps)
        return Computation("federated_computation", function, body, None if placed else Composite(name, body))

    return _decorator(types, decorate)


def _decorator(
    types: Sequence[Any], decorate: Callable[[Callable[..., object], Sequence[Type]], Computation]
) -> Computation | _Decorator:
    """Return the decorator, or the computation where the function came first."""
    if types and isinstance(types[0], Computation):
        raise ConfigError(f"{types[0]!r} is a computation already; decorate a Python function")
    if types and (inspect.isroutine(types[0]) or isinstance(types[0], functools.partial)):
        return decorate(types[0], tuple(map(type_of, types[1:])))
    kinds = tuple(map(type_of, types))
    return lambda function: decorate(function, kinds)


def _local_computation(
    kind: str, function: Callable[..., object], parameters: tuple[tuple[str, Type], ...], local: LocalFunction
) -> Computation:
    """Return the computation that applies `local` to its parameters."""
    body = define(_name_of(function), _caller(kind, local), parameters, placed=False)
    return Computation(kind, function, body, local)


def _caller(operator: str, local: LocalFunction) -> Callable[..., Value]:
    def call(*values: Value) -> Value:
        place = site(operator)
        inputs = list(values)
        if len(values) > 1:
            assert local.parameter is not None
            inputs = [place.step("struct", values, local.parameter)]
        return place.step("call", inputs, local.result, functions=(local,))

    return call


def _parameters(kind: str, function: Callable[..., object], kinds: Sequence[Type]) -> tuple[tuple[str, Type], ...]:
    """Return name and type of every parameter of the author's function."""
    if not callable(function):
        raise ConfigError(f"sv.{kind} decorates a function, not {function!r}; types of parameters go into the brackets")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    declared = [p for p in inspect.signature(function).parameters.values() if p.kind in positional]
    required = [p for p in declared if p.default is inspect.Parameter.empty]
    if not len(required) <= len(kinds) <= len(declared):
        names = ", ".join(p.name for p in declared) or "none"
        types = ", ".join(map(str, kinds)) or "none"
        raise DefinitionError(
            _where(function),
            f"sv.{kind} declares the types ({types}), and the function takes ({names}); "
            "give one type for each parameter, in order",
        )
    return tuple((p.name, kind_) for p, kind_ in zip(declared, kinds, strict=False))


def _refuse_placed(decorator: str, function: Callable[..., object], name: str, kind: Type) -> None:
    if placed := contains(kind, FederatedType):
        member = placed.member if isinstance(placed, FederatedType) else placed
        raise DefinitionError(
            _where(function),
            f"{name} is {kind}; a {decorator} sees the value of one place, so declare {member} and apply it with "
            "sv.federated_map inside a @sv.federated_computation",
        )


def _single_argument(function: Callable[..., _T], count: int) -> Callable[..., _T]:
    """Return `function` as one of no or one argument, the struct of several."""
    return function if count < 2 else lambda argument: function(*argument)


def _packed(body: Body, values: list[Any]) -> Any:
    """Return the one argument that a local function with these parameters takes."""
    if len(values) < 2:
        return values[0] if values else None
    assert isinstance(body.parameter, StructType)
    return struct_value(body.parameter, values)


def _name_of(function: Callable[..., object]) -> str:
    if isinstance(function, functools.partial):
        return _name_of(function.func)
    name = getattr(function, "__name__", type(function).__name__)
    return "lambda" if name == "<lambda>" else name


def _where(function: Callable[..., object]) -> str:
    return f"{here()}, {_name_of(function)}"
