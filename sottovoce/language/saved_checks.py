"""What a saved computation says is held against its own parts and its own client program, before any of it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sottovoce.blobs import blob_ref
from sottovoce.bundle import decode_bundle
from sottovoce.errors import BadBundle, ConfigError
from sottovoce.language.body_checks import check_body
from sottovoce.language.bounds import elements_of
from sottovoce.language.client_part import member_of
from sottovoce.language.lowered import Lowered
from sottovoce.language.recipes import Recipe
from sottovoce.plan import Plan, PrivacyTerms, check_plan
from sottovoce.types import CLIENTS, FederatedType, StructType, TensorType, Type
from sottovoce.values import leaves


def check_lowered(lowered: Lowered) -> None:
    """Refuse parts that do not fit together.

    Raises:
        ConfigError: A body, a parameter, a recipe or the plan is impossible, or not what another part needs.
        BadBundle: The client program is none, or is given another broadcast.
    """
    for body in (lowered.before, lowered.after):
        check_body(body)
    if lowered.needs_devices:
        check_plan(_plan_of(lowered))
    _check_parameters(lowered)
    _check_broadcast(lowered)
    _check_recipes(lowered)
    result = lowered.after.result_type
    if not isinstance(result, StructType) or len(result) != 1:
        raise ConfigError("it has not one result")


def _check_parameters(lowered: Lowered) -> None:
    """Refuse parameters that are not read as they are declared."""
    names = [name for name, _ in lowered.parameters]
    if len(set(names)) < len(names):
        raise ConfigError("two parameters have one name")
    members = tuple(at for at, (_, kind) in enumerate(lowered.parameters) if _is_member(kind))
    if lowered.members != members:
        raise ConfigError("it reads other parameters on the devices than those at CLIENTS")
    given = [member_of(kind) for at, (_, kind) in enumerate(lowered.parameters) if at not in members]
    for body in (lowered.before, lowered.after):
        if [kind for _, kind in body.parameters[: len(given)]] != given:
            raise ConfigError("its parts are given other values than its parameters")
    kinds = [kind for at in members for _, kind in leaves(elements_of(lowered.parameters[at][1]))]
    if lowered.needs_devices and len(kinds) != len(lowered.columns):
        raise ConfigError("it reads another number of columns than its parameters have")


def _check_broadcast(lowered: Lowered) -> None:
    """Refuse a broadcast that is not what is prepared, or not what the client program is given."""
    prepared = [kind for _, kind in leaves(lowered.before.result_type)]
    ports = [kind for _, kind in lowered.broadcast]
    if len(prepared) != len(ports) or not all(map(_is_as_large, prepared, ports)):
        raise ConfigError("its parts have other numbers of values than it declares")
    if lowered.bundle:
        expected = tuple((port.name, port.tensor_type) for port in decode_bundle(lowered.bundle).broadcast)
        if expected != lowered.broadcast:
            raise BadBundle("its client program is given another broadcast")


def _check_recipes(lowered: Lowered) -> None:
    """Refuse values that cannot be computed from the sums."""
    given = len(lowered.parameters) - len(lowered.members)
    summed = lowered.after.parameters[given:]
    if len(summed) != len(lowered.recipes) or len(lowered.words) != len(lowered.recipes):
        raise ConfigError("its parts have other numbers of values than it declares")
    tensors = {
        aggregation.name: tuple(map(TensorType.parse, aggregation.tensors)) for aggregation in lowered.aggregations
    }
    for recipe, (_, kind) in zip(lowered.recipes, summed, strict=True):
        if recipe.type != kind:
            raise ConfigError("a result is used as another type than it has")
        _check_recipe(recipe, tensors)


def _check_recipe(recipe: Recipe, tensors: Mapping[str, tuple[TensorType, ...]]) -> None:
    kinds = [kind for _, kind in leaves(recipe.type)]
    if recipe.kind == "weight":
        kinds = []
        if not isinstance(recipe.type, TensorType) or recipe.type.shape not in ((), (1,)):
            raise ConfigError("a number of examples is one number")
    if len(recipe.summands) != len(kinds):
        raise ConfigError("a result has another number of tensors than its type")
    if (recipe.weight is not None) != (recipe.kind == "weighted_mean") or not 0 < recipe.weight_cap < math.inf:
        raise ConfigError("a mean has no weight that it can be divided by")
    pairs = list(zip(recipe.summands, kinds, strict=True))
    if recipe.weight is not None:
        pairs.append((recipe.weight, TensorType("float32")))
    for summand, kind in pairs:
        found = tensors.get(summand.aggregation, ())
        if not 0 <= summand.index < len(found) or found[summand.index].size != kind.size:
            raise ConfigError("a result is made of sums that are not there")
        if not (math.isfinite(summand.offset) and 0 <= summand.error < math.inf):
            raise ConfigError("a sum has no finite offset and error")


def _plan_of(lowered: Lowered) -> Plan:
    """Return a plan that it would be asked with, of a fleet and a collection that only the call knows."""
    return Plan(
        fleet="fleet",
        name=lowered.name,
        collection="collection",
        program=blob_ref(lowered.bundle),
        work=lowered.work,
        aggregations=lowered.aggregations,
        privacy=PrivacyTerms(purpose=lowered.purpose, minimum_cohort=3, weight_cap=lowered.weight_cap),
    )


def _is_member(kind: Type) -> bool:
    return isinstance(kind, FederatedType) and kind.placement is CLIENTS and not kind.all_equal


def _is_as_large(prepared: TensorType, port: TensorType) -> bool:
    """Say whether values of type `prepared` can be broadcast through `port`; ? fits what comes."""
    return None in prepared.shape or None in port.shape or prepared.size == port.size
