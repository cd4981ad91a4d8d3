"""The outgoing queue of a link: bounded in messages and bytes, outliving reconnects."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sottovoce.errors import TransportError


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """One publish on its way to the broker. Two of the same content are two."""

    topic: str
    payload: bytes
    retain: bool
    qos: int

    @property
    def packet_bytes(self) -> int:
        """An upper bound on the size of the MQTT packet that carries it."""
        fixed_header, topic_length, packet_id, properties_length = 5, 2, 2, 1
        return (
            fixed_header + topic_length + len(self.topic.encode()) + packet_id + properties_length + len(self.payload)
        )


class Outbox:
    """Publishes that the broker has not acknowledged: some waiting, some on their way; all of them count.

    One thread puts, another takes and finishes.
    """

    def __init__(self, *, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting: deque[Outgoing] = deque()
        self._count = 0
        self._bytes = 0

    def put(self, message: Outgoing) -> None:
        """Add `message` at the end.

        Raises:
            TransportError: The queue is full.
        """
        with self._lock:
            if self._count >= self._max_messages or self._bytes + len(message.payload) > self._max_bytes:
                raise TransportError(
                    f"the outgoing queue is full ({self._count} messages, {self._bytes} bytes): "
                    "the broker takes them slower than they come, or cannot be reached"
                )
            self._count += 1
            self._bytes += len(message.payload)
            self._waiting.append(message)

    def take(self) -> Outgoing | None:
        """Return the next waiting message, now on its way, or None."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def put_back(self, messages: Sequence[Outgoing]) -> None:
        """Let `messages`, taken before in this order, wait again, ahead of all others."""
        with self._lock:
            self._waiting.extendleft(reversed(messages))

    def finish(self, message: Outgoing) -> None:
        """Forget `message`, taken before: the broker has it, or will never take it."""
        with self._lock:
            self._count -= 1
            self._bytes -= len(message.payload)

    def pending(self) -> int:
        """Number of messages that are not finished."""
        with self._lock:
            return self._count
