"""Operators over sequences, such as the examples of one device; a placed sequence is worked on member by member."""

from __future__ import annotations

from dataclasses import replace

from sottovoce.language.definition import Site, Value, described, site
from sottovoce.language.functions import local_function
from sottovoce.language.relations import check_assignable
from sottovoce.types import FederatedType, Placement, SequenceType, StructType, TensorType, Type, contains
from sottovoce.values import leaves


def sequence_map(function: object, sequence: object) -> Value:
    """Return the sequence of `function` of every element, `U*` for `T*`; of `{T*}@CLIENTS`, `{U*}@CLIENTS`.

    Raises:
        DefinitionError: `sequence` is none, or `function` cannot be used here.
        TypeMismatch: The function's parameter is not the element's type.
    """
    place = site("sequence_map")
    value = place.value(sequence)
    element = _element(place, value)
    local = local_function(function, element, place, placement=_placement(value))
    if contains(local.result, SequenceType):
        place.refuse(f"{local.name} returns {local.result}, and there are no sequences of sequences; reduce it first")
    return place.step("sequence_map", [value], _placed(value, SequenceType(local.result)), functions=(local,))


def sequence_reduce(sequence: object, zero: object, function: object) -> Value:
    """Return `zero` folded with every element in order by `function(accumulator, element)`.

    Args:
        sequence: `T*`, or placed.
        zero: The first accumulator, `U`, without a placement.
        function: `(<U,T> -> U)`.

    Raises:
        DefinitionError: `sequence` is none, `zero` is placed, or `function` cannot be used here.
        TypeMismatch: The function's types do not fit.
    """
    place = site("sequence_reduce")
    value, start = place.value(sequence), place.value(zero)
    element = _element(place, value)
    if contains(start.type_signature, FederatedType):
        place.refuse(f"zero, {described(start)}, is placed; give a constant, or a value without a placement")
    argument = StructType(((None, start.type_signature), (None, element)))
    local = local_function(function, argument, place, placement=_placement(value))
    check_assignable(start.type_signature, local.result, what=f"{place.where}: the result of {local.name}")
    kind = _placed(value, start.type_signature)
    return place.step("sequence_reduce", [value, start], kind, functions=(local,))


def sequence_sum(sequence: object) -> Value:
    """Return the sum of all elements of a sequence of numbers, coordinate by coordinate.

    Raises:
        DefinitionError: `sequence` is none, or its elements are no numbers.
    """
    place = site("sequence_sum")
    value = place.value(sequence)
    element = _element(place, value)
    refuse_unsummable(place, element, "sequence_map")
    return place.step("sequence_sum", [value], _placed(value, element))


def refuse_unsummable(place: Site, kind: Type, mapping: str) -> None:
    """Raise DefinitionError unless every tensor in `kind` is a number."""
    for path, leaf in leaves(kind):
        if leaf.dtype in ("bool", "str"):
            where = f", at {path}" if path else ""
            cure = (
                f"map a cast first: sv.{mapping}(sv.cast('int32'), value)" if leaf.dtype == "bool" else "map a number"
            )
            place.refuse(f"{leaf}{where} is no number and cannot be added up; {cure}")
        _refuse_unknown(place, leaf)


def _refuse_unknown(place: Site, leaf: TensorType) -> None:
    if None in leaf.shape:
        place.refuse(f"{leaf} has an unknown dimension, so the sum's size is not known; declare it")


def _element(place: Site, value: Value) -> Type:
    kind = value.type_signature
    member = kind.member if isinstance(kind, FederatedType) else kind
    if not isinstance(member, SequenceType):
        place.refuse(f"{described(value)} is no sequence; declare one as T*, for example {{float32*}}@CLIENTS")
    return member.element


def _placement(value: Value) -> Placement | None:
    kind = value.type_signature
    return kind.placement if isinstance(kind, FederatedType) else None


def _placed(value: Value, member: Type) -> Type:
    kind = value.type_signature
    return replace(kind, member=member) if isinstance(kind, FederatedType) else member
