"""A device's machine that a test puts into any state, and what it is fed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import msgspec

from edge_agent.effects import Entry, LocalFacts, PlanFetched, Send
from edge_agent.participation import Participation
from edge_agent.policy import Policy
from edge_agent.states import (
    IN_SESSION,
    Advertised,
    AwaitingOutcome,
    CheckedIn,
    Device,
    Fetching,
    Idle,
    Opening,
    OpenRound,
    Sharing,
    State,
    Uploaded,
    Uploading,
    Waiting,
    Watching,
    Working,
)
from sottovoce.blobs import blob_ref, canonical, digest_of
from sottovoce.identity import SignedContext
from sottovoce.wire.codec import ALL, Opened
from sottovoce.wire.messages import (
    AdvertiseKeysRequest,
    Announcement,
    MaskedInputRequest,
    Message,
    NotSelected,
    Outcome,
    Roster,
    RoundOver,
    Selected,
    SurvivorsRequest,
    TaggedVector,
    UnmaskingRequest,
    UploadSlot,
)

NOW = 1_780_000_000_000
SESSION = b"s" * 32
ANNOUNCED = TaggedVector(size=100, chunk_bytes=10, tags=bytes(160))
STATES = get_args(State)


class FakeSession:
    """Stands in for a ClientSession: remembers only whether its secrets were dropped."""

    session_id = SESSION
    masked_vector = bytearray(100)

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


@dataclasses.dataclass
class Machine:
    """A participation in any state, and messages that fit it."""

    participation: Participation
    plan: Any
    parameters: Any
    state_ref: Any
    certificate: Any

    def entry(self, *, session: bytes = b"") -> Entry:
        return Entry(b"a" * 32, "coordinator", "digits", b"p" * 32, 3, 1, "r7", session)

    def open_round(self, *, session: bytes = b"") -> OpenRound:
        return OpenRound(self.entry(session=session), self.announcement(), self.plan, NOW + 1_000_000)

    def announcement(self, *, now_ms: int = NOW, plan: Any = None) -> Announcement:
        return Announcement(
            certificate=b"",
            previous=bytes(32),
            plan=blob_ref(canonical(plan or self.plan)),
            state=self.state_ref,
            now_ms=now_ms,
            selection_closes_ms=now_ms + 10_000,
            rendezvous_ms=now_ms + 60_000,
            rendezvous_closes_ms=now_ms + 90_000,
        )

    def put(self, kind: type[State]) -> State:
        """Put the participation into a state of that kind."""
        round_, spent = self.open_round(), self.open_round(session=SESSION)
        session: Any = FakeSession()
        made: dict[type[State], Callable[[], State]] = {
            Idle: Idle,
            Watching: lambda: Watching(self.entry(), "for a test"),
            CheckedIn: lambda: CheckedIn(round_),
            Fetching: lambda: Fetching(round_, frozenset({b"d" * 32})),
            Working: lambda: Working(round_),
            Waiting: lambda: Waiting(round_),
            Opening: lambda: Opening(round_, self.invitation()),
            Advertised: lambda: Advertised(round_, session, 5),
            Sharing: lambda: Sharing(round_, session, 5, 4),
            Uploading: lambda: Uploading(spent, session, ANNOUNCED),
            Uploaded: lambda: Uploaded(spent, session),
            AwaitingOutcome: lambda: AwaitingOutcome(self.entry(session=SESSION), NOW + 1_000_000),
        }
        self.participation.state = made[kind]()
        return self.participation.state

    def invitation(self, **changes: Any) -> AdvertiseKeysRequest:
        """What opens the rendezvous, with other parameters if need be."""
        return AdvertiseKeysRequest(msgspec.structs.replace(self.parameters, **changes), b"\t" * 32)

    def message(self, kind: type[Message]) -> Message:
        made: dict[type[Message], Callable[[], Message]] = {
            Announcement: self.announcement,
            Outcome: lambda: Outcome(b"", b"a" * 32, False, "late", (), self.state_ref, NOW),
            Selected: lambda: Selected("r7", NOW),
            NotSelected: lambda: NotSelected(NOW),
            AdvertiseKeysRequest: self.invitation,
            Roster: lambda: Roster(bytes(96), 2, 2, ()),
            MaskedInputRequest: lambda: MaskedInputRequest((), b""),
            UploadSlot: lambda: UploadSlot(bytes(2), False),
            SurvivorsRequest: lambda: SurvivorsRequest((0, 1)),
            UnmaskingRequest: lambda: UnmaskingRequest((0, 1), ()),
            RoundOver: lambda: RoundOver("late"),
        }
        return made[kind]()

    def opened(self, message: Message, *, payload: bytes = b"x", **changes: Any) -> Opened[Any]:
        published = isinstance(message, Announcement | Outcome)
        before = isinstance(message, Selected | NotSelected | AdvertiseKeysRequest | Roster | RoundOver) or published
        sessions = isinstance(self.participation.state, (*IN_SESSION, AwaitingOutcome))
        context = SignedContext(
            "coordinator",
            ALL if published else "pi-0",
            "choir",
            3,
            1,
            SESSION if sessions and not before else bytes(32),
        )
        return Opened(
            message,
            self.certificate,
            msgspec.structs.replace(context, **changes),
            digest_of(canonical(message)),
            payload,
        )

    def receive(self, message: Message, now: int = NOW, **changes: Any) -> list[Any]:
        return self.participation.receive(self.opened(message, **changes), now)


def machine_of(world: Any) -> Machine:
    """Return the machine of the one device of a motionless world."""
    setup = world.setup("pi-0")
    device = Device(
        identity=setup.identity,
        anchor=setup.anchor,
        policy=Policy(minimum_cohort=3, minimum_honest_survivors=2),
        entropy=lambda count: bytes(count),
    )
    coordinator = world.coordinator
    return Machine(
        Participation(device),
        coordinator.plan,
        coordinator.parameters(),
        blob_ref(coordinator.state_bytes),
        coordinator.identity.certificate,
    )


def announce(machine: Machine, *, plan: Any = None, payload: bytes = b"e", now: int = NOW, **changes: Any) -> list[Any]:
    return machine.receive(machine.announcement(plan=plan), payload=payload, now=now, **changes)


def plan_arrives(machine: Machine, plan: Any = None, *, now: int = NOW, **facts: Any) -> list[Any]:
    known = LocalFacts(**{"last_round": None, "releases": 0, "examples": 9, **facts})
    return machine.participation.report(PlanFetched(canonical(plan or machine.plan), known), now)


def sent(effects: list[Any]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Send)]
