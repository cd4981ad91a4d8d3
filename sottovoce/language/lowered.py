"""A lowered computation: one round on a fleet as data. It runs, and can be saved and loaded, without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.arguments import DeviceValues
from sottovoce.language.client_part import member_of
from sottovoce.language.describing import describe
from sottovoce.language.expressions import Body, Builtin, Step
from sottovoce.language.interpreter import apply, evaluate, local_handlers
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.language.recipes import Recipe
from sottovoce.plan import Aggregation, LocalWork
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array, FunctionType, SequenceType, StructType, TensorType, Type
from sottovoce.values import flatten, leaves

ON_LISTS = "values given as lists"
"""The collection's name where the arguments are lists: the simulation gives each device its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """server_prepare -> broadcast -> client_work -> aggregations -> server_result, of one computation.

    Attributes:
        name: Of the computation, and of the plan.
        purpose: What it is for: the first line of its docstring, else its name.
        signature: Its type.
        parameters: Name and type of each.
        members: Positions of the parameters that are one value a device.
        columns: Name and element type of every column that the client program reads, in the order of the parameters'
            leaves.
        bundle: The client program (`.svp`); empty where the computation needs no devices.
        work: How it walks over the examples.
        aggregations: What is summed, in one masked vector.
        weight_cap: Largest weight of one device.
        broadcast: Name and type of every broadcast port.
        before: server_prepare: from the other parameters to a struct of the broadcast values.
        after: server_result: from the other parameters and the aggregated values to a struct of the result alone.
        recipes: How the aggregated values come from the sums.
        words: What is computed on a device, in the author's words, for `describe`.
    """

    name: str
    purpose: str
    signature: FunctionType
    parameters: tuple[tuple[str, Type], ...]
    members: tuple[int, ...]
    columns: tuple[tuple[str, TensorType], ...]
    bundle: bytes
    work: LocalWork
    aggregations: tuple[Aggregation, ...]
    weight_cap: int
    broadcast: tuple[tuple[str, TensorType], ...]
    before: Body
    after: Body
    recipes: tuple[Recipe, ...]
    words: tuple[str, ...]

    @property
    def needs_devices(self) -> bool:
        """Whether there is anything for devices to do."""
        return bool(self.bundle)

    def prepare(self, arguments: Mapping[str, object]) -> dict[str, Array]:
        """Return what is broadcast: one array for each broadcast port.

        Args:
            arguments: Those that are not one value a device, by name, in canonical form.
        """
        flat = flatten(self.before.result_type, evaluate(self.before, self._given(arguments), _HANDLERS))
        return {
            name: np.asarray(leaf, kind.numpy_dtype).reshape([-1 if d is None else d for d in kind.shape])
            for (name, kind), leaf in zip(self.broadcast, flat, strict=True)
        }

    def result(self, arguments: Mapping[str, object], sums: RoundSums | None) -> Any:
        """Return the computation's result.

        Args:
            arguments: As `prepare` takes them.
            sums: Of the committed round; None where no devices are needed.

        Raises:
            ConfigError: A sum does not fit its dtype.
        """
        aggregated = [] if sums is None else [recipe.value(sums) for recipe in self.recipes]
        return evaluate(self.after, [*self._given(arguments), *aggregated], _HANDLERS)[0]

    def request(self, arguments: Mapping[str, object], *, key: str = "") -> RoundRequest:
        """Return the round to ask a fleet for.

        Args:
            arguments: All of the computation's, by name, in canonical form.
            key: The same key asked again gets the same answer; "" has none.

        Raises:
            ConfigError: The arguments at CLIENTS are of several collections, or some are lists and some are not.
        """
        collection = self.collection_of(arguments)
        given = {self.parameters[at][0]: arguments[self.parameters[at][0]] for at in self.members}
        return RoundRequest(
            key=key,
            name=self.name,
            purpose=self.purpose,
            collection=collection or ON_LISTS,
            bundle=self.bundle,
            work=self.work,
            aggregations=self.aggregations,
            weight_cap=self.weight_cap,
            broadcast=encode_tensors(self.prepare(arguments)),
            members=() if collection else self._members(given),
        )

    def collection_of(self, arguments: Mapping[str, object]) -> str:
        """Return the collection that devices would read, "" where values are given as lists or not at all.

        Raises:
            ConfigError: The arguments at CLIENTS are of several collections, or some are lists and some are not.
        """
        names = [self.parameters[at][0] for at in self.members]
        given = {name: arguments[name] for name in names if name in arguments}
        on_devices = {name: value for name, value in given.items() if isinstance(value, DeviceValues)}
        if on_devices and len(on_devices) < len(given):
            lists = ", ".join(name for name in given if name not in on_devices)
            raise ConfigError(
                f"{self.name}: {lists} is given as a list and {', '.join(on_devices)} as values of the devices; give "
                "sv.latest or sv.collection for all of them, or lists for all"
            )
        collections = sorted({value.name for value in on_devices.values()})
        if len(collections) > 1:
            raise ConfigError(
                f"{self.name} would read the collections {' and '.join(map(repr, collections))}; a computation reads "
                "one. Store both columns in one collection, or write two computations"
            )
        return collections[0] if collections else ""

    def errors(self, devices: int) -> tuple[float | None, ...]:
        """Return for each tensor of the result the largest absolute error that encoding and float32 may make.

        Args:
            devices: How many are in the sum.

        Returns:
            0 where the result is exact; None where it is computed from sums, so that no bound is known beforehand.
        """
        sums = [recipe.errors(devices) for recipe in self.recipes]
        given = [
            (0.0,) * len(leaves(kind)) for _, kind in self.after.parameters[: len(self.parameters) - len(self.members)]
        ]
        known: list[tuple[float | None, ...]] = [*given, *sums]
        for step in self.after.steps[len(known) :]:
            known.append(_errors_of(step, [known[at] for at in step.inputs], self.after))
        return known[self.after.result]

    def describe(self, *, collection: str = "", minimum_cohort: int = 0) -> str:
        """Return what a device would be asked, in words that its owner understands.

        Args:
            collection: The collection that would be read, "" where it is not known.
            minimum_cohort: Fewest devices whose sum is unmasked, 0 where it is not known.
        """
        return describe(self, collection=collection, minimum_cohort=minimum_cohort)

    def save(self, path: Path) -> None:
        """Write it to the file `path` (`.svc`); `sottovoce.language.saved.load_lowered` reads it.

        Raises:
            ConfigError: It holds Python code of this process (`sv.server_computation`), or the file cannot be written.
        """
        from sottovoce.language.saved import encode_lowered

        try:
            path.write_bytes(encode_lowered(self))
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    def _given(self, arguments: Mapping[str, object]) -> list[Any]:
        return [arguments[name] for at, (name, _) in enumerate(self.parameters) if at not in self.members]

    def _members(self, given: Mapping[str, Any]) -> tuple[bytes, ...]:
        """Return the examples of every device as named tensors, from arguments that are one value a device."""
        counts = {name: len(value) for name, value in given.items()}
        if len(set(counts.values())) > 1:
            raise ConfigError(f"{self.name}: the arguments are of different numbers of devices: {counts}")
        kinds = [member_of(self.parameters[at][1]) for at in self.members]
        return tuple(
            encode_tensors(_columns(self.columns, kinds, values, device))
            for device, values in enumerate(zip(*given.values(), strict=True))
        )


def _columns(
    columns: Sequence[tuple[str, TensorType]], kinds: Sequence[Type], values: Sequence[Any], device: int
) -> dict[str, Array]:
    """Return the columns of one device: one row for a single value, one for each element of a sequence."""
    found: list[Array] = []
    for kind, value in zip(kinds, values, strict=True):
        rows = [value] if not isinstance(kind, SequenceType) else value
        element = kind.element if isinstance(kind, SequenceType) else kind
        if not len(rows):
            raise ConfigError(
                f"device {device} has no values; a device without examples cannot take part: leave it out"
            )
        flat = zip(*(flatten(element, row) for row in rows), strict=True)
        found += [np.stack([np.asarray(leaf) for leaf in column]) for column in flat]
    return {name: column.astype(kind.numpy_dtype) for (name, kind), column in zip(columns, found, strict=True)}


def _errors_of(step: Step, inputs: Sequence[tuple[float | None, ...]], body: Body) -> tuple[float | None, ...]:
    flat = tuple(error for one in inputs for error in one)
    if step.operator == "struct":
        return flat
    if step.operator == "select":
        struct = body.steps[step.inputs[0]].type
        assert isinstance(struct, StructType)
        sizes = [len(leaves(kind)) for _, kind in struct.elements]
        start = sum(sizes[: step.index])
        return inputs[0][start : start + sizes[step.index]]
    is_identity = step.operator == "call" and isinstance(f := step.functions[0], Builtin) and f.name == "identity"
    if is_identity:
        return flat
    return (0.0 if all(error == 0 for error in flat) else None,) * len(leaves(step.type))


_HANDLERS = local_handlers(apply)
