"""The coordinator's shell: one loop that carries deliveries into the round and the round's effects to the broker.

A message, however wrong, never ends the loop: it is counted by its reason and dropped. A bug that a message brings to
light costs the round, not the coordinator.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from coordinator.admission import Admission, DeviceChunk, StatusHint
from coordinator.announcer import Announcer
from coordinator.events import LOG, EventLog, Refusals
from coordinator.fleet import Fleet
from coordinator.journal import Journal
from coordinator.phases import (
    NO_SESSION,
    Abandoned,
    CohortSelected,
    Committed,
    DevicesDropped,
    DeviceWithdrew,
    Effect,
    RendezvousOpened,
    Send,
    StageOpened,
)
from coordinator.record import RoundRecord
from coordinator.sequence import LOOK_AGAIN_MS, RoundSequence, Setup
from sottovoce.errors import (
    ConfigError,
    CryptoError,
    RemoteProtocolError,
    TransportError,
)
from sottovoce.identity import SignedContext, latest_time
from sottovoce.transport.base import Connected, Delivery, Disconnected, Transport
from sottovoce.wire.chunks import fragments
from sottovoce.wire.codec import Opened, seal
from sottovoce.wire.messages import Message, RoundOver
from sottovoce.wire.topics import Topics

_WRITE_DOWN_MS = 1000
"""How often counts of refused messages are written down."""
_BUSY_MS = 20
"""How soon to look again while blobs wait for room on the link."""


class Service:
    """A running coordinator. One thread owns it; what others do wrong never raises out of it.

    Args:
        setup: What it is made of.
        journal: Its durable record.
        transport: Its link to the broker.
        events: Where events are written.
    """

    def __init__(self, setup: Setup, *, journal: Journal, transport: Transport, events: EventLog) -> None:
        self._setup = setup
        self._journal = journal
        self._transport = transport
        self._name = setup.identity.certificate.name
        self._topics = Topics(setup.identity.certificate.fleet)
        self._fleet = Fleet(setup.anchor)
        self._admission = Admission(self._topics, coordinator=self._name, fleet=self._fleet)
        self._announcer = Announcer(transport, self._topics, setup.identity)
        self._sequence = RoundSequence(
            setup, journal=journal, announcer=self._announcer, fleet=self._fleet, events=events
        )
        self._refusals = Refusals()
        self._looked_ms = -LOOK_AGAIN_MS
        self._written_ms = -_WRITE_DOWN_MS
        self._kept: dict[str, bytes] = {}
        self._told: dict[str, tuple[int, int]] = {}
        self._was_connected = False

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, now_ms: int) -> None:
        """Subscribe, remember the fleet, and close what an earlier run left open."""
        self._fleet.restore(self._journal.certificates(), at=latest_time(now_ms / 1000))
        for topic_filter in (*self._topics.up_filters(), self._topics.status_filter()):
            self._transport.subscribe(topic_filter)
        self._sequence.recover(now_ms)

    def step(self, now_ms: int, timeout_s: float) -> None:
        """Wait for one event of the transport, at most `timeout_s` seconds, and do what follows from it and the time.

        Raises:
            TransportError: The link is lost for good.
            sqlite3.Error: The journal cannot be written: a coordinator that cannot remember must not go on.
        """
        event = self._transport.receive(timeout_s)
        if event is not None:
            self._handle(event, now_ms)
        self.tick(now_ms)

    def tick(self, now_ms: int) -> None:
        """Do what the time asks for. Raises like `step`."""
        self._poll(now_ms)
        self._feed(lambda current: current.round.tick(now_ms), now_ms, nobody_to_blame=True)
        self._sequence.advance(now_ms)

    def wait_s(self, now_ms: int) -> float:
        """Return for how many seconds `step` may wait: until something is due."""
        if self._sequence.opening or not self._announcer.advance():
            return _BUSY_MS / 1000
        deadline = self._sequence.current.round.next_deadline_ms(now_ms) if self._sequence.current else None
        look_ms = self._looked_ms + LOOK_AGAIN_MS
        due_ms = look_ms if deadline is None else min(deadline, look_ms)
        return max(0, due_ms - now_ms) / 1000

    @property
    def flushed(self) -> bool:
        """True when everything said has reached the broker."""
        return self._announcer.advance() and self._transport.pending() == 0

    @property
    def idle(self) -> bool:
        """True when there is nothing to do and nothing left to say."""
        return self._sequence.idle and self.flushed

    def stop(self, now_ms: int, reason: str = "coordinator_stopped") -> None:
        """Abandon the round in flight, if there is one, and write down what is not written yet."""
        self._feed(lambda current: current.round.abandon(reason), now_ms)
        self._sequence.stop()
        self._journal.count_refusals(self._refusals.take())
        self._announcer.advance()

    def _poll(self, now_ms: int) -> None:
        """Look whether the round in flight is still wanted and who is revoked; now and then write down the refusals."""
        if now_ms - self._looked_ms < LOOK_AGAIN_MS:
            return
        self._looked_ms = now_ms
        self._look_for_revoked(now_ms)
        if now_ms - self._written_ms >= _WRITE_DOWN_MS and (counts := self._refusals.take()):
            self._journal.count_refusals(counts)
            self._written_ms = now_ms
        if (overtaken := self._sequence.overtaken(now_ms)) is not None:
            self._feed(lambda current: current.round.abandon(*overtaken), now_ms)

    def _look_for_revoked(self, now_ms: int) -> None:
        """Read the CA's list again if it has changed; one that is damaged leaves the one before in force."""
        if self._setup.revoked is None:
            return
        try:
            serials = self._setup.revoked.changed()
        except ConfigError as error:
            LOG.warning("%s; the list that was read before stays in force", error)
            return
        if serials is not None:
            out = self._fleet.revoke(serials, at=latest_time(now_ms / 1000))
            LOG.info(
                "read the new list of revoked certificates (%d); out by it: %s", len(serials), ", ".join(out) or "none"
            )

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _handle(self, event: Delivery | Connected | Disconnected, now_ms: int) -> None:
        match event:
            case Delivery():
                self._take(event, now_ms)
            case Connected(resumed=resumed):
                LOG.info("connected to the broker")
                if self._was_connected and not resumed:
                    self._announcer.restore()
                self._was_connected = True
            case Disconnected(reason=reason, fatal=fatal):
                LOG.warning("not connected to the broker: %s", reason)
                if fatal:
                    raise TransportError(f"the link to the broker is lost for good: {reason}")

    def _take(self, delivery: Delivery, now_ms: int) -> None:
        try:
            self._deliver(delivery, now_ms)
        except (RemoteProtocolError, CryptoError) as error:
            self._refusals.count(error.reason, str(error), now_ms=now_ms)
        except (sqlite3.Error, TransportError):
            raise
        except Exception:  # noqa: BLE001 -- the shell: no message may end the loop
            if self._refusals.count("internal_error", "a bug, see below", now_ms=now_ms):
                LOG.exception("a message on %s could not be handled", delivery.topic[:200])

    def _deliver(self, delivery: Delivery, now_ms: int) -> None:
        if self._topics.split(delivery.topic)[:2] == ("all", "blob"):
            self._announcer.adopt(delivery.topic, delivery.payload, retained=delivery.retained)
            return
        incoming = self._admission.open(delivery.topic, delivery.payload, at=latest_time(now_ms / 1000))
        match incoming:
            case StatusHint(device=device, online=online):
                if self._fleet.note_status(device, online=online):
                    self._feed(lambda current: current.round.device_status(device, online, now_ms), now_ms)
            case DeviceChunk(device=device, chunk=chunk):
                self._count_up(device, delivery)
                self._feed(lambda current: current.round.receive_chunk(device, chunk, now_ms), now_ms)
            case Opened():
                self._count_up(incoming.certificate.name, delivery)
                self._message(incoming, now_ms)
            case None:
                pass

    def _message(self, opened: Opened[Any], now_ms: int) -> None:
        device, number = opened.certificate.name, (opened.context.round, opened.context.attempt)
        if self._kept.get(device) != opened.certificate.fingerprint:
            self._journal.keep_certificate(device, opened.certificate.der, now_ms=now_ms)
            self._kept[device] = opened.certificate.fingerprint
        if self._sequence.current is not None and number == self._sequence.current.number:
            self._feed(lambda current: current.round.receive(opened, now_ms), now_ms)
            return
        self._refusals.count("replayed", f"{device} speaks of round {number}", now_ms=now_ms)
        if number < self._journal.next_number() and self._told.get(device) != number:
            self._told[device] = number
            self._say(device, RoundOver(reason="over"), number)

    def _count_up(self, device: str, delivery: Delivery) -> None:
        if self._sequence.current is not None and self._fleet.knows(device):
            self._sequence.current.up[device] += len(delivery.payload)

    # --- what goes out ------------------------------------------------------------------------------------------------

    def _feed(self, ask: Callable[[RoundRecord], list[Effect]], now_ms: int, *, nobody_to_blame: bool = False) -> None:
        """Let the round in flight take something in, and perform what it asks for.

        Args:
            ask: What the round takes in.
            now_ms: The coordinator's time.
            nobody_to_blame: No message has come; an error of the protocol is then a bug as any other.
        """
        current = self._sequence.current
        if current is None:
            return
        try:
            self._perform_all(current, ask(current), now_ms)
        except (TransportError, sqlite3.Error):
            raise
        except Exception as error:
            if isinstance(error, RemoteProtocolError | CryptoError) and not nobody_to_blame:
                raise
            LOG.exception("round %d.%d cannot go on: a bug", *current.number)
            self._perform_all(current, current.round.abandon("internal_error"), now_ms)

    def _perform_all(self, current: RoundRecord, effects: list[Effect], now_ms: int) -> None:
        for effect in effects:
            self._perform(current, effect, now_ms)

    def _perform(self, current: RoundRecord, effect: Effect, now_ms: int) -> None:
        match effect:
            case Send(device=device, message=message, session=session):
                current.down[device] += self._say(device, message, current.number, session)
            case CohortSelected(cohort=cohort):
                self._journal.set_phase(current.row, "configuration", sorted(cohort))
                current.tell("selected", now_ms, cohort=sorted(cohort))
            case RendezvousOpened(ready=ready):
                self._journal.set_phase(current.row, "reporting", sorted(current.round.cohort))
                current.tell("rendezvous", now_ms, ready=sorted(ready))
            case StageOpened(stage=stage, expected=expected):
                current.tell("stage", now_ms, stage=stage, expected=sorted(expected))
            case DevicesDropped(stage=stage, devices=devices):
                current.tell("dropped", now_ms, stage=stage, devices=devices)
            case DeviceWithdrew(device=device, code=code):
                current.tell("withdrew", now_ms, device=device, code=code)
            case Committed():
                self._sequence.commit(current, effect, now_ms)
            case Abandoned():
                self._sequence.abandon(current, effect, now_ms)

    def _say(self, device: str, message: Message, number: tuple[int, int], session: bytes = NO_SESSION) -> int:
        """Sign and send `message`; return its bytes. Where the queue is full the device will ask again."""
        context = SignedContext(self._name, device, self._topics.fleet, *number, session)
        envelope = seal(message, self._setup.identity, context)
        parts = fragments(envelope, chunk_bytes=self._transport.max_payload_bytes)
        try:
            for part in parts:
                self._transport.publish(self._topics.down(device), part)
        except TransportError as error:
            LOG.warning("%s for %s was not sent: %s", type(message).__name__, device, error)
        return sum(map(len, parts))
