"""Where a device may stand in a round: one frozen state each, holding only what it may know.

    Idle            no round is known
    CheckedIn       eligible and willing; waits for the selection
    Fetching        selected; waits for the program and the state
    Working         runs the program over its examples
    Waiting         the result is on disk, encrypted; waits for the rendezvous
    Opening         the rendezvous is open; the result is being read back
    Advertised      waits for the roster
    Sharing         waits for its neighbours' shares
    Uploading       the update is spent; sends the masked vector
    Uploaded        the vector has arrived; waits for the survivor set
    AwaitingOutcome its part is done; waits to hear how the round ended
    Watching        knows the round, has no part in it (any more)

The secrets of a session exist from Advertised to Uploaded, inside `ClientSession`, and leaving those states drops them.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from edge_agent.effects import (
    Entry,
    NextClientState,
    RoundId,
    Send,
)
from edge_agent.policy import Policy
from sottovoce.blobs import Cut
from sottovoce.identity import Identity, TrustAnchor, latest_time
from sottovoce.plan import Plan
from sottovoce.secagg.client import ClientSession
from sottovoce.wire.messages import (
    AdvertiseKeysRequest,
    Announcement,
    DeviceMessage,
)

PRESENT_WITHIN_MS = 60_000
"""A device that is not resident waits for a rendezvous that is at most this far away."""


@dataclass(frozen=True, slots=True)
class Device:
    """Who takes part, and on which terms.

    Attributes:
        identity: The device's key and certificate.
        anchor: The pinned fleet CA.
        policy: What the owner allows.
        entropy: The system's entropy: number of bytes -> bytes.
        fast_aes: True if this machine has AES instructions.
        resident: True if the device stays connected until the round is over.
        chunk_bytes: Largest chunk of a masked vector that the transport carries.
    """

    identity: Identity = field(repr=False)
    anchor: TrustAnchor = field(repr=False)
    policy: Policy
    entropy: Callable[[int], bytes] = field(repr=False)
    fast_aes: bool = False
    resident: bool = True
    chunk_bytes: int = 256 * 1024

    @property
    def name(self) -> str:
        """The device id."""
        return self.identity.certificate.name

    @property
    def fleet(self) -> str:
        """The fleet."""
        return self.identity.certificate.fleet


@dataclass(frozen=True, slots=True)
class Moment:
    """Now, on two clocks.

    Attributes:
        local_ms: A clock of this process that never goes back; timers use it.
        coordinator_ms: The best guess of the coordinator's time; appointments use it.
    """

    local_ms: int
    coordinator_ms: int

    @property
    def at(self) -> datetime.datetime:
        """The time to judge certificates by."""
        return latest_time(self.coordinator_ms / 1000)


@dataclass(frozen=True, slots=True)
class OpenRound:
    """A round in which this device has a part.

    Attributes:
        entry: What would be needed to find back to it.
        announcement: As signed by the coordinator.
        plan: What is asked.
        give_up_ms: Local time at which a silent round is given up.
    """

    entry: Entry
    announcement: Announcement
    plan: Plan
    give_up_ms: int

    @property
    def state(self) -> bytes:
        """Digest of the state that this round starts from."""
        return self.announcement.state.digest

    @property
    def id(self) -> RoundId:
        """What its outcome will name it by."""
        return RoundId(self.entry.announcement, self.entry.coordinator, self.entry.round, self.entry.attempt)

    def send(self, message: DeviceMessage, session: bytes = bytes(32)) -> Send:
        """Return the effect that sends `message` to this round's coordinator."""
        return send(self.entry, message, session)


def send(entry: Entry, message: DeviceMessage, session: bytes = bytes(32)) -> Send:
    """Return the effect that sends `message` to the coordinator of the round in `entry`."""
    return Send(message, entry.coordinator, entry.round, entry.attempt, session, entry.route)


@dataclass(frozen=True, slots=True)
class Idle:
    """No round is known."""


@dataclass(frozen=True, slots=True)
class Watching:
    """A round is known; this device has no part in it (any more). `reason` says why, for people."""

    entry: Entry
    reason: str


@dataclass(frozen=True, slots=True)
class CheckedIn:
    """Checked in, not yet selected."""

    round: OpenRound


@dataclass(frozen=True, slots=True)
class Fetching:
    """Selected; these blobs are still missing."""

    round: OpenRound
    missing: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class Working:
    """The program runs."""

    round: OpenRound


@dataclass(frozen=True, slots=True)
class Waiting:
    """Ready for the rendezvous."""

    round: OpenRound


@dataclass(frozen=True, slots=True)
class Opening:
    """The rendezvous is open as requested; the result is being read back."""

    round: OpenRound
    request: AdvertiseKeysRequest


@dataclass(frozen=True, slots=True)
class Advertised:
    """Fresh keys are advertised."""

    round: OpenRound
    session: ClientSession = field(repr=False)
    weight: int
    client_state: NextClientState | None = None


@dataclass(frozen=True, slots=True)
class Sharing:
    """Shares of both secrets are out, to a cohort of this size."""

    round: OpenRound
    session: ClientSession = field(repr=False)
    weight: int
    cohort: int
    client_state: NextClientState | None = None


@dataclass(frozen=True, slots=True)
class Uploading:
    """Masked; these chunks are on their way."""

    round: OpenRound
    session: ClientSession = field(repr=False)
    vector: Cut
    in_flight: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The coordinator has the whole masked vector."""

    round: OpenRound
    session: ClientSession = field(repr=False)


@dataclass(frozen=True, slots=True)
class AwaitingOutcome:
    """This device's part is done, or was cut off after masking; only the outcome is missing."""

    entry: Entry
    give_up_ms: int | None = None


State: TypeAlias = (
    Idle
    | Watching
    | CheckedIn
    | Fetching
    | Working
    | Waiting
    | Opening
    | Advertised
    | Sharing
    | Uploading
    | Uploaded
    | AwaitingOutcome
)
TakingPart: TypeAlias = CheckedIn | Fetching | Working | Waiting | Opening | Advertised | Sharing | Uploading | Uploaded
TAKING_PART: tuple[type[TakingPart], ...] = (
    CheckedIn, Fetching, Working, Waiting, Opening, Advertised, Sharing, Uploading, Uploaded,
)  # fmt: skip
"""In these states an error ends the part in the round; in the others there is nothing to drop."""
IN_SESSION = (Advertised, Sharing, Uploading, Uploaded)
"""The states that hold the secrets of a session."""


def entry_of(state: State) -> Entry | None:
    """Return the entry of the round that `state` belongs to, None for Idle."""
    match state:
        case Idle():
            return None
        case Watching(entry=entry) | AwaitingOutcome(entry=entry):
            return entry
        case _:
            return state.round.entry


def session_id_of(state: State) -> bytes:
    """Return the id of the session that `state` is in, zeros before the roster and outside sessions."""
    return state.session.session_id if isinstance(state, IN_SESSION) else bytes(32)


def present(device: Device, announcement: Announcement, now: Moment) -> bool:
    """Say whether the device stays connected until the rendezvous."""
    return device.resident or announcement.rendezvous_ms - now.coordinator_ms <= PRESENT_WITHIN_MS
