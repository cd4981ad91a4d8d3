"""Python values of typed things: checked once against a type, walked leaf by leaf, and handed back.

The canonical form of a value: a numpy scalar (rank 0) or array of exactly the declared dtype for a tensor, `str` for a
string; a `Record` for a struct with names and a tuple for one without; a list for a sequence; the member itself for
what is the same everywhere (`T@SERVER`, `T@CLIENTS`), and a tuple, one member a client, for `{T}@CLIENTS`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, Set
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np

from sottovoce.errors import ConfigError, TypeMismatch
from sottovoce.types import Array, FederatedType, FunctionType, SequenceType, StructType, TensorType, Type

_T = TypeVar("_T")
_EXACT_INTEGERS = {"float32": 2**24, "float64": 2**53}
"""Integers up to this size are floats without rounding."""


class Record(Generic[_T]):
    """The value of a struct with names: `record.a`, `record["a"]` and `record[0]` are the same element.

    It is immutable, iterates over its values as a named tuple does (`a, b = record`), and has the methods of a mapping
    (`dict(record)`, `{**record}`). Records are equal where their names and values are, arrays element by element.
    """

    __slots__ = ("_names", "_values")
    __hash__ = None  # type: ignore[assignment]  # its values are mostly arrays
    _names: tuple[str | None, ...]
    _values: tuple[_T, ...]

    def __init__(self, elements: Mapping[str, _T] | Iterable[tuple[str | None, _T]]) -> None:
        pairs = tuple(elements.items() if isinstance(elements, Mapping) else elements)
        object.__setattr__(self, "_names", tuple(name for name, _ in pairs))
        object.__setattr__(self, "_values", tuple(value for _, value in pairs))

    def __getitem__(self, key: str | int) -> _T:
        if isinstance(key, str):
            if key not in self._names:
                raise KeyError(f"{key!r} is not among {', '.join(self.keys())}")
            return self._values[self._names.index(key)]
        return self._values[key]

    def __getattr__(self, name: str) -> _T:
        if name.startswith("__") or name in Record.__slots__ or name not in self._names:
            raise AttributeError(f"this record has no element {name!r}")
        return self._values[self._names.index(name)]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a record does not change; make a new one: Record({**record, ...})")

    def __iter__(self) -> Iterator[_T]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name is not None and name in self._names

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Mapping):
            other = Record(other)
        if not isinstance(other, Record):
            return NotImplemented
        return self._names == other._names and all(map(_same, self._values, other._values))

    def __repr__(self) -> str:
        return f"<{','.join(f'{v!r}' if n is None else f'{n}={v!r}' for n, v in self.elements())}>"

    def __reduce__(self) -> tuple[type[Record[_T]], tuple[tuple[tuple[str | None, _T], ...]]]:
        return Record, (tuple(self.elements()),)

    def elements(self) -> Iterator[tuple[str | None, _T]]:
        """Yield (name, value) of every element, those without a name included."""
        return zip(self._names, self._values, strict=True)

    def keys(self) -> KeysView[str]:
        """Return the names, in order."""
        return dict(self.items()).keys()

    def values(self) -> tuple[_T, ...]:
        """Return the values of all elements, in order."""
        return self._values

    def items(self) -> tuple[tuple[str, _T], ...]:
        """Return (name, value) of the elements that have a name, in order."""
        return tuple((name, value) for name, value in self.elements() if name is not None)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the element called `name`, or `default` where there is none."""
        return self[name] if name in self else default  # noqa: SIM401 - this is the method that rule would use


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def struct_value(kind: StructType, values: Iterable[_T]) -> Record[_T] | tuple[_T, ...]:
    """Return `values`, one for each element of `kind`, in the form that a value of `kind` has."""
    if not kind.names:
        return tuple(values)
    return Record(zip((name for name, _ in kind.elements), values, strict=True))


def leaves(kind: Type) -> tuple[tuple[str, TensorType], ...]:
    """Return (path, type) of every tensor in `kind`, depth first.

    A path joins names, or positions where there is no name, with dots: `a.b`, `0.1`; a lone tensor's path is "".

    Args:
        kind: A tensor or a struct of such; of a placed type, its member is meant.

    Raises:
        ConfigError: `kind` holds a sequence or a function, which have no leaves.
    """
    return tuple(_leaves(kind, ""))


def _leaves(kind: Type, path: str) -> Iterator[tuple[str, TensorType]]:
    match kind:
        case TensorType():
            yield path, kind
        case StructType():
            for position, (name, element) in enumerate(kind.elements):
                step = name or str(position)
                yield from _leaves(element, f"{path}.{step}" if path else step)
        case FederatedType():
            yield from _leaves(kind.member, path)
        case SequenceType() | FunctionType():
            raise ConfigError(f"{kind} is not made of tensors alone; reduce a sequence first, as with sequence_sum")


