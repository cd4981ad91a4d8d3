"""What the participation asks of the shell (effects) and what the shell reports back (events): plain, frozen data.

The core decides and never waits; `edge_agent.agent` performs the effects in the order given. If one of them fails, the
ones after it are not performed: that is how nothing masked leaves before the ledger has its row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from sottovoce.blobs import BlobRef
from sottovoce.plan import Plan
from sottovoce.types import Array
from sottovoce.wire.messages import DeviceMessage
from sottovoce.wire.topics import NO_ROUTE

SettledAs: TypeAlias = Literal["committed", "abandoned", "unknown"]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device remembers of a round it was selected for, so that a killed agent finds its way back.

    Attributes:
        announcement: Digest of the announcement's envelope.
        coordinator: Name of the coordinator.
        plan_name: Name of the plan.
        program: Digest of the plan's bundle.
        round: Round number.
        attempt: Attempt within the round.
        route: The route given in the selection.
        session: Session id once a masked byte may have left, else empty: the part in this round is then over.
        publishes: Digest of the plan if its outcome carries sums for everybody, else empty.
    """

    announcement: bytes
    coordinator: str
    plan_name: str
    program: bytes
    round: int
    attempt: int
    route: str
    session: bytes = b""
    publishes: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextClientState:
    """The value that a program has computed for its slot of client state; it waits for the outcome of the round.

    Attributes:
        slot: Name of the slot.
        version: Version of the slot.
        types: Names and types of what is in it.
        plan_name: The plan that computed it.
        collection: The collection of examples that it was computed from.
        base: Which value it was computed from (`edge_agent.client_states.Reading.base`).
        content: Named tensors.
    """

    slot: str
    version: int
    types: str
    plan_name: str
    collection: str
    base: str
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Contribution:
    """The finished result of the local work, not masked and not spent.

    Attributes:
        values: Every result and metric by name: its tensors in order.
        weight: Number of examples used.
        client_state: What the program's slot becomes if this reaches the sum; it never leaves the device.
        newest_example: Number of the newest example in the collection when the work began.
    """

    values: dict[str, list[Array]] = field(repr=False)
    weight: int
    client_state: NextClientState | None = None
    newest_example: int = 0


@dataclass(frozen=True, slots=True)
class RoundId:
    """Names one attempt of one round of one coordinator, as its signed announcement and outcome do.

    Attributes:
        announcement: Digest of the announcement's envelope.
        coordinator: Name of the coordinator that signed it.
        round: Round number.
        attempt: Attempt within the round.
    """

    announcement: bytes
    coordinator: str
    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class LocalFacts:
    """What this device knows about a plan, read from its disk when the plan arrives.

    Attributes:
        last_round: Newest (round, attempt) of this plan's name that the device has finished, None for none.
        releases: How often something computed from this very state, and from examples that the plan would still use,
            has left the device.
        examples: Number of local examples in the plan's collection.
        last_release: Round and time (Unix seconds) of the last release for plans of this name, None before the first.
    """

    last_round: tuple[int, int] | None
    releases: int
    examples: int
    last_release: tuple[int, float] | None = None


# --- events: from the shell to the core -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanFetched:
    """The plan that the newest announcement names has arrived, verified against its digest."""

    content: bytes
    facts: LocalFacts


@dataclass(frozen=True, slots=True)
class BlobFetched:
    """A blob that was asked for is in the cache, verified."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class WorkFinished:
    """The local work is done and its result is on disk, encrypted."""


@dataclass(frozen=True, slots=True)
class ContributionLoaded:
    """The pending result, read back from disk."""

    contribution: Contribution


Event: TypeAlias = PlanFetched | BlobFetched | WorkFinished | ContributionLoaded


# --- effects: from the core to the shell ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Seal `message` for the coordinator and publish it."""

    message: DeviceMessage
    coordinator: str
    round: int
    attempt: int
    session: bytes = bytes(32)
    route: str = NO_ROUTE


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Publish one chunk of the masked vector."""

    route: str
    session: bytes
    index: int
    content: bytes


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Get the plan blob, collect the local facts about it, and report PlanFetched."""

    ref: BlobRef
    state: bytes


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get a blob into the cache and report BlobFetched."""

    ref: BlobRef


@dataclass(frozen=True, slots=True)
class StartWork:
    """Run the plan's program over the local examples, or take up a pending result or checkpoint of the same work.

    Attributes:
        plan: The plan.
        state: Digest of the state blob.
        expires_ms: When the pending result loses its use, on the coordinator's clock.
    """

    plan: Plan
    state: bytes
    expires_ms: int


@dataclass(frozen=True, slots=True)
class StopWork:
    """Stop the local work; its checkpoint stays for another attempt."""


@dataclass(frozen=True, slots=True)
class LoadContribution:
    """Read the pending result back and report ContributionLoaded."""

    plan: bytes
    state: bytes


@dataclass(frozen=True, slots=True)
class ForgetPending:
    """Erase the pending result and the checkpoint of this plan and state, durably."""

    plan: bytes
    state: bytes


@dataclass(frozen=True, slots=True)
class Spend:
    """Write the ledger row, durably: from here on a masked byte may leave.

    Attributes:
        plan: The plan.
        state: Digest of the state the result was computed from.
        round: Round number.
        attempt: Attempt within the round.
        session: Session id.
        cohort: Number of devices in the session.
        weight: The weight this device reports inside the sum.
    """

    plan: Plan
    state: bytes
    round: int
    attempt: int
    session: bytes
    cohort: int
    weight: int


@dataclass(frozen=True, slots=True)
class HoldClientState:
    """Hold the new client state, durably, until the outcome of `round` is heard."""

    round: RoundId
    value: NextClientState


@dataclass(frozen=True, slots=True)
class SettleClientState:
    """The signed outcome of `round`: keep the client state held for it if this device survived, else drop it."""

    round: RoundId
    survived: bool


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep this entry on disk, or forget the one that is there (None)."""

    entry: Entry | None


@dataclass(frozen=True, slots=True)
class Settle:
    """Write into the ledger how the session ended: `committed`, `abandoned` or `unknown`."""

    session: bytes
    outcome: SettledAs


@dataclass(frozen=True, slots=True)
class AdvanceRound:
    """Remember durably that this round of the plan is finished: it and all older ones are replays from now on."""

    plan_name: str
    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class AdoptState:
    """Fetch this state and keep it as the latest one of `program`, for the device's own use."""

    program: bytes
    ref: BlobRef
    round: int


@dataclass(frozen=True, slots=True)
class KeepPublished:
    """Fetch the sums that a round has published and keep them, with the plan of this digest, for the device's use."""

    plan: bytes
    ref: BlobRef
    round: int


@dataclass(frozen=True, slots=True)
class KeepEvidence:
    """Keep these signed envelopes: they prove that somebody showed two survivor sets in one session."""

    envelopes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KeepTime:
    """Remember durably the latest time that a coordinator signed."""

    signed_ms: int


@dataclass(frozen=True, slots=True)
class Log:
    """One line for the log; `warning` when the owner may have to do something."""

    text: str
    warning: bool = False


Effect: TypeAlias = (
    Send
    | SendChunk
    | FetchPlan
    | Fetch
    | StartWork
    | StopWork
    | LoadContribution
    | ForgetPending
    | Spend
    | HoldClientState
    | SettleClientState
    | Remember
    | Settle
    | AdvanceRound
    | AdoptState
    | KeepPublished
    | KeepEvidence
    | KeepTime
    | Log
)
