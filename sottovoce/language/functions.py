"""Whatever an author hands to an operator as a function, as a local function of a known type."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from sottovoce.language.builtins import GenericBuiltin
from sottovoce.language.computations import Computation
from sottovoce.language.definition import Site, Value, define
from sottovoce.language.expressions import Builtin, ClientProgram, Composite, HostFunction, LocalFunction
from sottovoce.language.relations import check_assignable
from sottovoce.types import CLIENTS, Placement, StructType, Type


def local_function(
    given: object, parameter: Type | None, place: Site, *, placement: Placement | None = None
) -> LocalFunction:
    """Return `given` as a function of one argument of type `parameter`.

    Args:
        given: A computation, a builtin such as `sv.cast("float32")`, a client program, or a Python function over
            values, which is described once on the type `parameter`.
        parameter: The type of its argument, None where it takes none.
        place: The author's call.
        placement: Where it will run, if that is known.

    Raises:
        DefinitionError: It is no function, or cannot run at `placement`.
        TypeMismatch: Its parameter is not of type `parameter`.
    """
    function = _converted(given, parameter, place)
    if parameter is None and function.parameter is not None:
        place.refuse(f"{function.name} takes {function.parameter}; give a function without parameters")
    if parameter is not None:
        if function.parameter is None:
            place.refuse(f"{function.name} takes no argument; give a function of {parameter}")
        what = f"{place.where}: the argument of {function.name}"
        check_assignable(function.parameter, parameter, what=what)
    if placement is CLIENTS and (host := host_function_in(function)):
        place.refuse(
            f"{host.name} is Python code of this process, and no Python travels to the devices. "
            "Write it in TensorFlow and decorate it with @sv.tf_computation, or map it at SERVER"
        )
    if placement is not CLIENTS and isinstance(function, ClientProgram):
        place.refuse(f"the client program {function.name!r} runs on devices: map it over values at CLIENTS")
    return function


def host_function_in(function: LocalFunction) -> HostFunction | None:
    """Return the Python function that `function` is or calls, None if it can travel."""
    if isinstance(function, HostFunction):
        return function
    if isinstance(function, Composite):
        inner = (f for step in function.body.steps for f in step.functions)
        return next((host for f in inner if (host := host_function_in(f)) is not None), None)
    return None


def _converted(given: object, parameter: Type | None, place: Site) -> LocalFunction:
    if isinstance(given, Computation):
        if given.local is None:
            place.refuse(
                f"{given.name} is a federated computation ({given.type_signature}); it is called, not mapped over "
                "members: write its line beside this one"
            )
        return given.local
    if isinstance(given, GenericBuiltin):
        if parameter is None:
            place.refuse(f"{given!r} needs an argument")
        return given.specialise(parameter, place.where)
    if isinstance(given, Builtin | ClientProgram | Composite | HostFunction):
        return given
    if isinstance(given, Value) or not callable(given):
        place.refuse(f"the function comes first, then the value: {given!r} is no function")
    return _described(given, parameter, place)


def _described(function: Callable[..., Any], parameter: Type | None, place: Site) -> Composite:
    """Return a plain Python function over values as a composite."""
    name = getattr(function, "__name__", "function")
    name = "lambda" if name == "<lambda>" else name
    if parameter is None:
        return Composite(name, define(name, function, (), placed=False))
    count = _required(function)
    if isinstance(parameter, StructType) and count > 1:
        if count != len(parameter):
            place.refuse(f"{name} takes {count} arguments, and {parameter} has {len(parameter)} elements")
        function = _unpacking(function)
    return Composite(name, define(name, function, (("argument", parameter),), placed=False))


def _unpacking(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def unpacked(argument: Any) -> Any:
        return function(*argument)

    return unpacked


def _required(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function written in C that does not say
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
