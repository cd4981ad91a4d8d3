"""The reference executor: runs a computation in this process, with plain arithmetic. What it says is what is meant.

Every other executor agrees with it within the quantisation bound that the plan declares, and exactly for integers. So
it clamps where the author declared a bound, as devices do, and needs no bound where there is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.arguments import DeviceValues
from sottovoce.language.builtins import GUARD, clipped
from sottovoce.language.computations import Computation
from sottovoce.language.expressions import Operator, Slot, Step, Terms
from sottovoce.language.interpreter import Handler, apply, evaluate, local_handlers, reduced, total
from sottovoce.types import FederatedType, StructType, Type
from sottovoce.values import flatten, leaves, struct_value, unflatten

_SlotKey = tuple[str, int, int]


class Members(tuple[Any, ...]):
    """One value for each client; anything else at CLIENTS is one value for all of them."""

    __slots__ = ()


class ReferenceExecutor:
    """Runs computations in this process; keeps the client state of its members, by their position in the arguments."""

    def __init__(self, *, members: int | None = None) -> None:
        """Make one with no client state.

        Args:
            members: How many clients there are where no argument says so.

        Raises:
            ConfigError: `members` is negative.
        """
        if members is not None and members < 0:
            raise ConfigError(f"members is how many clients there are, not {members}")
        self._members = members
        self._kept: dict[_SlotKey, Any] = {}

    def run(self, computation: Computation, arguments: Mapping[str, object]) -> Any:
        """Run `computation`; see `sottovoce.language.ports.Executor`.

        Raises:
            ConfigError: Arguments have different numbers of members, live on devices, or a mean is of nothing; the
                text names the operator and its line.
        """
        values = []
        for name, kind in computation.body.parameters:
            value = arguments[name]
            if isinstance(value, DeviceValues):
                raise ConfigError(_NO_DEVICES.format(value=value, computation=computation.name, name=name, kind=kind))
            values.append(_placed(kind, value))
        run = _Run(self._count(computation, values), self._kept)
        result = evaluate(computation.body, values, run.handlers)
        self._kept.update(run.written)
        return _plain(computation.body.result_type, result)

    def _count(self, computation: Computation, values: Sequence[Any]) -> int | None:
        """Return how many members the arguments have, None if nothing says so."""
        pairs = zip(computation.body.parameters, values, strict=True)
        counts = {name: n for (name, kind), value in pairs for n in _counts(kind, value)}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ConfigError(f"{computation.name}: every argument at CLIENTS needs one value a member; {found}")
        return next(iter(counts.values()), self._members)


def reference_executor(*, members: int | None = None) -> ReferenceExecutor:
    """Return a new reference executor, with no client state, for `with sv.use(...)`; see `ReferenceExecutor`."""
    return ReferenceExecutor(members=members)


_NO_DEVICES = (
    "argument {name} of {computation}: {value} lives on devices, and the reference executor has none. Give a list with "
    "one value a device ({kind}), or run it on a fleet: `with simulation.fleet(devices=20):` or "
    "`with coordinator.connect(...):`"
)


class _Run:
    """One run: the number of members, and what they have written to their slots."""

    def __init__(self, members: int | None, kept: Mapping[_SlotKey, Any]) -> None:
        self._members = members
        self._kept = kept
        self.written: dict[_SlotKey, Any] = {}
        local = local_handlers(apply)
        placed: dict[Operator, Handler] = {
            "select": _select,
            "federated_broadcast": lambda step, inputs: inputs[0],
            "federated_map": self._map,
            "federated_zip": self._zip,
            "federated_value": lambda step, inputs: inputs[0],
            "federated_eval": self._eval,
            "federated_sum": self._sum,
            "federated_secure_sum": self._sum,
            "federated_mean": self._mean,
            "federated_min": lambda step, inputs: self._extreme(step, inputs[0], np.min),
            "federated_max": lambda step, inputs: self._extreme(step, inputs[0], np.max),
            "federated_aggregate": self._aggregate,
            "federated_select": self._slices,
            "sequence_map": lambda step, inputs: _each(local["sequence_map"], step, inputs),
            "sequence_reduce": lambda step, inputs: _each(local["sequence_reduce"], step, inputs),
            "sequence_sum": lambda step, inputs: _each(local["sequence_sum"], step, inputs),
            "client_state_read": self._read,
            "client_state_write": self._write,
        }
        self.handlers = {**local, **placed}

    def _every(self, step: Step, value: Any) -> Members:
        """Return `value`, at CLIENTS, one for each member."""
        return value if isinstance(value, Members) else Members([value] * self._count(step))

    def _count(self, step: Step) -> int:
        if self._members is None:
            raise ConfigError(
                f"{step.where}: nothing says how many members there are; give an argument {{T}}@CLIENTS, or run it in "
                "sv.reference_executor(members=...)"
            )
        return self._members

    def _map(self, step: Step, inputs: list[Any]) -> Any:
        function = step.functions[0]
        if _is_single(step.type):
            return apply(function, inputs[0])
        return Members(apply(function, member) for member in self._every(step, inputs[0]))

    def _zip(self, step: Step, inputs: list[Any]) -> Any:
        assert isinstance(step.type, FederatedType)
        kind = step.type.member
        assert isinstance(kind, StructType)
        if _is_single(step.type):
            return struct_value(kind, inputs)
        columns = [self._every(step, value) for value in inputs]
        return Members(struct_value(kind, row) for row in zip(*columns, strict=True))

    def _eval(self, step: Step, inputs: list[Any]) -> Any:
        function = step.functions[0]
        if _is_single(step.type):
            return apply(function, None)
        return Members(apply(function, None) for _ in range(self._count(step)))

    def _sum(self, step: Step, inputs: list[Any]) -> Any:
        kind = _member(step.type)
        return total(kind, _bounded(step, kind, self._every(step, inputs[0])), what=step.where)

    def _mean(self, step: Step, inputs: list[Any]) -> Any:
        kind = _member(step.type)
        members = _bounded(step, kind, self._every(step, inputs[0]))
        if not members:
            raise ConfigError(f"{step.where}: there are no members, so there is no mean; give at least one")
        weights = [float(np.reshape(w, ())) for w in self._every(step, inputs[1])] if len(inputs) > 1 else None
        return _mean(step, kind, members, weights or [1.0] * len(members))

    def _extreme(self, step: Step, value: Any, choose: Callable[..., Any]) -> Any:
        kind, members = _member(step.type), self._every(step, value)
        if not members:
            raise ConfigError(f"{step.where}: there are no members, so there is no such value; give at least one")
        columns = zip(*(flatten(kind, member) for member in members), strict=True)
        return unflatten(kind, [choose(np.stack(column), axis=0) for column in columns])

    def _aggregate(self, step: Step, inputs: list[Any]) -> Any:
        accumulate, merge, report = step.functions
        members, zero = self._every(step, inputs[0]), inputs[1]
        middle = len(members) // 2  # Two accumulators, so that `merge` is used as it would be elsewhere.
        halves = [reduced(accumulate, half, zero, apply) for half in (members[:middle], members[middle:])]
        return apply(report, apply(merge, tuple(halves)))

    def _slices(self, step: Step, inputs: list[Any]) -> Any:
        assert step.bound is not None
        limit = int(step.bound.high)
        return Members(_slice_all(step, keys, inputs[1], limit) for keys in self._every(step, inputs[0]))

    def _read(self, step: Step, _: list[Any]) -> Any:
        slot = _slot(step)
        first = unflatten(slot.type, slot.initial)
        return Members(self._kept.get(_key(slot, at), first) for at in range(self._count(step)))

    def _write(self, step: Step, inputs: list[Any]) -> Any:
        slot = _slot(step)
        members = self._every(step, inputs[0])
        self.written |= {_key(slot, at): member for at, member in enumerate(members)}
        return members


def _placed(kind: Type, value: Any) -> Any:
    """Return `value` with what is one a member as `Members`, structs of placed values included."""
    if isinstance(kind, FederatedType):
        return value if kind.all_equal else Members(value)
    if isinstance(kind, StructType):
        parts = zip(kind.elements, value, strict=True)
        return struct_value(kind, [_placed(element, part) for (_, element), part in parts])
    return value


def _plain(kind: Type, value: Any) -> Any:
    """Return `value` in canonical form again."""
    if isinstance(kind, FederatedType):
        return tuple(value) if isinstance(value, Members) else value
    if isinstance(kind, StructType):
        parts = zip(kind.elements, value, strict=True)
        return struct_value(kind, [_plain(element, part) for (_, element), part in parts])
    return value


def _counts(kind: Type, value: Any) -> list[int]:
    if isinstance(value, Members):
        return [len(value)]
    if isinstance(kind, StructType):
        parts = zip(kind.elements, value, strict=True)
        return [count for (_, element), part in parts for count in _counts(element, part)]
    return []


def _is_single(kind: Type) -> bool:
    return isinstance(kind, FederatedType) and kind.all_equal


def _member(kind: Type) -> Type:
    assert isinstance(kind, FederatedType)
    return kind.member


def _slot(step: Step) -> Slot:
    assert step.slot is not None
    return step.slot


def _key(slot: Slot, member: int) -> _SlotKey:
    return slot.name, slot.version, member


def _select(step: Step, inputs: list[Any]) -> Any:
    value = inputs[0]
    return Members(member[step.index] for member in value) if isinstance(value, Members) else value[step.index]


def _each(handler: Handler, step: Step, inputs: list[Any]) -> Any:
    """Apply a sequence's handler member by member where the sequence is placed."""
    sequence, *rest = inputs
    if not isinstance(step.type, FederatedType):
        return handler(step, inputs)
    inner = dataclasses.replace(step, type=step.type.member)
    if not isinstance(sequence, Members):
        return handler(inner, inputs)
    return Members(handler(inner, [member, *rest]) for member in sequence)


