"""Types of values, in TensorFlow Federated's compact notation: `float32[?,64]`, `<a=int32,b=bool>`, `{int8*}@CLIENTS`.

`str(type)` prints the notation and `type_of` reads it. Types are data: frozen, compared by value, and made only where
they are well formed (nothing placed inside a placed type, no sequence inside a sequence). How they relate to one
another is `sottovoce.language.relations`; the Python values they describe are `sottovoce.values`.
"""

from __future__ import annotations

import enum
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sottovoce.errors import ConfigError

Array: TypeAlias = npt.NDArray[Any]
FloatVector: TypeAlias = npt.NDArray[np.float32]
UintVector: TypeAlias = npt.NDArray[np.uint32]

DTYPES = ("float32", "float64", "int8", "int32", "int64", "uint8", "uint32", "uint64", "bool")
"""What tensors on devices are made of."""
HOST_DTYPES = (*DTYPES, "str")
"""What values of the author's own process may be made of; `str` never travels."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""A struct element's name."""

_TENSOR = re.compile(r"(?P<dtype>[a-z]+[0-9]*)(?:\[(?P<shape>(?:\?|\d{1,10})(?:,(?:\?|\d{1,10}))*)\])?")
MAX_DIMENSION = 2**31 - 1
_PYTHON_TYPES: dict[object, str] = {bool: "bool", int: "int32", float: "float32", str: "str"}


class Placement(enum.Enum):
    """Where a federated value lives."""

    CLIENTS = "CLIENTS"
    SERVER = "SERVER"

    def __str__(self) -> str:
        return self.value


CLIENTS = Placement.CLIENTS
SERVER = Placement.SERVER


@dataclass(frozen=True, slots=True)
class TensorType:
    """The dtype and shape of a tensor; an unknown dimension is None, printed as `?`."""

    dtype: str
    shape: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", _dtype_name(self.dtype) or self.dtype)
        if self.dtype not in HOST_DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; use one of {', '.join(HOST_DTYPES)}")
        object.__setattr__(self, "shape", _shape_of(self.shape))

    def __str__(self) -> str:
        dims = ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.dtype}[{dims}]" if self.shape else self.dtype

    @classmethod
    def parse(cls, notation: str) -> TensorType:
        """Return the type of a tensor that may travel, which `notation` (such as `float32[?,64]`) names.

        Raises:
            ConfigError: `notation` is not a tensor type, or is `str`, which never leaves the author's process.
        """
        return _parse_tensor(notation)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of this type."""
        return np.dtype(self.dtype)

    @property
    def size(self) -> int:
        """Number of elements; a type with an unknown dimension has none and raises ConfigError."""
        if None in self.shape:
            raise ConfigError(f"{self} has an unknown dimension, so its size is not known")
        return math.prod(d for d in self.shape if d is not None)

    def admits(self, array: Array) -> bool:
        """Say whether `array` has this dtype and a shape that fits, unknown dimensions fitting any length."""
        # Every port of every step is asked. A name that numpy knows is compared as fast as a dtype, and most shapes
        # are wholly known.
        return array.dtype == self.dtype and (
            array.shape == self.shape
            or (
                array.ndim == len(self.shape)
                and all(want is None or want == have for want, have in zip(self.shape, array.shape, strict=True))
            )
        )


@functools.lru_cache(maxsize=1024)
def _parse_tensor(notation: str) -> TensorType:
    """Parse once: every port of every batch is held against its type."""
    match = _TENSOR.fullmatch(notation)
    if match is None:
        raise ConfigError(f"{notation!r} is not a tensor type; write for example float32, int32[10] or float32[?,64]")
    if match["dtype"] == "str":
        raise ConfigError("a str cannot travel to or from a device; send a number that stands for it, as int32")
    dims = match["shape"].split(",") if match["shape"] else []
    return TensorType(match["dtype"], tuple(None if d == "?" else int(d) for d in dims))


@dataclass(frozen=True, slots=True)
class StructType:
    """An ordered struct; an element without a name has None for one. Prints `<a=float32,b=int32[3]>`."""

    elements: tuple[tuple[str | None, Type], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "elements", _elements_of(self.elements))
        names = self.names
        for name in names:
            if not NAME.fullmatch(name):
                raise ConfigError(f"{name!r} cannot name an element of a struct; use letters, digits and _, as in a_1")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"two elements of a struct are called {twice!r}; give each its own name")

    def __str__(self) -> str:
        return f"<{','.join(str(t) if name is None else f'{name}={t}' for name, t in self.elements)}>"

    def __len__(self) -> int:
        return len(self.elements)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the elements that have one, in order."""
        return tuple(name for name, _ in self.elements if name is not None)

    def index(self, key: int | str) -> int:
        """Return the position of the element named or numbered `key`.

        Raises:
            ConfigError: There is no such element.
        """
        for position, (name, _) in enumerate(self.elements):
            if key in (name, position):
                return position
        known = ", ".join(self.names) or f"0 to {len(self) - 1}" if self.elements else "none at all"
        raise ConfigError(f"{self} has no element {key!r}; it has {known}")


