"""The coordinator's shell: one loop that carries deliveries into the round and the round's effects to the broker.

The order of things makes a crash at any point harmless: a round is in the journal before it is announced, blobs are
retained before what names them, and a new state is in the journal before its outcome is published. A message, however
wrong, never ends the loop: it is counted by its reason and dropped.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.admission import Admission, DeviceChunk, StatusHint
from coordinator.announcer import Announcer
from coordinator.assignment import Assignment, first_state, load_program, next_assignment, terms_of
from coordinator.events import LOG, EventLog, Refusals
from coordinator.fleet import Fleet
from coordinator.journal import Ending, Journal, Opening, RoundRow, TaskRow, TaskStatus, Traffic
from coordinator.phases import (
    NO_SESSION,
    Abandoned,
    Agenda,
    CohortSelected,
    Committed,
    DevicesDropped,
    DeviceWithdrew,
    Effect,
    RendezvousOpened,
    Send,
    StageOpened,
)
from coordinator.presence import Presence
from coordinator.program import FederatedProgram, apply
from coordinator.record import RoundRecord
from coordinator.round import Round
from coordinator.settings import UploadSettings
from sottovoce.errors import (
    BadBlob,
    ConfigError,
    CryptoError,
    ProgramError,
    RemoteProtocolError,
    RoundAbandoned,
    TransportError,
)
from sottovoce.identity import Identity, SignedContext, TrustAnchor, latest_time
from sottovoce.plan import blob_ref, digest_of
from sottovoce.tensors import encode_tensors
from sottovoce.transport.base import Connected, Delivery, Disconnected, Transport
from sottovoce.wire.chunks import fragments
from sottovoce.wire.codec import Opened, seal
from sottovoce.wire.messages import CheckIn, Message, Outcome, RoundOver
from sottovoce.wire.topics import Topics

_POLL_MS = 1000
"""How often the queue of tasks is looked at."""
_BUSY_MS = 20
"""How soon to look again while blobs wait for room on the link."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a coordinator is made of.

    Attributes:
        identity: Its key and certificate.
        anchor: The fleet CA's certificate, never its key.
        chunk_bytes: Largest piece of a blob.
        uploads: Slots for masked vectors.
        entropy: Returns that many random bytes.
    """

    identity: Identity
    anchor: TrustAnchor
    chunk_bytes: int
    uploads: UploadSettings
    entropy: Callable[[int], bytes]


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
        self._events = events
        self._name = setup.identity.certificate.name
        self._topics = Topics(setup.identity.certificate.fleet)
        self._fleet = Fleet(setup.anchor)
        self._admission = Admission(self._topics, coordinator=self._name, fleet=self._fleet)
        self._announcer = Announcer(transport, self._topics, setup.identity)
        self._refusals = Refusals()
        self._program: tuple[int, FederatedProgram] | None = None
        self._next: tuple[Assignment, int] | None = None
        self._current: RoundRecord | None = None
        self._not_before_ms = 0
        self._polled_ms = -_POLL_MS
        self._told: dict[str, tuple[int, int]] = {}
        self._was_connected = False

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, now_ms: int) -> None:
        """Subscribe, remember the fleet, and close what an earlier run left open."""
        self._fleet.restore(self._journal.certificates(), at=latest_time(now_ms / 1000))
        for topic_filter in (*self._topics.up_filters(), self._topics.status_filter()):
            self._transport.subscribe(topic_filter)
        for row in self._journal.open_rounds():
            LOG.warning("round %d.%d abandoned: the coordinator was restarted", row.round, row.attempt)
            ending = Ending(row.cohort, (), {}, Traffic(), now_ms)
            self._journal.abandon_round(row.id, "coordinator_restarted", ending)
        for row in self._journal.rounds(limit=1):
            self._conclude(row, now_ms)

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
        self._feed(lambda current: current.round.tick(now_ms), now_ms)
        handed_over = self._announcer.advance()
        if self._current is None and self._next is None and now_ms >= self._not_before_ms:
            self._prepare(now_ms)
        elif self._next is not None and handed_over:
            self._announce(*self._next, now_ms)

    def wait_s(self, now_ms: int) -> float:
        """Return for how many seconds `step` may wait: until something is due."""
        if self._next is not None or not self._announcer.advance():
            return _BUSY_MS / 1000
        deadline = self._current.round.next_deadline_ms(now_ms) if self._current else None
        due_ms = self._polled_ms + _POLL_MS if deadline is None else min(deadline, self._polled_ms + _POLL_MS)
        return max(0, due_ms - now_ms) / 1000

    @property
    def flushed(self) -> bool:
        """True when everything said has reached the broker."""
        return self._announcer.advance() and self._transport.pending() == 0

    @property
    def idle(self) -> bool:
        """True when there is nothing to do and nothing left to say."""
        return self._current is None and self._next is None and self._journal.next_task() is None and self.flushed

    def stop(self, now_ms: int, reason: str = "coordinator_stopped") -> None:
        """Abandon the round in flight, if there is one, and write down what is not written yet."""
        self._feed(lambda current: current.round.abandon(reason), now_ms)
        self._next = None
        self._journal.count_refusals(self._refusals.take())
        self._announcer.advance()

    def _poll(self, now_ms: int) -> None:
        """Once a second: write down the refusals, and look whether the task has been cancelled."""
        if now_ms - self._polled_ms < _POLL_MS:
            return
        self._polled_ms = now_ms
        if counts := self._refusals.take():
            self._journal.count_refusals(counts)
        if self._current is not None:
            task = self._journal.task(self._current.assignment.task.id)
            if task is None or task.status == "cancelled":
                self._feed(lambda current: current.round.abandon("cancelled"), now_ms)

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
            LOG.exception("a message on %s could not be handled: a bug", delivery.topic[:200])
            self._refusals.count("internal_error", "see above", now_ms=now_ms)

    def _deliver(self, delivery: Delivery, now_ms: int) -> None:
        if self._topics.split(delivery.topic)[:2] == ("all", "blob"):
            self._announcer.adopt(delivery.topic, delivery.payload)
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
        if isinstance(opened.message, CheckIn):
            self._journal.keep_certificate(device, opened.certificate.der, now_ms=now_ms)
        if self._current is not None and number == self._current.number:
            self._feed(lambda current: current.round.receive(opened, now_ms), now_ms)
            return
        self._refusals.count("replayed", f"{device} speaks of round {number}", now_ms=now_ms)
        if number < self._journal.next_number() and self._told.get(device) != number:
            self._told[device] = number
            self._say(device, RoundOver(reason="over"), number)

    def _count_up(self, device: str, delivery: Delivery) -> None:
        if self._current is not None and self._fleet.knows(device):
            self._current.up[device] += len(delivery.payload)

    # --- what goes out ------------------------------------------------------------------------------------------------

    def _feed(self, ask: Callable[[RoundRecord], list[Effect]], now_ms: int) -> None:
        """Let the round in flight take something in, and perform what it asks for."""
        current = self._current
        if current is None:
            return
        try:
            effects = ask(current)
        except (RemoteProtocolError, CryptoError):
            raise
        except Exception:  # noqa: BLE001 -- the shell: a bug costs the round, not the coordinator
            LOG.exception("round %d.%d cannot go on: a bug", *current.number)
            effects = current.round.abandon("internal_error")
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
                self._commit(current, effect, now_ms)
            case Abandoned():
                self._abandon(current, effect, now_ms)

    def _say(self, device: str, message: Message, number: tuple[int, int], session: bytes = NO_SESSION) -> int:
        """Sign and send `message`; return its bytes. Where the queue is full the device will ask again."""
        context = SignedContext(self._name, device, self._topics.fleet, *number, session)
        envelope = seal(message, self._setup.identity, context)
        parts = fragments(envelope, chunk_bytes=min(self._setup.chunk_bytes, self._transport.max_payload_bytes))
        try:
            for part in parts:
                self._transport.publish(self._topics.down(device), part)
        except TransportError as error:
            LOG.warning("%s for %s was not sent: %s", type(message).__name__, device, error)
        return sum(map(len, parts))

    # --- from one round to the next -----------------------------------------------------------------------------------

    def _prepare(self, now_ms: int) -> None:
        """Choose the next round and have its blobs published."""
        task = self._journal.next_task()
        self._not_before_ms = now_ms + _POLL_MS
        if task is None:
            return
        try:
            assignment = self._assignment(task)
            if assignment is None:
                self._end_task(task, "done", now_ms)
                return
            self._announcer.stop_seeking()
            self._next = assignment, self._announcer.offer(assignment)
        except (ConfigError, ProgramError, BadBlob) as error:
            LOG.error("task %s failed: %s", task.name, error)
            self._end_task(task, "failed", now_ms, reason=str(error))

    def _assignment(self, task: TaskRow) -> Assignment | None:
        chunk_bytes = self._setup.chunk_bytes
        if self._program is None or self._program[0] != task.id:
            program = load_program(self._journal, task, fleet=self._topics.fleet, chunk_bytes=chunk_bytes)
            self._program = task.id, program
        if task.status == "queued":
            self._journal.begin_task(task.id, first_state(self._program[1]))
        return next_assignment(self._journal, task, self._program[1], chunk_bytes=chunk_bytes)

    def _end_task(self, task: TaskRow, status: TaskStatus, now_ms: int, *, reason: str = "") -> None:
        self._journal.end_task(task.id, status, reason)
        self._program = None
        self._not_before_ms = now_ms
        self._events.write(
            "task_finished", time_ms=now_ms, task=task.name, plan=task.name, round=task.position, attempt=0,
            status=status, reason=reason,
        )  # fmt: skip
        LOG.info("task %s: %s", task.name, status)

    def _announce(self, assignment: Assignment, new_blob_bytes: int, now_ms: int) -> None:
        self._next = None
        number, attempt = self._journal.next_number()
        terms = terms_of(assignment.program, self._setup.uploads, now_ms=now_ms)
        previous = self._journal.last_announcement()
        envelope = self._announcer.announcement(
            assignment, terms, number=number, attempt=attempt, previous=previous, now_ms=now_ms
        )
        (_, plan), _, (state, state_content) = assignment.blobs
        opening = Opening(
            task=assignment.task.id,
            position=assignment.position,
            round=number,
            attempt=attempt,
            plan_name=assignment.plan.name,
            plan=plan,
            state=state_content,
            started_ms=now_ms,
        )
        digest = digest_of(envelope)
        row = self._journal.open_round(opening, digest=digest, previous=previous, envelope=envelope)
        agenda = Agenda(
            fleet=self._topics.fleet,
            coordinator=self._name,
            round=number,
            attempt=attempt,
            announcement=digest,
            plan=assignment.plan,
            state=state.digest,
        )
        presence = Presence(
            online=self._fleet.online, offline=self._fleet.offline, now_ms=now_ms, grace_ms=terms.grace_ms
        )
        machine = Round(agenda, terms, presence=presence, entropy=self._setup.entropy, now_ms=now_ms)
        downloads = new_blob_bytes + len(envelope)
        self._current = RoundRecord(assignment, row, machine, now_ms, downloads, self._events)
        self._announcer.announce(envelope)
        self._current.tell("announced", now_ms, state=state.digest.hex())

    def _commit(self, current: RoundRecord, committed: Committed, now_ms: int) -> None:
        assignment = current.assignment
        try:
            advance = apply(assignment.program, assignment.position, assignment.state, committed.aggregate)
        except RoundAbandoned as reason:
            ended = Abandoned(reason.reason, reason.detail, committed.cohort, committed.dropped)
            self._abandon(current, ended, now_ms)
            return
        state = encode_tensors(advance.state)
        ending = current.ending(committed, now_ms)
        self._journal.commit_round(
            current.row,
            ending,
            metrics=advance.metrics,
            state=state,
            released=encode_tensors(advance.released) if advance.released else None,
        )
        current.tell(
            "committed",
            now_ms,
            **current.summary(ending),
            survivors=ending.survivors,
            metrics=advance.metrics,
            weight=committed.aggregate.weight,
            state=digest_of(state).hex(),
        )
        self._close(current, now_ms, delay_ms=0)

    def _abandon(self, current: RoundRecord, abandoned: Abandoned, now_ms: int) -> None:
        ending = current.ending(abandoned, now_ms)
        self._journal.abandon_round(current.row, abandoned.reason, ending)
        current.tell("abandoned", now_ms, **current.summary(ending), reason=abandoned.reason, detail=abandoned.detail)
        self._close(current, now_ms, delay_ms=round(1000 * current.assignment.program.task.time.retry_delay_s))

    def _close(self, current: RoundRecord, now_ms: int, *, delay_ms: int) -> None:
        """Publish the outcome of a round that the journal has, and make room for the next one."""
        self._current = None
        self._not_before_ms = now_ms + delay_ms
        for row in self._journal.rounds(limit=1):
            self._conclude(row, now_ms)
        self._announcer.advance()

    def _conclude(self, row: RoundRow, now_ms: int) -> None:
        committed = row.phase == "committed"
        kept = self._journal.state_at(row.task_id, row.position + committed)
        announcement = self._journal.announcement_of(row.round, row.attempt)
        if kept is None:
            return
        state = blob_ref(kept[0], chunk_bytes=self._setup.chunk_bytes)
        self._announcer.offer_state(state, kept[0])
        outcome = Outcome(
            certificate=self._setup.identity.certificate.der,
            announcement=announcement,
            committed=committed,
            reason=row.reason,
            survivors=tuple(row.survivors),
            state=state,
            now_ms=now_ms,
        )
        self._announcer.conclude(outcome, number=row.round, attempt=row.attempt)
