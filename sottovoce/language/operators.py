"""The federated operators. Each checks its types where the author calls it and adds one step to the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, NoReturn, get_args

import numpy as np

from sottovoce.errors import ConfigError, DefinitionError
from sottovoce.language.definition import Site, Value, described, parameter_name, site
from sottovoce.language.expressions import Operator, Terms
from sottovoce.language.functions import local_function
from sottovoce.language.ports import Bound
from sottovoce.language.relations import check_assignable
from sottovoce.language.sequences import refuse_unsummable
from sottovoce.language.sources import here
from sottovoce.plan import LaneName
from sottovoce.types import (
    CLIENTS,
    SERVER,
    FederatedType,
    Placement,
    SequenceType,
    StructType,
    TensorType,
    Type,
    contains,
)
from sottovoce.values import leaves

_MOST_BITS: Final = 48
"""Of one coordinate, as plans allow."""


def federated_broadcast(value: object) -> Value:
    """Return a value at SERVER on every client: `T@CLIENTS` for `T@SERVER`."""
    place = site("federated_broadcast")
    given = place.value(value)
    kind = _placed(place, given, SERVER)
    if kind.placement is not SERVER:
        place.refuse(f"{described(given)} is at CLIENTS already; only a value at SERVER is broadcast")
    return place.step("federated_broadcast", [given], FederatedType(kind.member, CLIENTS, all_equal=True))


def federated_map(function: object, value: object) -> Value:
    """Return `function` of every member of `value`, where the value is: `{U}@CLIENTS` for `{T}@CLIENTS`.

    Args:
        function: A computation without placements, a builtin such as `sv.cast("float32")`, a client program, or a
            Python function over values.
        value: At CLIENTS or at SERVER; a dict or tuple of values at one placement is zipped first.

    Raises:
        DefinitionError: The value is not placed, or the function cannot run there.
        TypeMismatch: The function's parameter is not of the members' type.
    """
    place = site("federated_map")
    if isinstance(function, Value):
        place.refuse("the function comes first, then the value: sv.federated_map(function, value)")
    given = zipped(place, place.value(value))
    kind = _placed(place, given)
    local = local_function(function, kind.member, place, placement=kind.placement)
    return place.step("federated_map", [given], replace(kind, member=local.result), functions=(local,))


def federated_zip(values: object) -> Value:
    """Return a dict or tuple of values at one placement as one value of structs: `{<a=T,b=U>}@CLIENTS`."""
    place = site("federated_zip")
    given = place.value(values)
    if not isinstance(given.type_signature, StructType):
        place.refuse(f"{described(given)} is no struct of placed values; give a dict or a tuple of them")
    return zipped(place, given)


def federated_value(value: object, placement: Placement) -> Value:
    """Return a constant, or a value without a placement, at `placement`: `T@SERVER`, or `T@CLIENTS` for all clients."""
    place = site("federated_value")
    given = place.value(value)
    _check_placement(place, placement)
    if placed := contains(given.type_signature, FederatedType):
        place.refuse(f"{described(given)} is placed already ({placed})")
    return place.step("federated_value", [given], FederatedType(given.type_signature, placement, all_equal=True))


def federated_eval(function: object, placement: Placement) -> Value:
    """Return what `function`, without parameters, gives at `placement`: `{T}@CLIENTS`, one each, or `T@SERVER`."""
    place = site("federated_eval")
    _check_placement(place, placement)
    local = local_function(function, None, place, placement=placement)
    kind = FederatedType(local.result, placement, all_equal=placement is SERVER)
    return place.step("federated_eval", [], kind, functions=(local,))


def federated_sum(
    value: object,
    *,
    bound: tuple[float, float] | Bound | None = None,
    bits: int | None = None,
    lane: LaneName | None = None,
) -> Value:
    """Return the sum of all members, coordinate by coordinate: `T@SERVER` for `{T}@CLIENTS`.

    Args:
        value: Numbers at CLIENTS.
        bound: (low, high) of every coordinate; what lies outside is clamped. A fleet needs one, unless it follows.
        bits: Width of one coordinate before summation; None lets lowering choose.
        lane: How wide an entry of the masked vector is; None lets lowering choose.

    Raises:
        DefinitionError: The value is not at CLIENTS, or is no number.
    """
    place = site("federated_sum")
    _check_encoding(place, bits, lane)
    given = _clients(place, place.value(value))
    within = _bound(place, bound, _placed(place, given).member)
    return _summed(place, "federated_sum", given, within, Terms(bits=bits, lane=lane))


def federated_secure_sum(value: object, max_input: int) -> Value:
    """Return the exact sum of whole numbers from 0 to `max_input`; a member outside is clamped.

    Every sum that a fleet makes is secure; this one names its bound as TFF does.

    Raises:
        DefinitionError: The value is not at CLIENTS, or not of integers; or `max_input` is no whole number above 0.
    """
    place = site("federated_secure_sum")
    if not isinstance(max_input, int) or isinstance(max_input, bool) or max_input < 1:
        place.refuse(f"max_input is the largest value of one member, a whole number above 0, not {max_input!r}")
    given = _clients(place, place.value(value))
    for path, leaf in leaves(_placed(place, given).member):
        if leaf.numpy_dtype.kind not in "iu":
            at = f", at {path}" if path else ""
            place.refuse(f"{leaf}{at} is not of whole numbers; map sv.cast('int32'), or use sv.federated_sum(bound=)")
    return _summed(place, "federated_secure_sum", given, Bound(0.0, float(max_input)), Terms())


def federated_mean(
    value: object,
    weight: object = None,
    *,
    bound: tuple[float, float] | Bound | None = None,
    clip_norm: float | None = None,
    half_range: float | None = None,
    weight_cap: int | None = None,
    bits: int | None = None,
    lane: LaneName | None = None,
) -> Value:
    """Return the mean of all members, coordinate by coordinate, weighted by `weight` if it is given.

    Args:
        value: Floats at CLIENTS.
        weight: A number at CLIENTS, not negative (a device clamps it to 0, the reference executor refuses it); all
            members count the same without it.
        bound: (low, high) of every coordinate; what lies outside is clamped.
        clip_norm: L2 bound over all tensors of one member together, applied first.
        half_range: Every coordinate is clamped to [-half_range, half_range].
        weight_cap: Largest weight of one member.
        bits: Width of one coordinate before summation; None lets lowering choose.
        lane: How wide an entry of the masked vector is; None lets lowering choose.

    Raises:
        DefinitionError: The value or the weight is not at CLIENTS, or is not of the dtype that is needed.
    """
    place = site("federated_mean")
    _check_encoding(place, bits, lane)
    terms = Terms(
        _above_0(place, "clip_norm", clip_norm), _above_0(place, "half_range", half_range), weight_cap, bits, lane
    )
    given = _clients(place, place.value(value))
    kind = _placed(place, given)
    refuse_unsummable(place, kind.member, "federated_map")
    for path, leaf in leaves(kind.member):
        if leaf.numpy_dtype.kind != "f":
            at = f", at {path}" if path else ""
            place.refuse(f"the mean of {leaf}{at} is no whole number; map sv.cast('float32') over the value first")
    inputs = [given] if weight is None else [given, _weight(place, weight)]
    if weight_cap is not None and (weight is None or not isinstance(weight_cap, int) or weight_cap < 1):
        place.refuse("weight_cap is the largest weight of one member, at least 1, and needs weight=")
    result = FederatedType(kind.member, SERVER, all_equal=True)
    return place.step("federated_mean", inputs, result, bound=_bound(place, bound, kind.member), terms=terms)


def federated_min(value: object) -> Value:
    """Return the smallest of all members, coordinate by coordinate; not on a fleet, which only sums."""
    return _extreme("federated_min", value)


def federated_max(value: object) -> Value:
    """Return the largest of all members, coordinate by coordinate; not on a fleet, which only sums."""
    return _extreme("federated_max", value)


def federated_aggregate(value: object, zero: object, accumulate: object, merge: object, report: object) -> Value:
    """Return a general aggregate; not on a fleet, which only sums.

    Args:
        value: `{T}@CLIENTS`.
        zero: The neutral accumulator, `U`, without a placement.
        accumulate: `(<U,T> -> U)`.
        merge: `(<U,U> -> U)`.
        report: `(U -> R)`.

    Returns:
        `R@SERVER`.
    """
    place = site("federated_aggregate")
    given, start = _clients(place, place.value(value)), place.value(zero)
    kind = start.type_signature
    if contains(kind, FederatedType):
        place.refuse(f"zero, {described(start)}, is placed; give a constant, or a value without a placement")
    member = _placed(place, given).member
    steps = local_function(accumulate, StructType(((None, kind), (None, member))), place)
    merging = local_function(merge, StructType(((None, kind), (None, kind))), place)
    reporting = local_function(report, kind, place)
    for name, function in (("accumulate", steps), ("merge", merging)):
        check_assignable(kind, function.result, what=f"{place.where}: the result of {name} ({function.name})")
    result = FederatedType(reporting.result, SERVER, all_equal=True)
    return place.step("federated_aggregate", [given, start], result, functions=(steps, merging, reporting))


def federated_select(client_keys: object, max_key: int, server_value: object, select: object) -> Value:
    """Return the slices of a server value that each client asks for: `{R*}@CLIENTS`, one for each of its keys.

    The whole value is broadcast and sliced on the device, so that nobody learns which keys a client has. A key that is
    not allowed is an error in the reference executor; a device, which tells nobody of it, takes the nearest one.

    Args:
        client_keys: `{int32[n]}@CLIENTS`.
        max_key: Largest key that is allowed; the smallest is 0.
        server_value: `T@SERVER`.
        select: `(<T,int32> -> R)`, the slice for one key.
    """
    place = site("federated_select")
    keys, whole = _clients(place, place.value(client_keys)), place.value(server_value)
    kind, table = _placed(place, keys).member, _placed(place, whole, SERVER)
    if not (isinstance(kind, TensorType) and kind.dtype == "int32" and len(kind.shape) == 1):
        place.refuse(f"{described(keys)} are no keys; they must be {{int32[n]}}@CLIENTS")
    if table.placement is not SERVER:
        place.refuse(f"{described(whole)} must be at SERVER, from where the slices come")
    if not isinstance(max_key, int) or isinstance(max_key, bool) or max_key < 0:
        place.refuse(
            "max_key is the largest key, a whole number from 0 on, written as a number because devices check their "
            f"keys against it: 9 for a table of ten rows, not {max_key!r}"
        )
    argument = StructType(((None, table.member), (None, TensorType("int32"))))
    local = local_function(select, argument, place, placement=CLIENTS)
    result = FederatedType(SequenceType(local.result), CLIENTS, all_equal=False)
    bound = Bound(0.0, float(max_key))
    return place.step("federated_select", [keys, whole], result, functions=(local,), bound=bound)


def federated_collect(value: object) -> NoReturn:
    """Raise DefinitionError: single values never leave their devices."""
    raise DefinitionError(
        f"{here()}, federated_collect",
        "Sottovoce never collects the values of single devices: whoever runs this would see everyone's. "
        "Say what you want to know of all of them together: sv.federated_sum, sv.federated_mean, or for a "
        "distribution a sum of counts, one for each bucket",
    )


def _summed(place: Site, operator: Operator, value: object, bound: Bound | None, terms: Terms) -> Value:
    given = _clients(place, place.value(value))
    kind = _placed(place, given)
    refuse_unsummable(place, kind.member, "federated_map")
    result = FederatedType(kind.member, SERVER, all_equal=True)
    return place.step(operator, [given], result, bound=bound, terms=terms)


def _extreme(operator: Operator, value: object) -> Value:
    place = site(operator)
    given = _clients(place, place.value(value))
    kind = _placed(place, given)
    refuse_unsummable(place, kind.member, "federated_map")
    return place.step(operator, [given], FederatedType(kind.member, SERVER, all_equal=True))


def _weight(place: Site, weight: object) -> Value:
    given = place.value(weight)
    if not contains(given.type_signature, FederatedType):
        place.refuse(
            f"the weight, {described(given)}, is not placed; the second argument is the weight of every member, and "
            "whatever else is given by name, as bound=(low, high)"
        )
    given = _clients(place, given)
    kind = _placed(place, given).member
    if not isinstance(kind, TensorType) or kind.numpy_dtype.kind not in "iuf" or kind.shape not in ((), (1,)):
        place.refuse(f"the weight, {described(given)}, must be one number for each member, such as {{float32}}@CLIENTS")
    return given


def _placed(place: Site, value: Value, *placements: Placement) -> FederatedType:
    """Return the type of `value`; where it is not placed, refuse it with the advice to place it at `placements`."""
    kind = value.type_signature
    if not isinstance(kind, FederatedType):
        wanted, name = placements or (SERVER, CLIENTS), parameter_name(value)
        cures = [f"sv.federated_value({name or 'value'}, sv.{placement})" for placement in wanted]
        declared = [f"{{{kind}}}@CLIENTS" if placement is CLIENTS else f"{kind}@SERVER" for placement in wanted]
        cure = f"declare {name} as {' or '.join(declared)}, or " if name else ""
        place.refuse(
            f"{described(value)} is not placed, and {place.operator} takes a placed value: {cure}use "
            f"{' or '.join(cures)}"
        )
    return kind


def _clients(place: Site, value: Value) -> Value:
    """Return `value`, zipped if it is a struct of values, and refuse it unless it is at CLIENTS."""
    given = zipped(place, value)
    kind = _placed(place, given, CLIENTS)
    if kind.placement is not CLIENTS:
        place.refuse(
            f"{described(given)} is at SERVER, and {place.operator} takes one value from every client; "
            "at SERVER there is only one"
        )
    return given


def zipped(place: Site, value: Value) -> Value:
    """Return a struct of placed values as one placed value of structs, anything else as it is."""
    kind = value.type_signature
    if not isinstance(kind, StructType) or not contains(kind, FederatedType):
        return value
    parts = [zipped(place, part) for part in value]
    kinds = [_placed(place, part) for part in parts]
    if len({part.placement for part in kinds}) > 1:
        stray = next(part for part, placed in zip(parts, kinds, strict=True) if placed.placement is SERVER)
        place.refuse(
            f"{described(stray)} is at SERVER, and another value is at CLIENTS: "
            f"use sv.federated_broadcast({parameter_name(stray) or 'value'}) to bring it to the clients"
        )
    elements = tuple((name, part.member) for (name, _), part in zip(kind.elements, kinds, strict=True))
    result = FederatedType(StructType(elements), kinds[0].placement, all(part.all_equal for part in kinds))
    return place.step("federated_zip", parts, result)


def _check_placement(place: Site, placement: object) -> None:
    if not isinstance(placement, Placement):
        place.refuse(f"the placement is sv.CLIENTS or sv.SERVER, not {placement!r}")


def _bound(place: Site, bound: tuple[float, float] | Bound | None, kind: Type) -> Bound | None:
    """Return the bound that an author declares for every coordinate of a value of type `kind`."""
    if bound is None:
        return None
    try:
        low, high = (bound.low, bound.high) if isinstance(bound, Bound) else bound
        found = Bound(float(low), float(high))
    except (TypeError, ValueError, ConfigError):
        place.refuse(f"bound is (low, high), two finite numbers, the lower one first, not {bound!r}")
    for _, leaf in leaves(kind):
        if leaf.numpy_dtype.kind in "iu" and math.ceil(found.low) > math.floor(found.high):
            place.refuse(f"no {leaf.dtype} lies within the bound {found}; give one that holds a whole number")
        if leaf.numpy_dtype.kind == "f" and max(abs(found.low), abs(found.high)) > float(
            np.finfo(leaf.numpy_dtype).max
        ):
            place.refuse(f"the bound {found} is beyond what a {leaf.dtype} holds; give what the values can really be")
    return found


def _above_0(place: Site, name: str, value: float | None) -> float | None:
    if value is not None and not (isinstance(value, int | float | np.number) and 0 < value < float("inf")):
        place.refuse(f"{name} must be a number above 0, not {value!r}")
    return value


def _check_encoding(place: Site, bits: object, lane: object) -> None:
    if bits is not None and not (isinstance(bits, int) and 1 <= bits <= _MOST_BITS):
        place.refuse(f"bits is the width of one coordinate before summation, 1 to {_MOST_BITS}, not {bits!r}")
    lanes = get_args(LaneName)
    if lane is not None and lane not in lanes:
        place.refuse(f"lane is one of {', '.join(lanes)}, not {lane!r}")
