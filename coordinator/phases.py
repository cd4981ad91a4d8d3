"""What a round is about, the phases it goes through, and the effects it asks for: plain frozen data.

Selection -> Configuration -> Reporting -> Committed
    \\______________\\____________\\------> Abandoned
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from coordinator.aggregation import UploadSlots
from sottovoce.plan import Plan
from sottovoce.secagg.encoding import Aggregate
from sottovoce.secagg.server import ServerSession
from sottovoce.wire.messages import Message, Mode

Dropped: TypeAlias = Mapping[str, tuple[str, ...]]
NO_SESSION = bytes(32)
ROUTE = "1"
"""Where the cohort sends to; one coordinator has one route, several aggregators would have one each."""


@dataclass(frozen=True, slots=True)
class Agenda:
    """What a round is about.

    Attributes:
        fleet: Name of the fleet.
        coordinator: Name of the coordinator.
        round: Round number.
        attempt: Attempt within the round.
        announcement: Digest of the announcement's envelope.
        plan: The plan.
        state: Digest of the state blob.
    """

    fleet: str
    coordinator: str
    round: int
    attempt: int
    announcement: bytes
    plan: Plan
    state: bytes


@dataclass(frozen=True, slots=True)
class Terms:
    """How many devices, how long, and how the sum is made. Times are Unix milliseconds on the coordinator's clock.

    Attributes:
        goal: Devices wanted in the sum.
        minimum: Fewest devices in the sum.
        wanted: Devices to select: the goal with over-selection, also the largest cohort.
        selection_closes_ms: End of the check-ins.
        rendezvous_ms: Latest start of the rendezvous.
        stage_ms: Duration of one stage of the rendezvous, at most.
        mode: Of secure aggregation.
        corrupt_share_bp: Assumed share of corrupt devices, basis points.
        dropout_share_bp: Assumed share of dropouts, basis points.
        slots: Devices that upload at once.
        slot_idle_ms: A slot without progress for so long goes to the next.
        settle_ms: Selection may close early when no check-in came for so long.
        grace_ms: A disconnected device is not waited for after so long.
    """

    goal: int
    minimum: int
    wanted: int
    selection_closes_ms: int
    rendezvous_ms: int
    stage_ms: int
    mode: Mode = "active"
    corrupt_share_bp: int = 500
    dropout_share_bp: int = 500
    slots: int = 4
    slot_idle_ms: int = 5000
    settle_ms: int = 1000
    grace_ms: int = 1000

    @property
    def rendezvous_closes_ms(self) -> int:
        """When the round is over, one way or the other: five stages after the latest start of the rendezvous."""
        return self.rendezvous_ms + 5 * self.stage_ms


# --- phases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selection:
    """Devices check in.

    Attributes:
        checked_in: Device -> whether it has AES instructions.
        withdrawn: Devices that will not take part.
        last_check_in_ms: Time of the last check-in.
        full_since_ms: When as many had checked in as are wanted, or None.
    """

    checked_in: Mapping[str, bool]
    withdrawn: frozenset[str]
    last_check_in_ms: int
    full_since_ms: int | None


@dataclass(frozen=True, slots=True)
class Configuration:
    """The cohort trains.

    Attributes:
        cohort: Device -> whether it has AES instructions.
        ready: Device -> whether it stays connected until the rendezvous.
        withdrawn: Devices that gave up.
    """

    cohort: Mapping[str, bool]
    ready: Mapping[str, bool]
    withdrawn: frozenset[str]


@dataclass(frozen=True, slots=True)
class Reporting:
    """The rendezvous: secure aggregation runs.

    Attributes:
        cohort: Devices that were selected.
        invited: Device -> whether it said it would stay connected; those asked to advertise keys.
        withdrawn: Devices that gave up.
        session: The server's side of secure aggregation.
        uploads: Who may upload now.
        stage: The stage that is open: a name of `sottovoce.secagg.server.STAGE_NAMES`.
        expected: Devices that owe an answer in it, when it opened.
        stage_opened_ms, stage_closes_ms: Its start and its deadline.
        dropped: Stage -> devices lost in it, so far.
    """

    cohort: frozenset[str]
    invited: Mapping[str, bool]
    withdrawn: frozenset[str]
    session: ServerSession = field(repr=False)
    uploads: UploadSlots = field(repr=False)
    stage: str
    expected: frozenset[str]
    stage_opened_ms: int
    stage_closes_ms: int
    dropped: Dropped

    @property
    def advertising(self) -> bool:
        """True while late devices may still join."""
        return self.stage == "advertise_keys"

    @property
    def collecting(self) -> bool:
        """True while masked vectors come in."""
        return self.stage == "masked_input"


@dataclass(frozen=True, slots=True)
class Committed:
    """The sum over the survivors is known.

    Attributes:
        aggregate: The sums.
        cohort: Devices that were selected.
        survivors: Devices whose update is in the sum.
        dropped: Stage -> devices lost in it.
    """

    aggregate: Aggregate = field(repr=False)
    cohort: frozenset[str]
    survivors: frozenset[str]
    dropped: Dropped


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The round ended without a result.

    Attributes:
        reason: Short code.
        detail: In words, for the log.
        cohort: Devices that were selected.
        dropped: Stage -> devices lost in it.
    """

    reason: str
    detail: str
    cohort: frozenset[str]
    dropped: Dropped


Phase: TypeAlias = Selection | Configuration | Reporting | Committed | Abandoned


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Sign `message` and send it to `device`."""

    device: str
    message: Message = field(repr=False)
    session: bytes = NO_SESSION


@dataclass(frozen=True, slots=True)
class CohortSelected:
    """The cohort is fixed; `passed_over` checked in and were not chosen."""

    cohort: frozenset[str]
    passed_over: frozenset[str]


@dataclass(frozen=True, slots=True)
class RendezvousOpened:
    """These devices have done the work and are asked for keys."""

    ready: frozenset[str]


@dataclass(frozen=True, slots=True)
class StageOpened:
    """A stage of secure aggregation is open; these devices owe an answer."""

    stage: str
    expected: frozenset[str]


@dataclass(frozen=True, slots=True)
class DevicesDropped:
    """These devices were lost in this stage."""

    stage: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceWithdrew:
    """A device gave up and said why, as a short code."""

    device: str
    code: str


Effect: TypeAlias = (
    Send | CohortSelected | RendezvousOpened | StageOpened | DevicesDropped | DeviceWithdrew | Committed | Abandoned
)