def flatten(kind: Type, value: Any) -> list[Any]:
    """Return the leaves of `value` in the order of `leaves(kind)`; nothing is converted, so any objects may be leaves.

    Raises:
        TypeMismatch: A struct in `value` has other elements than `kind`.
        ConfigError: `kind` holds a sequence or a function.
    """
    match kind:
        case TensorType():
            return [value]
        case StructType():
            parts = _elements(kind, value, "this value")
            return [leaf for (_, t), part in zip(kind.elements, parts, strict=True) for leaf in flatten(t, part)]
        case FederatedType():
            return flatten(kind.member, value)
        case SequenceType() | FunctionType():
            raise ConfigError(f"{kind} is not made of tensors alone; reduce a sequence first, as with sequence_sum")


def unflatten(kind: Type, flat: Sequence[Any]) -> Any:
    """Return the value of type `kind` whose leaves are `flat`: what `flatten` undoes.

    Raises:
        ConfigError: There are more or fewer leaves than `kind` has, or it holds a sequence or a function.
    """
    count = len(leaves(kind))
    if count != len(flat):
        raise ConfigError(f"{kind} has {count} tensors, not {len(flat)}")
    return _unflatten(kind, iter(flat))


def _unflatten(kind: Type, flat: Iterator[Any]) -> Any:
    if isinstance(kind, StructType):
        return struct_value(kind, [_unflatten(element, flat) for _, element in kind.elements])
    return _unflatten(kind.member, flat) if isinstance(kind, FederatedType) else next(flat)


def to_value(kind: Type, x: object, *, what: str) -> Any:
    """Return `x` in the canonical form of a value of type `kind` (this module's docstring).

    Integers become floats where that is exact, and floats of one width those of another. Nothing else changes its
    dtype by itself: no float becomes an int, no number a bool or the other way round.

    Args:
        kind: The declared type, placed or not.
        x: Python numbers, (nested) lists, anything numpy makes an array of; for a struct a mapping, Record, named
            tuple, tuple or list; for a sequence an iterable of its elements, an array along its first axis, or a
            mapping of columns; for `{T}@CLIENTS` a list with one value a client.
        what: Names the value in errors, as in "argument threshold of over".

    Raises:
        TypeMismatch: `x` is no such value; the text says what to change.
    """
    match kind:
        case TensorType():
            return _string(kind, x, what) if kind.dtype == "str" else _tensor(kind, x, what)
        case StructType():
            parts = zip(kind.elements, _elements(kind, x, what), strict=True)
            named = ((name or str(i), t, part) for i, ((name, t), part) in enumerate(parts))
            return struct_value(kind, [to_value(t, part, what=f"element {name} of {what}") for name, t, part in named])
        case SequenceType():
            if isinstance(x, Mapping | Record) and isinstance(kind.element, StructType):
                return _columns(kind, kind.element, x, what)
            return _many(kind, kind.element, x, what, "element")
        case FederatedType(member, _, all_equal):
            if all_equal:
                return to_value(member, x, what=what)
            return tuple(_many(kind, member, x, what, "client"))
        case FunctionType():
            _refuse(what, kind, _described(x), "A function cannot be an argument here; call it inside the computation.")


def _refuse(what: str, expected: Type, found: str, cure: str) -> NoReturn:
    raise TypeMismatch(what, expected=expected, found=found, cure=cure)


def _elements(kind: StructType, x: Any, what: str) -> Sequence[Any]:
    """Return the parts of `x` in the order of the elements of `kind`."""
    fields = getattr(x, "_fields", None)
    if isinstance(x, Record) and tuple(name for name, _ in x.elements()) == tuple(name for name, _ in kind.elements):
        return x.values()
    if isinstance(x, Mapping | Record) or isinstance(fields, tuple):
        named: dict[Any, Any] = dict(zip(fields, x, strict=True)) if fields else dict(x)
        missing = [name for name in kind.names if name not in named]
        unknown = [str(name) for name in named if name not in kind.names]
        if missing or unknown or len(kind.names) < len(kind):
            told = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(
                unknown
            )
            if len(kind.names) < len(kind):
                told.append("elements without a name are given by position, in a tuple")
            cure = f"Give exactly the declared elements ({'; '.join(told)})."
            _refuse(what, kind, f"a struct with {', '.join(map(str, named)) or 'no elements'}", cure)
        return [named[name] for name in kind.names]
    if not isinstance(x, tuple | list):
        _refuse(what, kind, _described(x), "Give a dict by the names of the elements, or a tuple by their order.")
    if len(x) != len(kind):
        cure = f"Give {len(kind)} elements, in the declared order, or a dict by their names."
        _refuse(what, kind, f"{len(x)} elements", cure)
    return x


def _columns(kind: SequenceType, element: StructType, x: Any, what: str) -> list[Any]:
    """Return the elements of a sequence that is given as columns of one length."""
    parts = zip(element.elements, _elements(element, x, what), strict=True)
    columns = [_many(kind, t, part, f"column {name} of {what}", "element") for (name, t), part in parts]
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        _refuse(what, kind, f"columns of {sorted(lengths)} values", "Give every column one value an element.")
    return [struct_value(element, row) for row in zip(*columns, strict=True)]


