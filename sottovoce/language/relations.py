"""How two types relate: identical, equivalent, assignable; and errors that say how to make one fit the other.

The rules are TensorFlow Federated's. A value of type `source` may be used where `target` is declared when

- tensors have one dtype and rank, and each dimension of `target` is unknown or the same;
- structs have as many elements, each assignable, and each named in `source` as in `target` or not at all;
- sequences and federated members are assignable, at the same placement, and `source` is all-equal where `target` is;
- functions accept at least what `target` accepts and return at most what it returns.

Where TFF calls types equivalent that differ in their Python containers only, ours, which know no containers, are
equivalent when they differ in the names of struct elements only: their values flatten to the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from sottovoce.errors import TypeMismatch
from sottovoce.types import (
    CLIENTS,
    FederatedType,
    FunctionType,
    SequenceType,
    StructType,
    TensorType,
    Type,
)


def is_identical(a: Type, b: Type) -> bool:
    """Say whether the two are the same type, names included."""
    return a == b


def is_equivalent(a: Type, b: Type) -> bool:
    """Say whether the two are the same type but for the names of struct elements."""
    return _unnamed(a) == _unnamed(b)


def is_assignable(*, target: Type, source: Type) -> bool:
    """Say whether a value of type `source` may be used where `target` is declared."""
    return _difference(target, source) is None


def check_assignable(target: Type, source: Type, *, what: str) -> None:
    """Raise unless a value of type `source` may be used where `target` is declared.

    Args:
        target: The declared type.
        source: The type of what is given.
        what: Names what is given, as in "the argument readings of over".

    Raises:
        TypeMismatch: It may not; the text prints both types and what to change.
    """
    difference = _difference(target, source)
    if difference is not None:
        place = f"At {difference.path}, {difference.target} is declared and {difference.source} is given. "
        cure = (place if difference.path else "") + _cure(difference.target, difference.source)
        raise TypeMismatch(what, expected=target, found=source, cure=cure)


def _unnamed(kind: Type) -> Type:
    match kind:
        case StructType():
            return StructType(tuple((None, _unnamed(element)) for _, element in kind.elements))
        case SequenceType():
            return SequenceType(_unnamed(kind.element))
        case FunctionType():
            return FunctionType(None if kind.parameter is None else _unnamed(kind.parameter), _unnamed(kind.result))
        case FederatedType():
            return FederatedType(_unnamed(kind.member), kind.placement, kind.all_equal)
        case TensorType():
            return kind


@dataclass(frozen=True, slots=True)
class _Difference:
    """The innermost pair of types that do not fit, and the path to it (`a.b`, "" for the whole)."""

    target: Type
    source: Type
    path: str = ""

    def under(self, step: str) -> _Difference:
        return _Difference(self.target, self.source, f"{step}.{self.path}" if self.path else step)


def _difference(target: Type, source: Type) -> _Difference | None:
    """Return the first difference that keeps `source` from being used as `target`."""
    if target == source:
        return None
    match target, source:
        case TensorType(), TensorType():
            fits = target.dtype == source.dtype and _shape_fits(target, source)
            return None if fits else _Difference(target, source)
        case StructType(), StructType():
            return _difference_of_structs(target, source)
        case SequenceType(), SequenceType():
            return _difference(target.element, source.element)
        case FederatedType(), FederatedType():
            if target.placement is not source.placement or (target.all_equal and not source.all_equal):
                return _Difference(target, source)
            return _difference(target.member, source.member)
        case FunctionType(), FunctionType():
            return None if _function_fits(target, source) else _Difference(target, source)
    return _Difference(target, source)


def _shape_fits(target: TensorType, source: TensorType) -> bool:
    return len(target.shape) == len(source.shape) and all(
        want in (None, have) for want, have in zip(target.shape, source.shape, strict=True)
    )


def _difference_of_structs(target: StructType, source: StructType) -> _Difference | None:
    if len(target) != len(source):
        return _Difference(target, source)
    pairs = list(zip(target.elements, source.elements, strict=True))
    if any(have not in (want, None) for (want, _), (have, _) in pairs):
        return _Difference(target, source)
    for position, ((name, want), (_, have)) in enumerate(pairs):
        difference = _difference(want, have)
        if difference is not None:
            return difference.under(name or str(position))
    return None


def _function_fits(target: FunctionType, source: FunctionType) -> bool:
    """Parameters the other way round: what accepts more may stand where a function that accepts less is declared."""
    if target.parameter is None or source.parameter is None:
        parameters_fit = target.parameter is source.parameter
    else:
        parameters_fit = is_assignable(target=source.parameter, source=target.parameter)
    return parameters_fit and is_assignable(target=target.result, source=source.result)


def _cure(target: Type, source: Type) -> str:
    """Return what to change so that `source` fits, where neither has a part that could be told apart any further."""
    match target, source:
        case TensorType(), TensorType() if target.dtype != source.dtype:
            return f'Convert it with sv.cast("{target.dtype}"), or declare {source}.'
        case TensorType(), TensorType():
            return f"Give it the shape of {target}, or declare {source}; ? stands for a dimension that may vary."
        case StructType(), StructType():
            return _cure_of_structs(target, source)
        case FederatedType(), FederatedType():
            return _cure_of_placements(target, source)
        case FederatedType(), _:
            return f"A value without a placement is placed with sv.federated_value(..., sv.{target.placement})."
        case _, FederatedType():
            return f"A value at {source.placement} is not at hand here: apply the function with sv.federated_map."
        case SequenceType(element), _ if element == source:
            return (
                f"One {source} is given where a sequence of them is declared: use sv.collection, or declare {source}."
            )
        case _, SequenceType():
            return "Reduce a sequence to one value with sv.sequence_sum or sv.sequence_reduce, or declare a sequence."
        case FunctionType(), FunctionType():
            return "Declare the function with the expected parameter and result, or adapt it with a lambda."
        case FunctionType(), _:
            return "Give a function here: one decorated with sv.tf_computation, or a lambda."
        case _, FunctionType():
            return "Call the function, or apply it with sv.federated_map; the function itself is not a value."
    return f"Give a {target}, or declare {source}."


def _cure_of_structs(target: StructType, source: StructType) -> str:
    if len(target) != len(source):
        return f"Give {len(target)} elements; there are {len(source)}."
    if set(target.names) == set(source.names):
        return f"Put the elements in the declared order: {', '.join(target.names)}."
    names = ", ".join(name or str(position) for position, (name, _) in enumerate(target.elements))
    return f"Name the elements as they are declared ({names}), or give them without names, by position."


def _cure_of_placements(target: FederatedType, source: FederatedType) -> str:
    if target.placement is source.placement:
        return (
            f"Every client may hold another value: declare {{{target.member}}}@CLIENTS, "
            "or send one value to all with sv.federated_broadcast."
        )
    if target.placement is CLIENTS:
        return "A value of the server reaches the clients with sv.federated_broadcast."
    return "Clients' values reach the server as an aggregate: sv.federated_sum or sv.federated_mean."
