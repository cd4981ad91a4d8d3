"""A broker in this process, for tests and simulation: MQTT's promises, and on demand everything it does not promise.

It keeps what a real broker keeps: retained messages, last wills, sessions that outlive connections, QoS 1 with
redelivery, and the topic rights of `broker_config/production`. Loss, duplication and reordering are drawn from the
given generator, so a single-threaded run is repeatable. At least once remains at least once: a lost QoS 1 message comes
later, never not at all.

Single-threaded code calls `receive(0)`, which never waits; threads may call `receive` with a timeout.
"""

from __future__ import annotations

import functools
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from sottovoce.blobs import DEFAULT_CHUNK_BYTES
from sottovoce.errors import TransportError
from sottovoce.transport.base import Connected, Delivery, Disconnected, Event, Will
from sottovoce.transport.mqtt_settings import HEADER_ALLOWANCE_BYTES
from sottovoce.transport.outbox import Outbox, Outgoing
from sottovoce.wire.topics import check_filter, check_topic, matches

COORDINATOR = "coordinator"
"""The client id that may use every topic, as in the production configuration."""

MayUse: TypeAlias = Callable[[str, str, str], bool]
"""(client id, "read" or "write", topic) -> allowed."""


def production_rights(client_id: str, action: str, topic: str) -> bool:
    """Say whether the access list of `broker_config/production` lets `client_id` do `action` ("read" or "write")."""
    if client_id == COORDINATOR:
        return True
    filters = {
        "read": ("sv1/+/all/#", f"sv1/+/dn/{client_id}/#"),
        "write": (f"sv1/+/st/{client_id}", f"sv1/+/up/{client_id}/#"),
    }[action]
    return _subscribed(filters, topic)


_matches = functools.lru_cache(maxsize=65_536)(matches)
"""In a fleet of hundreds every publish is held against hundreds of filters, mostly the same pairs again and again."""


def _subscribed(filters: Iterable[str], topic: str) -> bool:
    for each in filters:  # noqa: SIM110  a generator here costs half the time of the whole broker
        if _matches(each, topic):
            return True
    return False


