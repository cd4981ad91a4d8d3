"""The port through which both shells reach the broker; `mqtt` and `memory` implement it.

One thread owns a transport: it calls `receive` in a loop and everything else in between. Deliveries are acknowledged
to the broker when the *next* `receive` is called, that is after their effect is durable. QoS 1 throughout: a delivery
may come more than once, and out of order after a reconnect. What is subscribed before the first `receive` is in place
when the first Connected comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message arrived.

    Attributes:
        topic: Where it was published.
        payload: Its bytes, untrusted.
        retained: The broker had kept it.
    """

    topic: str
    payload: bytes
    retained: bool


@dataclass(frozen=True, slots=True)
class Connected:
    """The link is up (again); subscriptions are in place. `resumed` says whether the broker kept the session."""

    resumed: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The link is down; the transport reconnects by itself, with jitter.

    Attributes:
        reason: In words, for the log.
        fatal: True when it will not reconnect (another client keeps taking this id, bad credentials).
    """

    reason: str
    fatal: bool = False


Event: TypeAlias = Delivery | Connected | Disconnected


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, when this client vanishes."""

    topic: str
    payload: bytes


class Transport(Protocol):
    """A link to the fleet's broker."""

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that one publish may carry."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Queue `payload` for `topic`; an empty retained payload clears the topic.

        Raises:
            TransportError: Larger than `max_payload_bytes`, the outgoing queue is full, or the transport is closed.
        """

    def subscribe(self, topic_filter: str) -> None:
        """Receive what matches `topic_filter` from now on, also after a reconnect."""

    def unsubscribe(self, topic_filter: str) -> None:
        """Stop receiving what matches `topic_filter`."""

    def receive(self, timeout_s: float) -> Event | None:
        """Acknowledge the previous delivery and return the next event, or None after `timeout_s` seconds."""

    def pending(self) -> int:
        """Number of publishes that the broker has not acknowledged yet."""

    def close(self) -> None:
        """Disconnect in an orderly way (no last will is published) and free everything; may be called twice."""