@dataclass(frozen=True, slots=True)
class SequenceType:
    """A sequence of values of one type, of any length; prints `float32*`."""

    element: Type

    def __post_init__(self) -> None:
        object.__setattr__(self, "element", type_of(self.element))
        _refuse_inside(self, self.element, (FederatedType, FunctionType, SequenceType), "a sequence")

    def __str__(self) -> str:
        return f"{self.element}*"


@dataclass(frozen=True, slots=True)
class FunctionType:
    """A function of one parameter (a struct where there are several) or none; prints `(int32 -> bool)`."""

    parameter: Type | None
    result: Type

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameter", None if self.parameter is None else type_of(self.parameter))
        object.__setattr__(self, "result", type_of(self.result))

    def __str__(self) -> str:
        return f"({'' if self.parameter is None else self.parameter} -> {self.result})"


@dataclass(frozen=True, slots=True)
class FederatedType:
    """Values of type `member` at a placement: `{float32}@CLIENTS` one per client, `float32@CLIENTS` all the same.

    `all_equal` is what is usual at the placement where it is not given: True at SERVER, which is one place, else False.
    """

    member: Type
    placement: Placement
    all_equal: bool = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "member", type_of(self.member))
        if not isinstance(self.placement, Placement):
            raise ConfigError(f"a placement is sv.CLIENTS or sv.SERVER, not {self.placement!r}")
        _refuse_inside(self, self.member, (FederatedType, FunctionType), "a placed type")
        if self.all_equal is None:
            object.__setattr__(self, "all_equal", self.placement is SERVER)
        if self.placement is SERVER and not self.all_equal:
            raise ConfigError(f"the server holds one value, not one per client: write {self.member}@SERVER")

    def __str__(self) -> str:
        return f"{self.member}@{self.placement}" if self.all_equal else f"{{{self.member}}}@{self.placement}"


Type: TypeAlias = TensorType | StructType | SequenceType | FunctionType | FederatedType


def children(kind: Type) -> Iterator[Type]:
    """Yield the types that `kind` is directly made of."""
    match kind:
        case StructType():
            yield from (element for _, element in kind.elements)
        case SequenceType():
            yield kind.element
        case FunctionType():
            yield from (part for part in (kind.parameter, kind.result) if part is not None)
        case FederatedType():
            yield kind.member
        case TensorType():
            pass


def contains(kind: Type, *classes: type[Type]) -> Type | None:
    """Return `kind` or the first part of it, depth first, that is of one of `classes`; None where there is none."""
    if isinstance(kind, classes):
        return kind
    return next((found for child in children(kind) if (found := contains(child, *classes)) is not None), None)


def _refuse_inside(whole: Type, part: Type, classes: tuple[type[Type], ...], where: str) -> None:
    found = contains(part, *classes)
    if found is not None:
        raise ConfigError(f"{found} cannot stand inside {where}, as in {whole}; only tensors and structs of them can")


def at_server(member: object) -> FederatedType:
    """Return `member@SERVER`; `member` is whatever `type_of` takes."""
    return FederatedType(type_of(member), SERVER, all_equal=True)


def at_clients(member: object, *, all_equal: bool = False) -> FederatedType:
    """Return `{member}@CLIENTS`, or `member@CLIENTS` where `all_equal`; `member` is whatever `type_of` takes."""
    return FederatedType(type_of(member), CLIENTS, all_equal=all_equal)