@dataclass(frozen=True, slots=True)
class Faults:
    """How unreliable the broker's deliveries are; each a probability from 0 to below 1.

    Attributes:
        loss: A delivery is lost: QoS 0 for good, QoS 1 until it is delivered again later.
        duplicate: A QoS 1 delivery comes once more.
        reorder: A later message of the queue comes before the first.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


@dataclass(frozen=True, slots=True)
class _Queued:
    delivery: Delivery
    qos: int


@dataclass(slots=True, eq=False)
class _Session:
    """What the broker keeps for a client id, connected or not."""

    client_id: str
    arrival: threading.Condition
    filters: dict[str, None] = field(default_factory=dict)
    queue: deque[_Queued] = field(default_factory=deque)
    events: deque[Event] = field(default_factory=deque)
    unacknowledged: _Queued | None = None
    transport: MemoryTransport | None = None
    will: Will | None = None
    connected: bool = False


class MemoryBroker:
    """The broker; make one `MemoryTransport` a client.

    Attributes:
        faults: May be changed at any time.
        denied: How many publishes and deliveries the topic rights have stopped, by client id.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        max_payload_bytes: int = DEFAULT_CHUNK_BYTES + HEADER_ALLOWANCE_BYTES,
        may_use: MayUse = production_rights,
    ) -> None:
        """Make an empty broker.

        Args:
            rng: Draws the faults.
            loss, duplicate, reorder: See Faults.
            max_payload_bytes: Larger publishes are refused.
            may_use: The topic rights.
        """
        self.faults = Faults(loss, duplicate, reorder)
        self.denied: Counter[str] = Counter()
        self.max_payload_bytes = max_payload_bytes
        self._rng = rng
        self._may_use = may_use
        self._lock = threading.RLock()
        self._sessions: dict[str, _Session] = {}
        self._retained: dict[str, bytes] = {}

    # --- faults on demand ---

    def disconnect(self, client_id: str, *, reason: str = "the link broke") -> None:
        """Break the link of `client_id` without a word: its last will is published, its session stays."""
        with self._lock:
            session = self._sessions[client_id]
            if session.connected:
                self._drop(session, Disconnected(reason))
                self._publish_will(session)

    def reconnect(self, client_id: str, *, resumed: bool = True) -> None:
        """Bring the link of `client_id` back; its transport goes on where it was.

        Args:
            client_id: Whose link.
            resumed: False forgets the session first, as a broker does with one that has expired: what was queued is
                gone, and what is retained comes again.
        """
        with self._lock:
            session = self._sessions[client_id]
            if session.transport is not None and not session.connected:
                if not resumed:
                    session.filters.clear()
                    session.queue.clear()
                self._connect(session, session.transport, resumed=resumed)

    def restart(self, *, keep_state: bool = True) -> None:
        """Break every link and bring it back, as a restarted broker does; its clients' wills are not published.

        Args:
            keep_state: False loses sessions and retained messages, as a broker without persistence does.
        """
        with self._lock:
            connected = [s for s in self._sessions.values() if s.connected]
            for session in connected:
                self._drop(session, Disconnected("the broker restarts"))
            if not keep_state:
                self._retained.clear()
                for session in self._sessions.values():
                    session.filters.clear()
                    session.queue.clear()
            for session in connected:
                assert session.transport is not None, "only a transport connects"
                self._connect(session, session.transport, resumed=keep_state)

    def queued(self, client_id: str | None = None) -> int:
        """Number of deliveries and link events that connected clients have not received: 0 means all is quiet.

        Args:
            client_id: Count only this client's; None counts everybody's.
        """
        with self._lock:
            sessions = [s for s in self._sessions.values() if s.connected and client_id in (None, s.client_id)]
            return sum(len(s.events) + len(s.queue) for s in sessions)

    def waiting(self) -> list[str]:
        """Return the connected clients that `receive` has something for, so that only they need to be asked."""
        with self._lock:
            return [s.client_id for s in self._sessions.values() if s.connected and (s.events or s.queue)]

    def retained(self) -> dict[str, bytes]:
        """Return a copy of what is retained, by topic."""
        with self._lock:
            return dict(self._retained)

    # --- called by transports ---

    def _attach(self, transport: MemoryTransport) -> None:
        with self._lock:
            session = self._sessions.get(transport.client_id)
            resumed = session is not None
            if session is None:
                session = _Session(transport.client_id, threading.Condition(self._lock))
                self._sessions[transport.client_id] = session
            if session.transport is not None:
                taken_over = session.transport
                taken_over._events_of_its_own.append(Disconnected("another client took this id", fatal=True))
                taken_over._session = None
                if session.connected:
                    self._drop(session, None)
                    self._publish_will(session)
            session.events.clear()
            self._connect(session, transport, resumed=resumed)

    def _connect(self, session: _Session, transport: MemoryTransport, *, resumed: bool) -> None:
        missing = [topic_filter for topic_filter in transport._filters if topic_filter not in session.filters]
        session.transport, session.will, session.connected = transport, transport._will, True
        transport._session = session
        session.events.append(Connected(resumed))
        for topic_filter in missing:
            self._subscribe(session, topic_filter)
        while (message := transport._outbox.take()) is not None:
            self._publish(session.client_id, message)
            transport._outbox.finish(message)
        session.arrival.notify_all()

    def _drop(self, session: _Session, event: Disconnected | None) -> None:
        """End the connection: what was not acknowledged is delivered again, QoS 0 is gone."""
        if session.unacknowledged is not None:
            session.queue.appendleft(session.unacknowledged)
            session.unacknowledged = None
        session.queue = deque(queued for queued in session.queue if queued.qos > 0)
        session.connected = False
        if event is not None:
            session.events.append(event)
        session.arrival.notify_all()

    def _publish_will(self, session: _Session) -> None:
        if session.will is not None:
            self._publish(session.client_id, Outgoing(session.will.topic, session.will.payload, True, 1))

    def _publish(self, client_id: str, message: Outgoing) -> None:
        if not self._may_use(client_id, "write", message.topic):
            self.denied[client_id] += 1
            return
        if message.retain and message.payload:
            self._retained[message.topic] = message.payload
        elif message.retain:
            self._retained.pop(message.topic, None)
        delivery = Delivery(message.topic, message.payload, retained=False)
        for session in self._sessions.values():
            if (message.qos > 0 or session.connected) and _subscribed(session.filters, message.topic):
                self._enqueue(session, _Queued(delivery, message.qos))

    def _subscribe(self, session: _Session, topic_filter: str) -> None:
        session.filters[topic_filter] = None
        for topic, payload in self._retained.items():
            if matches(topic_filter, topic):
                self._enqueue(session, _Queued(Delivery(topic, payload, retained=True), 1))

    def _enqueue(self, session: _Session, queued: _Queued) -> None:
        if not self._may_use(session.client_id, "read", queued.delivery.topic):
            self.denied[session.client_id] += 1
            return
        session.queue.append(queued)
        session.arrival.notify_all()

    def _next(self, session: _Session) -> Event | None:
        """Return the next event for a client that has acknowledged everything, as the faults will have it."""
        if session.events:
            return session.events.popleft()
        if not session.connected or not session.queue:
            return None
        if self._happens(self.faults.reorder):
            session.queue.rotate(-self._rng.randrange(len(session.queue)))
        queued = session.queue.popleft()
        if self._happens(self.faults.loss):
            if queued.qos > 0:
                session.queue.append(queued)
            return None
        if queued.qos > 0:
            session.unacknowledged = queued
            if self._happens(self.faults.duplicate):
                session.queue.append(queued)
        return queued.delivery

    def _next_that_comes(self, session: _Session) -> Event | None:
        """Return the next event, drawing again after a loss as long as anything is queued."""
        while session.events or (session.connected and session.queue):
            event = self._next(session)
            if event is not None:
                return event
        return None

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._rng.random() < probability


