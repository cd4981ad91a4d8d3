"""Functions that every executor knows without tracing: `cast`, `clip`, `identity`.

They fit any value whose tensors allow it, so each is a `GenericBuiltin` until an operator applies it to a type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sottovoce.errors import ConfigError, DefinitionError
from sottovoce.language.definition import Value, described, site
from sottovoce.language.expressions import Builtin
from sottovoce.language.ports import Bound
from sottovoce.language.sources import here
from sottovoce.types import (
    DTYPES,
    FederatedType,
    FunctionType,
    SequenceType,
    StructType,
    TensorType,
    Type,
    contains,
    type_of,
)
from sottovoce.values import flatten, leaves, unflatten

GUARD = "guard what makes it, as by tf.math.divide_no_nan or tf.maximum(x, 1e-6)"
"""What an author can do about NaN and infinity."""


@dataclass(frozen=True, slots=True)
class GenericBuiltin:
    """A builtin before its type is known; callable on the values of a mapped function.

    Attributes:
        name: Of the builtin.
        words: As the author wrote it, for errors: `cast("float32")`.
        bound: Of `clip`.
    """

    name: Literal["cast", "clip", "identity"]
    words: str
    result_of: Callable[[TensorType], TensorType] = field(repr=False)
    bound: Bound | None = None

    def __repr__(self) -> str:
        return f"sv.{self.words}"

    def specialise(self, parameter: Type, where: str) -> Builtin:
        """Return it as a function of `parameter`.

        Raises:
            DefinitionError: `parameter` holds a sequence, text, or a number that it cannot take.
        """
        if contains(parameter, SequenceType, FunctionType, FederatedType) and self.name != "identity":
            raise DefinitionError(where, f"{self!r} takes tensors and structs of them, not {parameter}")
        try:
            return Builtin(self.name, parameter, _mapped(parameter, self.result_of), self.bound)
        except ConfigError as error:
            raise DefinitionError(where, f"{self!r} cannot take {parameter}: {error}") from error

    def __call__(self, given: Any) -> Value:
        """Apply it inside a mapped function.

        Raises:
            DefinitionError: No definition is going on, or the value is placed.
        """
        place = site(self.name)
        value = place.value(given)
        if isinstance(value.type_signature, FederatedType):
            place.refuse(f"{described(value)} is placed: write sv.federated_map(sv.{self.words}, value)")
        builtin = self.specialise(value.type_signature, f"{here()}, {self.name}")
        return place.step("call", [value], builtin.result, functions=(builtin,))


def cast(dtype: object) -> GenericBuiltin:
    """Return the function that turns every number into `dtype`, towards zero where a fraction is lost; bool is 0 or 1.

    What an integer dtype cannot hold becomes its smallest or largest value. NaN and infinity are no numbers that could
    be cast to one: the reference executor refuses them, and a device that meets one takes no part.

    Args:
        dtype: Such as `"float32"`, or a dtype of numpy or TensorFlow.

    Raises:
        ConfigError: `dtype` is not one that devices have.
    """
    _refuse_value("cast", "dtype", dtype)
    kind = type_of(dtype) if not isinstance(dtype, str) or dtype in DTYPES else None
    if not isinstance(kind, TensorType) or kind.shape or kind.dtype not in DTYPES:
        raise ConfigError(f"cast: {dtype!r} is no dtype of numbers; use one of {', '.join(DTYPES)}")
    name = kind.dtype

    def result_of(kind: TensorType) -> TensorType:
        _refuse_text(kind)
        return TensorType(name, kind.shape)

    return GenericBuiltin("cast", f"cast({name!r})", result_of)


def clip(low: float, high: float) -> GenericBuiltin:
    """Return the function that puts every coordinate into `low`..`high`, which also bounds it for a fleet.

    Args:
        low: Smallest value, in the value's own units; whole for integers.
        high: Largest value.

    Raises:
        ConfigError: They are no interval.
    """
    _refuse_value("clip", "low, high", low)
    try:
        bound = Bound(float(low), float(high))
    except (TypeError, ValueError, ConfigError) as error:
        raise ConfigError(f"clip takes two finite numbers, the lower one first, not ({low!r}, {high!r})") from error

    def result_of(kind: TensorType) -> TensorType:
        _refuse_text(kind)
        if kind.dtype == "bool":
            raise ConfigError("a truth value is 0 or 1 anyway; cast it first if you need a number")
        if kind.numpy_dtype.kind == "f" and max(abs(bound.low), abs(bound.high)) > float(
            np.finfo(kind.numpy_dtype).max
        ):
            raise ConfigError(f"a {kind.dtype} holds no such limits")
        if kind.numpy_dtype.kind in "iu":
            limits = np.iinfo(kind.numpy_dtype)
            if not (bound.low.is_integer() and bound.high.is_integer()):
                raise ConfigError(f"the limits of {kind} must be whole numbers")
            if not limits.min <= bound.low <= bound.high <= limits.max:
                raise ConfigError(f"a {kind.dtype} holds {limits.min} to {limits.max}")
        return kind

    return GenericBuiltin("clip", f"clip({low!r}, {high!r})", result_of, bound)


identity = GenericBuiltin("identity", "identity", lambda kind: kind)
"""The function that returns its argument."""


def apply_builtin(builtin: Builtin, argument: Any) -> Any:
    """Return what `builtin` makes of `argument`, in numpy."""
    match builtin.name:
        case "identity":
            return argument
        case "cast":
            targets = [kind for _, kind in leaves(builtin.result)]
            pairs = zip(flatten(builtin.parameter, argument), targets, strict=True)
            return unflatten(builtin.result, [_cast(leaf, kind) for leaf, kind in pairs])
        case "clip":
            assert builtin.bound is not None
            return clipped(builtin.parameter, argument, builtin.bound)


def clipped(kind: Type, argument: Any, bound: Bound) -> Any:
    """Return `argument`, of type `kind`, with every coordinate put into `bound`; dtypes stay."""
    flat = flatten(kind, argument)
    return unflatten(kind, [np.clip(leaf, *_limits(leaf.dtype, bound)) for leaf in flat])


def _limits(dtype: np.dtype[Any], bound: Bound) -> tuple[Any, Any]:
    """Return the bound in `dtype`, so that clipping keeps the dtype."""
    if dtype.kind == "f":
        return dtype.type(bound.low), dtype.type(bound.high)
    limits = np.iinfo(dtype)
    low, high = int(np.ceil(bound.low)), int(np.floor(bound.high))
    return dtype.type(min(max(low, limits.min), limits.max)), dtype.type(max(min(high, limits.max), limits.min))


def _cast(leaf: Any, kind: TensorType) -> Any:
    """Return `leaf` in the dtype of `kind`; beyond what an integer holds its nearest end.

    Raises:
        ConfigError: It holds NaN or infinity, and `kind` is of whole numbers or truth values.
    """
    dtype = kind.numpy_dtype
    if dtype.kind != "f" and not np.all(np.isfinite(leaf)):
        raise ConfigError(
            f"cast: NaN and infinity are no {kind.dtype}, and a device that meets one takes no part; {GUARD}"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        cast = leaf.astype(dtype)
    if dtype.kind not in "iu" or leaf.dtype.kind != "f":
        return cast
    limits = np.iinfo(dtype)
    low, high = (dtype.type(end) for end in (limits.min, limits.max))
    return np.select([leaf >= float(limits.max), leaf <= float(limits.min)], [high, low], cast).astype(dtype)[()]


def _mapped(kind: Type, result_of: Callable[[TensorType], TensorType]) -> Type:
    match kind:
        case TensorType():
            return result_of(kind)
        case StructType():
            return StructType(tuple((name, _mapped(element, result_of)) for name, element in kind.elements))
        case _:
            return kind


def _refuse_value(name: str, takes: str, given: object) -> None:
    if isinstance(given, Value):
        raise DefinitionError(
            f"{here()}, {name}",
            f"sv.{name}({takes}) is a function, to be mapped over values: sv.federated_map(sv.{name}({takes}), value)",
        )


def _refuse_text(kind: TensorType) -> None:
    if kind.dtype == "str":
        raise ConfigError("text is no number")
