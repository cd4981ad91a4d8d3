"""One round that counts: which committed program, which bounds, and the fleet or the lists that it runs on.

Everything in `sottovoce.language.analytics` is made of such rounds. They run where computations run: in the current
executor (`sottovoce.language.context`), on a fleet or, with one list a device, in this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.aggregations import lane_of_counts
from sottovoce.language.arguments import DeviceValues
from sottovoce.language.context import current_executor
from sottovoce.language.counting import START
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.language.plain_rounds import PlainRounds
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.language.programs import next_key
from sottovoce.plan import Aggregation, Counted, Extraction, LaneName, LocalWork, ParticipationTerms
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array

Examples: TypeAlias = DeviceValues | Sequence[Any]
"""`sv.collection(name)`, or one entry a device: a list of messages, or a mapping from columns to numbers."""
COUNTS, DEVICES = "counts", "devices"
"""The aggregations of a round that counts, and the names of what it publishes."""
_BATCH_SIZE = 1024
_START = {START: np.zeros(1, np.int32)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CountTerms:
    """What one device may contribute, how often, and what becomes known of the sum.

    Attributes:
        most: Largest count of one entry (Linf); what is more is clamped on the device.
        entries: Most entries of one device (L0): it keeps its largest, equal ones by the lowest index; 0 is no limit.
        newest: Only so many of the newest examples (messages, values) count; 0 is all.
        threshold: Entries of fewer devices are set to 0 before anything is written down or published; 0 keeps all. It
            is hygiene of what is published, no protection from the coordinator.
        publish: The sums go back to every device of the fleet.
        participation: How often one device answers.
    """

    most: int = 10
    entries: int = 0
    newest: int = 0
    threshold: int = 3
    publish: bool = False
    participation: ParticipationTerms = field(default_factory=ParticipationTerms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """A round before it is asked.

    Attributes:
        name: Of the plan.
        purpose: What it is for, in words that a device's owner understands.
        program: The bundle.
        aggregations: What is summed.
        terms: Bounds and publication.
        broadcast: Of the program, beside `start`.
        extraction: How messages become rows; None for numbers.
    """

    name: str
    purpose: str
    program: bytes
    aggregations: tuple[Aggregation, ...]
    terms: CountTerms
    broadcast: Mapping[str, Array]
    extraction: Extraction | None = None

    def request(self, examples: Examples, *, key: str = "") -> RoundRequest:
        """Return the round to ask a fleet for.

        Args:
            examples: Where the values are. Lists of numbers become `members`, which only a simulated fleet takes.
            key: As in RoundRequest.
        """
        terms = self.terms
        in_lists = [] if isinstance(examples, DeviceValues) or self.extraction else _columns(examples)
        return RoundRequest(
            key=key,
            name=self.name,
            purpose=self.purpose,
            collection=examples.name if isinstance(examples, DeviceValues) else "values given as lists",
            bundle=self.program,
            work=LocalWork(batch_size=_BATCH_SIZE, max_examples=terms.newest, order="stored"),
            aggregations=self.aggregations,
            weight_cap=1,
            broadcast=encode_tensors({**_START, **self.broadcast}),
            members=tuple(map(encode_tensors, in_lists)),
            extraction=self.extraction,
            threshold=terms.threshold,
            participation=terms.participation,
            publish=terms.publish,
        )

    def run(self, examples: Examples) -> RoundSums:
        """Run it in the current executor and return its sums, thresholded.

        Raises:
            ConfigError: The examples are not where this executor looks for them, or a number is impossible.
            RoundAbandoned: The round ended without a result.
        """
        executor = current_executor()
        if isinstance(executor, FleetExecutor):
            if self.extraction is not None and not isinstance(examples, DeviceValues):
                raise ConfigError(
                    f"{self.name}: the messages were given as lists, and on a fleet they live on the devices: name the "
                    'collection, sv.collection("messages"); a simulated fleet takes them with fleet.give(name, lists)'
                )
            return executor.rounds.run(self.request(examples, key=next_key()))
        if isinstance(examples, DeviceValues):
            raise ConfigError(
                f"{self.name}: {examples} lives on devices, and this runs in your own process: give a list with one "
                "entry a device, or run it in `with simulation.fleet(...)` or `with coordinator.connect(...)`"
            )
        members = list(examples) if self.extraction else _columns(examples)
        return PlainRounds(members).run(self.request(examples))


def counted(size: int, terms: CountTerms, *, with_devices: bool = True) -> tuple[Aggregation, ...]:
    """Return the aggregations of a program with one result, `counts`: the counts and, in lanes of their own, devices.

    Args:
        size: Entries of the program.
        terms: The bounds.
        with_devices: Whether devices are counted, too; where `most` is 1 the counts are devices already.

    Raises:
        ConfigError: A bound is impossible.
    """
    if terms.most < 1 or terms.entries < 0 or terms.newest < 0:
        raise ConfigError("most must be at least 1, entries and newest 0 (no limit) or more")
    tensors = (f"int32[{size}]",)
    entries = min(terms.entries, size)
    counts = Aggregation(
        name=COUNTS,
        tensors=tensors,
        encoding=Counted(maximum=terms.most),
        lane=narrow_lane(terms.most, size),
        entries=entries,
    )
    devices = Aggregation(name=DEVICES, tensors=tensors, encoding=Counted(maximum=1), lane="dense", presence_of=COUNTS)
    return (counts, devices) if with_devices else (counts,)


def narrow_lane(maximum: int, size: int) -> LaneName:
    """Return the lane of the fewest bytes for `size` counts up to `maximum`."""
    return "dense" if lane_of_counts(maximum, size) == "uint32" else "uint64"


def _columns(examples: Sequence[Any]) -> list[dict[str, Array]]:
    """Return what every device has as columns; a list of numbers is the column `value`."""
    return [
        {name: np.atleast_1d(np.asarray(column)) for name, column in one.items()}
        if isinstance(one, Mapping)
        else {"value": np.atleast_1d(np.asarray(one))}
        for one in examples
    ]