def type_of(description: object) -> Type:
    """Return the type that `description` stands for.

    Args:
        description: A type; the notation (`"{float32}@CLIENTS"`); a numpy dtype or scalar type; `bool`, `int` (int32),
            `float` (float32) or `str`; a TensorFlow dtype; a pair of a dtype and a shape, `(np.float32, (10,))`; or a
            mapping, named tuple, tuple or list of such descriptions, or a list of pairs of a name and one, which is a
            struct.

    Raises:
        ConfigError: It is none of these, or the notation is wrong.
    """
    match description:
        case TensorType() | StructType() | SequenceType() | FunctionType() | FederatedType():
            return description
        case str():
            from sottovoce.notation import parse  # it builds these very types, so it can only follow them

            return parse(description)
        case (dtype, (*dims,)) if dims and all(d is None or isinstance(d, int) for d in dims):
            return _tensor_of(dtype, dims)
        case Mapping():
            return StructType(tuple((str(name), type_of(part)) for name, part in description.items()))
        case [*pairs] if pairs and all(map(_is_named, pairs)):
            return StructType(_elements_of(pairs))
        case tuple() | list():
            names = getattr(description, "_fields", (None,) * len(description))
            return StructType(tuple((n, type_of(part)) for n, part in zip(names, description, strict=True)))
        case _ if (name := _dtype_name(description)) is not None:
            return TensorType(name)
    raise ConfigError(
        f"{description!r} does not name a type; write the notation, such as 'float32[10]' or '{{int32}}@CLIENTS', "
        "or a numpy dtype, or a dict or tuple of those for a struct"
    )


def _dtype_name(description: object) -> str | None:
    """Return the name of a dtype of numpy, TensorFlow or Python; None where it is none."""
    if hasattr(type(description), "as_numpy_dtype"):  # TensorFlow's, which need not be installed
        description = getattr(description, "as_numpy_dtype")  # noqa: B009 - no attribute of `object`
    if isinstance(description, np.dtype):
        return str(description.name)
    if isinstance(description, type) and (issubclass(description, np.generic) or description in _PYTHON_TYPES):
        return _PYTHON_TYPES.get(description) or str(np.dtype(description).name)
    return None


def _shape_of(shape: Any) -> tuple[int | None, ...]:
    """Return `shape` as a tuple of whole numbers, None where a dimension is not known."""
    if not isinstance(shape, tuple | list):
        raise ConfigError(f"a shape is a tuple of dimensions, such as (10,) or (None, 3), not {shape!r}")
    for dimension in shape:
        is_whole = isinstance(dimension, int | np.integer) and not isinstance(dimension, bool)
        if dimension is not None and not (is_whole and 0 <= dimension <= MAX_DIMENSION):
            raise ConfigError(
                f"a dimension is a number from 0 to {MAX_DIMENSION}, or None where it is not known, not {dimension!r}"
            )
    return tuple(None if dimension is None else int(dimension) for dimension in shape)


def _elements_of(elements: Any) -> tuple[tuple[str | None, Type], ...]:
    """Return the elements of a struct from a mapping, or from pairs of a name (None for none) and a type."""
    pairs = elements.items() if isinstance(elements, Mapping) else elements
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str | None) for pair in pairs):
        raise ConfigError(
            "a struct is made of pairs of a name (None for none) and a type, such as "
            "StructType([('a', 'float32'), (None, 'int32[3]')]), or of a dict"
        )
    return tuple((name, type_of(kind)) for name, kind in pairs)


def _is_named(pair: object) -> bool:
    """Say whether `pair` is a name and what it names, not a dtype and a shape or two types."""
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
        return False
    return NAME.fullmatch(pair[0]) is not None and pair[0] not in HOST_DTYPES


def _tensor_of(dtype: object, dims: list[Any]) -> TensorType:
    scalar = type_of(dtype)
    if not isinstance(scalar, TensorType) or scalar.shape:
        raise ConfigError(f"{dtype!r} with the shape {dims} is not a tensor type; write for example 'float32[10]'")
    return TensorType(scalar.dtype, tuple(dims))
