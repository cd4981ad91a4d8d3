"""Announced rounds: the chain of each coordinator's announcements, and whether this device may take part in a round.

An announcement older than the newest heard is a replay and is refused. One that denies the one before it is a fork: the
owner is warned, and the round is judged by its number as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.effects import Effect, Entry, LocalFacts, Log
from edge_agent.policy import check_participation, check_plan
from edge_agent.states import Device, OpenRound
from sottovoce.errors import BadExamples, PolicyRefusal, Replayed
from sottovoce.plan import Plan
from sottovoce.wire.messages import Announcement, Outcome

GRACE_MS = 60_000
"""How long after its last deadline a silent round is given up."""
_FORK = (
    "a fork: what coordinator {2} announces as round {0}, attempt {1}, does not follow what it has announced to this "
    "device before; ask its operator whether the journal was restored, and other devices what they were told"
)


@dataclass(frozen=True, slots=True)
class Announced:
    """A round that is announced.

    Attributes:
        digest: Digest of the announcement's envelope.
        coordinator: Name of the coordinator that signed it.
        position: Round, and attempt within the round.
        announcement: What it says.
        heard_ms: Local time at which this device heard it.
    """

    digest: bytes
    coordinator: str
    position: tuple[int, int]
    announcement: Announcement
    heard_ms: int

    def entry(self, plan: Plan | None) -> Entry:
        """Return what a device remembers of the round; without `plan` it has nothing to fetch when the round ends."""
        round_, attempt = self.position
        return Entry(
            announcement=self.digest,
            coordinator=self.coordinator,
            plan_name=plan.name if plan else "",
            program=plan.program.digest if plan else b"",
            round=round_,
            attempt=attempt,
            route="0",
            publishes=self.announcement.plan.digest if plan and plan.publish else b"",
        )

    def open(self, plan: Plan) -> OpenRound:
        """Return the round in which this device now has a part."""
        remaining_ms = self.announcement.rendezvous_closes_ms - self.announcement.now_ms
        give_up_ms = self.heard_ms + max(0, remaining_ms) + GRACE_MS
        return OpenRound(self.entry(plan), self.announcement, plan, give_up_ms)


class Announcements:
    """What coordinators have announced, as far as this process has heard: the newest of each, and the last outcome."""

    def __init__(self) -> None:
        self._newest: dict[str, Announced] = {}
        self._last_outcome: Outcome | None = None

    def repeats(self, announced: Announced) -> bool:
        """Say whether the very same announcement is the newest of its coordinator."""
        newest = self._newest.get(announced.coordinator)
        return newest is not None and newest.digest == announced.digest

    def hear(self, announced: Announced) -> list[Effect]:
        """Take the next announcement of a coordinator; return a warning if it is a fork.

        Raises:
            Replayed: It is older than the newest; nothing has changed.
        """
        newest, position = self._newest.get(announced.coordinator), announced.position
        # A coordinator that has lost its journal starts over with small numbers and later times: that is no replay.
        if (
            newest is not None
            and position < newest.position
            and announced.announcement.now_ms <= newest.announcement.now_ms
        ):
            raise Replayed(f"the announcement of round {position}, where round {newest.position} has been announced")
        self._newest[announced.coordinator] = announced
        if newest is None or not self._denies(newest, announced):
            return []
        return [Log(_FORK.format(*position, announced.coordinator), warning=True)]

    def end(self, outcome: Outcome) -> None:
        """Take note of how a round has ended."""
        self._last_outcome = outcome

    def outcome_of(self, announced: Announced) -> Outcome | None:
        """Return how the round has ended if that is the last thing heard of any round's end."""
        outcome = self._last_outcome
        return outcome if outcome is not None and outcome.announcement == announced.digest else None

    def _denies(self, before: Announced, announced: Announced) -> bool:
        """Say whether an announcement contradicts the one heard before it, where no third can lie between them."""
        round_, attempt = before.position
        outcome = self.outcome_of(before)
        committed = outcome is not None and outcome.committed
        follows = announced.position == (round_, attempt + 1) or (committed and announced.position == (round_ + 1, 0))
        return announced.position == before.position or (follows and announced.announcement.previous != before.digest)


def check_announced(device: Device, announced: Announced, plan: Plan, facts: LocalFacts, *, now_ms: int) -> None:
    """Hold an announced round against what the owner allows and what this device has.

    Args:
        device: Who would take part.
        announced: The round.
        plan: Its plan.
        facts: What the disk knows about the plan.
        now_ms: The coordinator's time.

    Raises:
        PolicyRefusal: The owner does not allow it.
        BadExamples: There is no example.
    """
    policy = device.policy
    if plan.fleet != device.fleet:
        raise PolicyRefusal("fleet", f"the plan is for fleet {plan.fleet!r}")
    check_plan(policy, plan, now_ms // 1000)
    check_participation(plan, round=announced.position[0], last=facts.last_release, now_s=now_ms / 1000)
    if facts.releases >= policy.max_releases_per_state:
        raise PolicyRefusal(
            "max_releases_per_state",
            f"this device has answered plan {plan.name!r} from the same state and examples {facts.releases} times, "
            f"allowed {policy.max_releases_per_state}; it answers again when its examples are others",
        )
    if facts.examples == 0:
        raise BadExamples(f"no examples in collection {plan.collection!r}: edge-agent import {plan.collection} FILE")
