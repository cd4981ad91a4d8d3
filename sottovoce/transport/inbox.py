"""The events of a link that its owner has not received yet; the only thing its two threads share on the way in.

An owner may be busy for hours while the link comes and goes, so nothing here grows with the number of outages: of link
events only the last word waits, and what the broker will deliver again anyway is dropped. Nor does it grow with what a
hostile broker sends: deliveries are bounded in number and in bytes.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from sottovoce.transport.base import Connected, Delivery, Disconnected, Event

_TELEMETRY_BYTES = 8 * 1024 * 1024
_MOST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the broker wants back for a delivery.

    Attributes:
        link: Number of the connection it came over; over any other it means nothing.
        message_id: The broker's number for it.
    """

    link: int
    message_id: int


class Inbox:
    """Events in order of arrival, for one receiving thread."""

    def __init__(
        self, *, telemetry_limit: int = 1000, telemetry_bytes: int = _TELEMETRY_BYTES, most_bytes: int = _MOST_BYTES
    ) -> None:
        """Make an empty inbox.

        Args:
            telemetry_limit: With this many events waiting, QoS 0 deliveries are dropped.
            telemetry_bytes: So they are where all that waits would be larger than this.
            most_bytes: The others are bounded by the receive maximum, which a broker may ignore: what goes beyond these
                bytes is dropped without a receipt, so that it comes again over the next connection.
        """
        self._telemetry_limit = telemetry_limit
        self._telemetry_bytes = telemetry_bytes
        self._most_bytes = most_bytes
        self._bytes = 0
        self._arrival = threading.Condition()
        self._events: deque[tuple[Event, Receipt | None]] = deque()

    def deliver(self, delivery: Delivery, receipt: Receipt | None) -> None:
        """Add a delivery, if there is room for it; without a receipt (QoS 0) there is less."""
        with self._arrival:
            waiting = self._bytes + _size(delivery)
            if receipt is not None:
                has_room = waiting <= self._most_bytes
            else:
                has_room = len(self._events) < self._telemetry_limit and waiting <= self._telemetry_bytes
            if has_room or not self._bytes:
                self._add(delivery, receipt)

    def link_up(self, *, resumed: bool) -> None:
        """Add Connected in the place of link events not yet received; `resumed` is False if any of them lost it."""
        with self._arrival:
            seen = [event for event, _ in self._events if not isinstance(event, Delivery)]
            lost = any(isinstance(event, Connected) and not event.resumed for event in seen)
            self._forget(Connected)
            self._forget(Disconnected)
            last_down = next((event for event in reversed(seen) if isinstance(event, Disconnected)), None)
            if last_down is not None:
                self._add(last_down, None)
            self._add(Connected(resumed=resumed and not lost), None)

    def link_down(self, reason: str, *, fatal: bool = False) -> None:
        """Add Disconnected; an earlier one not yet received makes room for it."""
        with self._arrival:
            self._forget(Disconnected)
            self._add(Disconnected(reason, fatal), None)

    def drop_unacknowledged(self) -> None:
        """Drop the waiting deliveries with a receipt: the broker has kept the session and delivers them again."""
        with self._arrival:
            self._events = deque(entry for entry in self._events if entry[1] is None)
            self._bytes = sum(_size(event) for event, _ in self._events)

    def take(self, timeout_s: float) -> tuple[Event, Receipt | None] | None:
        """Return the oldest event and its receipt, waiting up to `timeout_s` seconds, or None."""
        with self._arrival:
            if not self._arrival.wait_for(lambda: bool(self._events), timeout_s):
                return None
            event, receipt = self._events.popleft()
            self._bytes -= _size(event)
            return event, receipt

    def _add(self, event: Event, receipt: Receipt | None) -> None:
        self._events.append((event, receipt))
        self._bytes += _size(event)
        self._arrival.notify()

    def _forget(self, kind: type[Connected | Disconnected]) -> None:
        self._events = deque(entry for entry in self._events if not isinstance(entry[0], kind))


def _size(event: Event) -> int:
    """Return the bytes of a delivery; of what the link itself says there is no more than a line."""
    return len(event.topic) + len(event.payload) if isinstance(event, Delivery) else 0
