"""A round as the coordinator's shell sees it: what it is about, how many bytes it cost, and what is told about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from coordinator.assignment import Assignment
from coordinator.events import LOG, EventLog
from coordinator.journal_rows import Ending, Traffic
from coordinator.phases import Abandoned, Committed
from coordinator.round import Round


@dataclass(slots=True)
class RoundRecord:
    """The round in flight with its accounts.

    Attributes:
        assignment: What it does.
        row: Its row in the journal.
        round: The machine.
        started_ms: When it was announced.
        broadcast_bytes: What every device of the cohort downloads besides its own messages.
        events: Where events are written.
        up: Bytes that each device sent.
        down: Bytes that were sent to each device alone.
    """

    assignment: Assignment
    row: int
    round: Round
    started_ms: int
    broadcast_bytes: int
    events: EventLog
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)

    @property
    def number(self) -> tuple[int, int]:
        """Round number and attempt, as announced."""
        return self.round.agenda.round, self.round.agenda.attempt

    def tell(self, event: str, now_ms: int, **fields: object) -> None:
        """Write an event of this round, and a line for the log."""
        number, attempt = self.number
        self.events.write(
            event,
            time_ms=now_ms,
            task=self.assignment.task.name,
            plan=self.assignment.plan.name,
            round=self.assignment.round_of_plan,
            attempt=attempt,
            number=number,
            **fields,
        )
        LOG.info("round %d.%d of %s: %s %s", number, attempt, self.assignment.plan.name, event, _brief(fields))

    def ending(self, phase: Committed | Abandoned, now_ms: int) -> Ending:
        """Return the accounts of the round, for the journal."""
        survivors = phase.survivors if isinstance(phase, Committed) else frozenset()
        up = {device: self.up[device] for device in sorted(phase.cohort)}
        down = {device: self.down[device] for device in sorted(phase.cohort)}
        traffic = Traffic(up, down, self.broadcast_bytes)
        dropped = {stage: list(devices) for stage, devices in phase.dropped.items()}
        return Ending(sorted(phase.cohort), sorted(survivors), dropped, traffic, now_ms)

    def summary(self, ending: Ending) -> dict[str, object]:
        """Return what the events `committed` and `abandoned` say alike."""
        traffic, members = ending.traffic, max(1, len(ending.cohort))
        return {
            "cohort": ending.cohort,
            "dropped": ending.dropped,
            "bytes_up_per_device": round(sum(traffic.up.values()) / members),
            "bytes_down_per_device": round(sum(traffic.down.values()) / members) + traffic.broadcast,
            "seconds": round((ending.ended_ms - self.started_ms) / 1000, 3),
        }


def _brief(fields: dict[str, object]) -> str:
    """Return the fields in a line: lists of devices as their length, long texts not at all."""
    parts = []
    for name, value in fields.items():
        if isinstance(value, list | tuple | set | frozenset):
            parts.append(f"{name}={len(value)}")
        elif isinstance(value, dict):
            parts.append(f"{name}=" + ",".join(f"{key}:{_short(each)}" for key, each in value.items()))
        else:
            parts.append(f"{name}={_short(value)}")
    return " ".join(part for part in parts if not part.endswith("="))


def _short(value: object) -> str:
    if isinstance(value, list | tuple | set | frozenset):
        return str(len(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:40]
