"""What the server knows at each stage of a session, one frozen dataclass per stage.

The dataclasses are frozen; the collections that a stage gathers grow by one whole, checked answer at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from sottovoce.secagg.graph import GraphRule, Positions
from sottovoce.secagg.keys import KeyPair
from sottovoce.secagg.roster import Member, Shape
from sottovoce.secagg.shamir import Limbs
from sottovoce.secagg.uploads import ExpectedVector
from sottovoce.wire.messages import ShareKeys

Marks: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Cohort:
    """The members of the roster, fixed when the first stage closes.

    Attributes:
        shape: The graph and the session id.
        members: In roster order; the index is the position.
        position_of: Device id -> position.
        neighbours: Of every position, ascending, shape (members, k).
    """

    shape: Shape
    members: tuple[Member, ...]
    position_of: Mapping[str, int]
    neighbours: Positions = field(repr=False, compare=False)

    @property
    def holders(self) -> Positions:
        """Who holds a share of the self seed of every position, ascending; in a complete graph everybody does."""
        everybody = self.shape.members
        return np.broadcast_to(np.arange(everybody), (everybody,) * 2) if self.shape.graph.complete else self.neighbours

    def neighbours_of(self, position: int) -> list[int]:
        """Return the neighbours of `position`, ascending."""
        around: list[int] = self.neighbours[position].tolist()
        return around

    def marked(self, positions: Collection[int]) -> Marks:
        """Return whether each position is one of `positions`."""
        marks = np.zeros(self.shape.members, np.bool_)
        marks[np.fromiter(positions, np.int64, len(positions))] = True
        return marks

    def names(self, positions: Iterable[int]) -> frozenset[str]:
        """Return the device ids at `positions`."""
        return frozenset(self.members[position].device for position in positions)


class Candidate(msgspec.Struct, frozen=True):
    """A device that has advertised keys.

    Attributes:
        member: As verified.
        payload: Its signed advertisement, forwarded to its neighbours.
    """

    member: Member
    payload: bytes


@dataclass(frozen=True, slots=True)
class AdvertisingKeys:
    """Waiting for fresh keys from the devices invited.

    Attributes:
        expected: Their device ids.
        graph_rule: Gives (k, t) of so many members.
        upload_keys: The coordinator's key pair of this session.
        answers: Device id -> what it has advertised.
    """

    expected: frozenset[str]
    graph_rule: GraphRule
    upload_keys: KeyPair = field(repr=False)
    answers: dict[str, Candidate] = field(default_factory=dict)

    def waiting_for(self) -> frozenset[str]:
        """Return the devices that still owe an answer."""
        return self.expected - self.answers.keys()


@dataclass(frozen=True, slots=True)
class SharingKeys:
    """Waiting for encrypted shares; nothing is forwarded before this stage is closed."""

    cohort: Cohort
    upload_keys: KeyPair = field(repr=False)
    answers: dict[int, ShareKeys] = field(default_factory=dict)

    def waiting_for(self) -> frozenset[str]:
        """Return the devices that still owe an answer."""
        return self.cohort.names(self.cohort.position_of.values()) - self.cohort.names(self.answers)


@dataclass(frozen=True, slots=True)
class CollectingInputs:
    """Adding masked vectors, each in one step when it is whole.

    Attributes:
        cohort: The members.
        commitments: Position -> commitment, of every member that shared keys.
        total: The accumulator.
        upload_keys: Position -> the key that tags this member's chunks, of every member that shared keys.
        announced: Position -> the vector that was announced, until it has been added.
        inclusions: Position -> neighbour's position -> the token made for that neighbour (active mode).
        added: Positions whose vector is in the total.
    """

    cohort: Cohort
    commitments: Mapping[int, bytes]
    total: bytearray = field(repr=False)
    upload_keys: Mapping[int, bytes] = field(repr=False)
    announced: dict[int, ExpectedVector] = field(default_factory=dict)
    inclusions: dict[int, dict[int, bytes]] = field(default_factory=dict, repr=False)
    added: set[int] = field(default_factory=set)

    def waiting_for(self) -> frozenset[str]:
        """Return the devices whose vector is not in the total."""
        return self.cohort.names(self.commitments.keys() - self.added)


@dataclass(frozen=True, slots=True)
class CheckingConsistency:
    """Active mode: waiting for the survivors' signatures on their own set.

    Attributes:
        inputs: The total, and who shared keys.
        survivors: U3, sorted positions.
        alive: The same as a set.
        digest: What they are to sign.
        answers: Position -> signed envelope.
    """

    inputs: CollectingInputs
    survivors: tuple[int, ...]
    alive: frozenset[int]
    digest: bytes
    answers: dict[int, bytes] = field(default_factory=dict)

    def waiting_for(self) -> frozenset[str]:
        """Return the devices that still owe an answer."""
        return self.inputs.cohort.names(self.alive - self.answers.keys())


@dataclass(frozen=True, slots=True)
class CollectingShares:
    """Waiting for the shares that unmask the total.

    Attributes:
        inputs: The total, and who shared keys.
        survivors: U3, sorted positions.
        alive: The same as a set.
        asked: Position -> how many shares it is asked for.
        answers: Position -> the shares it gave, in order of their owners' positions.
    """

    inputs: CollectingInputs
    survivors: tuple[int, ...]
    alive: frozenset[int]
    asked: Mapping[int, int]
    answers: dict[int, Limbs] = field(default_factory=dict, repr=False, compare=False)

    def waiting_for(self) -> frozenset[str]:
        """Return the devices that still owe an answer."""
        return self.inputs.cohort.names(self.asked.keys() - self.answers.keys())


@dataclass(frozen=True, slots=True)
class Unmasked:
    """The sum over the survivors, and nothing about any one of them."""

    total: bytearray = field(repr=False)

    def waiting_for(self) -> frozenset[str]:
        """Return nobody: the session is over."""
        return frozenset()


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The session ended without a sum; everything gathered is dropped.

    Attributes:
        reason: Short code.
    """

    reason: str

    def waiting_for(self) -> frozenset[str]:
        """Return nobody: the session is over."""
        return frozenset()


Stage: TypeAlias = (
    AdvertisingKeys | SharingKeys | CollectingInputs | CheckingConsistency | CollectingShares | Unmasked | Abandoned
)
