"""When a device that only visits has to be here: how long a visit goes on, and when the next one is due. Pure."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from edge_agent.states import (
    AwaitingOutcome,
    CheckedIn,
    Device,
    Fetching,
    Idle,
    Moment,
    State,
    Waiting,
    Watching,
    entry_of,
    present,
)

QUIET_MS = 3_000
ANSWER_MS = 10_000
STALLED_MS = 60_000


@dataclass(frozen=True, slots=True)
class Appointment:
    """What a visit waits for, and when to come back if that does not happen.

    Attributes:
        patience_ms: The visit ends when nothing has happened for so long; None: it stays until something does.
        text: What is next, in words.
        at_ms: When to come back, on the coordinator's clock; None if nobody knows yet.
    """

    patience_ms: int | None
    text: str
    at_ms: int | None = None

    def __str__(self) -> str:
        if self.at_ms is None:
            return self.text
        when = datetime.datetime.fromtimestamp(self.at_ms / 1000, datetime.UTC)
        return f"{self.text} at {when:%Y-%m-%d %H:%M:%S} UTC"


def next_appointment(device: Device, state: State, now: Moment) -> Appointment:
    """Return what a visiting device in `state` waits for."""
    entry = entry_of(state)
    number = entry.round if entry is not None else 0
    match state:
        case Idle():
            return Appointment(QUIET_MS, "no round is open")
        case Watching(reason=reason):
            return Appointment(QUIET_MS, f"nothing to do in round {number}: {reason}")
        case CheckedIn(round=round_):
            closes_ms = round_.announcement.selection_closes_ms
            return Appointment(ANSWER_MS, f"checked in; the selection of round {number} closes", closes_ms)
        case Waiting(round=round_):
            announcement = round_.announcement
            here = present(device, announcement, now)
            return Appointment(
                None if here else 0,
                f"the work is done; the rendezvous of round {number} is",
                announcement.rendezvous_ms,
            )
        case AwaitingOutcome(give_up_ms=None):
            return Appointment(ANSWER_MS, f"the outcome of round {number} is not known yet")
        case Fetching():
            return Appointment(STALLED_MS, f"the program or state of round {number} has not arrived")
        case _:
            return Appointment(None, f"in round {number}")