def _many(kind: Type, member: Type, x: Any, what: str, one: str) -> list[Any]:
    """Return many values of type `member`; in one piece where they are tensors of one shape."""
    if isinstance(x, str | bytes | Mapping | Record) or not isinstance(x, Iterable) or _is_scalar(x):
        _refuse(what, kind, _described(x), f"Give a list, one value of type {member} for each {one}.")
    if isinstance(x, Set):
        _refuse(what, kind, f"a {type(x).__name__}", "A set has no order and holds equal values once: give a list.")
    if isinstance(member, TensorType) and member.dtype != "str" and None not in member.shape:
        bulk = x if isinstance(x, np.ndarray) else list(x)
        if _is_regular(bulk, member):
            with contextlib.suppress(TypeMismatch):  # one by one, the error names the one that does not fit
                return list(_tensor(TensorType(member.dtype, (None, *member.shape)), bulk, what))
        x = bulk
    return [to_value(member, value, what=f"{one} {index} of {what}") for index, value in enumerate(x)]


def _is_scalar(x: object) -> bool:
    """Say whether `x` has rank 0, which an array can have and still call itself iterable."""
    return isinstance(x, np.ndarray | np.generic) and x.ndim == 0


def _is_regular(bulk: Any, member: TensorType) -> bool:
    """Say whether `bulk` is an array, or holds scalars of one Python type, which numpy converts as each by itself."""
    return isinstance(bulk, np.ndarray) or (not member.shape and len(set(map(type, bulk))) == 1)


def _string(kind: TensorType, x: object, what: str) -> Any:
    try:
        array = np.asarray(x)
    except ValueError:
        _refuse(what, kind, "lists of unequal lengths", "Give every row the same number of texts.")
    if array.dtype.kind != "U" or not _fits(kind, array.shape):
        _refuse(what, kind, _described(x), "Give text in quotes.")
    return array if kind.shape else str(x)


def _tensor(kind: TensorType, x: Any, what: str) -> Any:
    try:
        array = np.asarray(x)
    except ValueError:
        _refuse(what, kind, "lists of unequal lengths", "Give every row the same number of values.")
    if array.dtype != kind.dtype:
        array = _converted(kind, array, x, what)
    if not _fits(kind, array.shape):
        cure = f"Give it the shape {list(kind.shape)}." if kind.shape else "Give one number, not an array of them."
        _refuse(what, kind, _described(array), cure)
    return array if kind.shape else array[()]


def _fits(kind: TensorType, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(kind.shape) and all(
        want is None or want == have for want, have in zip(kind.shape, shape, strict=True)
    )


def _converted(kind: TensorType, array: Array, x: object, what: str) -> Array:
    """Return `array` in the dtype of `kind`, or refuse where that would change what it says."""
    want, have = kind.numpy_dtype, array.dtype
    if array.size == 0:
        return array.astype(want)
    if want.kind in "iu" and have.kind in "iu":
        limits = np.iinfo(want)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            cure = f"An {want} holds {limits.min} to {limits.max}: declare a wider type, such as int64."
            _refuse(what, kind, _described(x), cure)
    elif want.kind == "f" and have.kind in "iu":
        largest = _EXACT_INTEGERS[kind.dtype]
        if int(array.min()) < -largest or int(array.max()) > largest:
            cure = f"A {want} cannot hold it exactly: declare an integer type, or give float(...) yourself."
            _refuse(what, kind, _described(x), cure)
    elif want.kind == "f" and have.kind == "f":
        with np.errstate(over="ignore"):
            narrow = array.astype(want)
        if (np.isinf(narrow) & ~np.isinf(array)).any():
            _refuse(what, kind, _described(x), f"It is too large for a {want}: declare float64, or scale it.")
        return narrow
    else:
        _refuse(what, kind, _described(x), _cure_of_dtype(want, have))
    return array.astype(want)


def _cure_of_dtype(want: np.dtype[Any], have: np.dtype[Any]) -> str:
    if want.kind in "iu" and have.kind == "f":
        return f"A float is not turned into an {want} by itself: give int(...) or round(...), or declare float32."
    if want.kind == "b" and have.kind in "iuf":
        return "A number is not a truth value by itself: give a comparison such as x > 0, or declare the number's type."
    if have.kind == "b":
        return f"A truth value is not a number by itself: give {want}(...) of it, or declare bool."
    return f"Give a number, or an array of numbers, of type {want}."


def _described(x: object) -> str:
    """Return the type of `x` as a newcomer would say it."""
    if isinstance(x, np.ndarray | np.generic):
        dims = f"[{','.join(map(str, x.shape))}]" if x.shape else f", the value {x}"
        return f"{x.dtype}{dims}"
    if isinstance(x, bool | int | float | str):
        return f"the {type(x).__name__} {_short(x)}"
    if isinstance(x, list | tuple) and len(x) <= 8:
        return f"the {type(x).__name__} {_short(x)}"
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, list | tuple) else "")


def _short(x: object, limit: int = 60) -> str:
    text = repr(x)
    return text if len(text) <= limit else text[: limit - 3] + "..."