class MemoryTransport:
    """One client of a `MemoryBroker`; see `sottovoce.transport.base.Transport` for what the methods promise.

    Attributes:
        client_id: Under which the broker keeps the session, and which the topic rights are about.
    """

    def __init__(self, broker: MemoryBroker, client_id: str, *, will: Will | None = None) -> None:
        """Connect `client_id`; a client that had the id before is thrown out for good."""
        self.client_id = client_id
        self._broker = broker
        self._will = will
        self._outbox = Outbox(max_messages=10_000, max_bytes=64 * 1024 * 1024)
        self._filters: dict[str, None] = {}
        self._events_of_its_own: deque[Event] = deque()
        self._session: _Session | None = None
        self._closed = False
        broker._attach(self)

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that one publish may carry."""
        return self._broker.max_payload_bytes

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Hand `payload` to the broker, or queue it while the link is down.

        Raises:
            TransportError: Larger than `max_payload_bytes`, the outgoing queue is full, or the transport is closed.
            LocalProtocolError: Not a topic.
        """
        check_topic(topic)
        if len(payload) > self.max_payload_bytes:
            raise TransportError(f"a payload of {len(payload)} bytes is larger than {self.max_payload_bytes}")
        message = Outgoing(topic, bytes(payload), retain, qos)
        with self._broker._lock:
            if self._session is None:
                raise TransportError("the link is closed")
            if self._session.connected:
                self._broker._publish(self.client_id, message)
            elif qos > 0:
                self._outbox.put(message)

    def subscribe(self, topic_filter: str) -> None:
        """Receive what matches `topic_filter` from now on, also after a reconnect.

        Raises:
            LocalProtocolError: Not a topic filter.
        """
        check_filter(topic_filter)
        with self._broker._lock:
            self._filters[topic_filter] = None
            if self._session is not None and self._session.connected:
                self._broker._subscribe(self._session, topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        """Stop receiving what matches `topic_filter`.

        Raises:
            LocalProtocolError: Not a topic filter.
        """
        check_filter(topic_filter)
        with self._broker._lock:
            self._filters.pop(topic_filter, None)
            if self._session is not None:
                self._session.filters.pop(topic_filter, None)

    def receive(self, timeout_s: float) -> Event | None:
        """Acknowledge the previous delivery and return the next event, or None after `timeout_s` seconds."""
        with self._broker._lock:
            if self._session is not None:
                self._session.unacknowledged = None
            if timeout_s <= 0 or self._session is None:
                return self._poll(self._broker._next)
            found: list[Event] = []

            def something_came() -> bool:
                event = self._poll(self._broker._next_that_comes)
                found.extend([event] if event is not None else [])
                return bool(found)

            self._session.arrival.wait_for(something_came, timeout_s)
            return found[0] if found else None

    def _poll(self, draw: Callable[[_Session], Event | None]) -> Event | None:
        if self._session is not None:
            return draw(self._session)
        return self._events_of_its_own.popleft() if self._events_of_its_own else None

    def pending(self) -> int:
        """Number of publishes that the broker has not taken yet."""
        return self._outbox.pending()

    def close(self) -> None:
        """Disconnect in an orderly way (no last will is published); may be called twice. The session stays."""
        with self._broker._lock:
            session, self._session = self._session, None
            if session is not None:
                self._broker._drop(session, None)
                session.transport, session.will = None, None
