"""The arguments of a call: Python's binding, checked against the declared types; values that live on the devices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sottovoce.errors import ConfigError, DefinitionError, TypeMismatch
from sottovoce.language.ports import Bound
from sottovoce.types import CLIENTS, FederatedType, FunctionType, SequenceType, Type
from sottovoce.values import to_value

NAME_ON_DEVICES = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""How collections and slots of client state are called."""


@dataclass(frozen=True, slots=True)
class DeviceValues:
    """Values that live on the devices, as an argument of a computation: made by `latest` and `collection`.

    Attributes:
        kind: `latest`: the newest example of every device; `collection`: all of them, as a sequence.
        name: The collection of local examples.
        bound: What the author knows of every coordinate; None for nothing.
    """

    kind: Literal["latest", "collection"]
    name: str
    bound: Bound | None = None

    def __str__(self) -> str:
        return f"sv.{self.kind}({self.name!r})"


def latest(name: str, low: float | None = None, high: float | None = None) -> DeviceValues:
    """Return the newest example of the collection `name` on every device, for a parameter `{T}@CLIENTS`.

    Args:
        name: The collection.
        low: Smallest value of every coordinate, in its own units; what lies below is clamped on the device.
        high: Largest value; give both or none.

    Raises:
        ConfigError: Only one of the two bounds is given, or they are no interval.
    """
    return _device_values("latest", name, low, high)


def collection(name: str, low: float | None = None, high: float | None = None) -> DeviceValues:
    """Return the collection `name` of every device as a sequence, for a parameter `{T*}@CLIENTS`; see `latest`."""
    return _device_values("collection", name, low, high)


def bind(
    name: str, parameters: Sequence[tuple[str, Type]], given: Sequence[object], named: Mapping[str, object], where: str
) -> list[object]:
    """Return one argument for each parameter, in order, as Python binds positional and keyword arguments.

    Raises:
        DefinitionError: There are too many, too few, unknown or repeated ones; the text shows the parameters.
    """
    declared = [parameter for parameter, _ in parameters]
    bound = dict(zip(declared, given, strict=False))
    problems = []
    if len(given) > len(declared):
        problems.append(f"{len(given)} arguments are given, {len(declared)} are declared")
    if twice := [key for key in named if key in bound]:
        problems.append(f"given twice: {', '.join(twice)}")
    if unknown := [key for key in named if key not in declared]:
        problems.append(f"unknown: {', '.join(unknown)}")
    bound.update(named)
    if missing := [key for key in declared if key not in bound]:
        problems.append(f"missing: {', '.join(missing)}")
    if problems:
        takes = ", ".join(f"{key}: {kind}" for key, kind in parameters)
        raise DefinitionError(where, f"{'; '.join(problems)}. It takes {f'({takes})' if takes else 'no arguments'}")
    return [bound[key] for key in declared]


def checked(name: str, parameter: str, kind: Type, given: object) -> Any:
    """Return `given` in canonical form as the argument `parameter` of the computation `name`.

    Raises:
        TypeMismatch: It is no value of type `kind`; the text prints both.
    """
    what = f"argument {parameter} of {name}"
    if isinstance(given, DeviceValues):
        _check_device_values(given, kind, what)
        return given
    if callable(given) and isinstance(signature := getattr(given, "type_signature", None), FunctionType):
        cure = "Call the computation, and give what it returns."
        raise TypeMismatch(what, expected=kind, found=signature, cure=cure)
    return to_value(kind, given, what=what)


def _check_device_values(given: DeviceValues, kind: Type, what: str) -> None:
    if isinstance(kind, FederatedType) and kind.placement is CLIENTS and not kind.all_equal:
        is_sequence = isinstance(kind.member, SequenceType)
        if is_sequence == (given.kind == "collection"):
            return
        other = "collection" if is_sequence else "latest"
        cure = f"Write sv.{other}({given.name!r}): latest is one value a device, collection is a sequence of them."
    else:
        cure = "Only a parameter {T}@CLIENTS, one value a device, takes its values from the devices."
    found = "{T}@CLIENTS" if given.kind == "latest" else "{T*}@CLIENTS"
    raise TypeMismatch(what, expected=kind, found=f"{given}, which is {found}", cure=cure)


def _device_values(
    kind: Literal["latest", "collection"], name: str, low: float | None, high: float | None
) -> DeviceValues:
    if not isinstance(name, str) or not NAME_ON_DEVICES.fullmatch(name):
        raise ConfigError(
            f"sv.{kind} takes the name of a collection of the devices, 1 to 64 characters of A-Z a-z 0-9 _ -, as in "
            f"sv.{kind}('temperature'), not {name!r}"
        )
    if low is None and high is None:
        return DeviceValues(kind, name)
    try:
        return DeviceValues(kind, name, Bound(float(low), float(high)))  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError, ConfigError) as error:
        raise ConfigError(
            f"sv.{kind}({name!r}): give both low= and high=, finite numbers, the lower one first, or neither, not "
            f"({low!r}, {high!r})"
        ) from error