def _slice_all(step: Step, keys: Any, whole: Any, limit: int) -> list[Any]:
    for key in keys:
        if not 0 <= key <= limit:
            raise ConfigError(f"{step.where}: the key {key} is not one of 0 to {limit}")
    return [apply(step.functions[0], (whole, key)) for key in keys]


def _bounded(step: Step, kind: Type, members: Sequence[Any]) -> Sequence[Any]:
    """Return the values as they are summed, clamped where the author says so.

    Raises:
        ConfigError: One holds NaN or infinity; a device that computes it takes no part.
    """
    for at, member in enumerate(members):
        if not all(np.isfinite(leaf).all() for leaf in flatten(kind, member)):
            raise ConfigError(
                f"{step.where}: the value of member {at} holds NaN or infinity, and a device with such a value takes "
                f"no part; {GUARD}"
            )
    return members if step.bound is None else [clipped(kind, member, step.bound) for member in members]


def _mean(step: Step, kind: Type, members: Sequence[Any], weights: Sequence[float]) -> Any:
    """Return the weighted mean as a fleet makes it: clip, multiply by the weight's share, clamp, sum, divide."""
    cap = step.terms.weight_cap
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise ConfigError(f"{step.where}: a weight is {weight:g}; weights are finite and not negative")
    shares = [min(weight, cap) / cap if cap else weight for weight in weights]
    if not sum(shares) > 0:
        raise ConfigError(f"{step.where}: all weights are 0, so there is no mean")
    columns = list(zip(*(_clipped_to_norm(flatten(kind, member), step.terms) for member in members), strict=True))
    means = [_weighted(column, shares, step.terms).astype(leaf.numpy_dtype)[()] for column, (_, leaf) in
             zip(columns, leaves(kind), strict=True)]  # fmt: skip
    return unflatten(kind, means)


def _clipped_to_norm(flat: list[Any], terms: Terms) -> list[Any]:
    wide = [np.asarray(leaf, np.float64) for leaf in flat]
    if terms.clip_norm is None:
        return wide
    norm = float(np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in wide)))
    return [leaf * (terms.clip_norm / norm) for leaf in wide] if norm > terms.clip_norm else wide


def _weighted(column: Sequence[Any], shares: Sequence[float], terms: Terms) -> Any:
    parts = np.stack([leaf * share for leaf, share in zip(column, shares, strict=True)])
    if terms.half_range is not None:
        parts = np.clip(parts, -terms.half_range, terms.half_range)
    return np.asarray(parts.sum(axis=0) / sum(shares))
