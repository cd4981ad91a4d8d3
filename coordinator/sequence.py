"""From one round to the next: which task is due, how a round is opened, and what its end leads to.

The order of things makes a crash at any point harmless: a round is in the journal before it is announced, blobs are
retained before what names them, and a new state is in the journal before its outcome is published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.announcer import Announcer
from coordinator.assignment import Assignment, first_state, load_program, next_assignment, terms_of
from coordinator.events import LOG, EventLog
from coordinator.fleet import Fleet
from coordinator.journal import Journal
from coordinator.journal_rows import Ending, Opening, RoundRow, TaskRow, TaskStatus, Traffic
from coordinator.phases import Abandoned, Agenda, Committed
from coordinator.presence import Presence
from coordinator.program import FederatedProgram, apply
from coordinator.record import RoundRecord
from coordinator.round import Round
from coordinator.settings import UploadSettings
from sottovoce.errors import BadBlob, ConfigError, ProgramError, RoundAbandoned
from sottovoce.identity import Identity, TrustAnchor
from sottovoce.plan import blob_ref, digest_of
from sottovoce.tensors import encode_tensors
from sottovoce.wire.messages import Outcome

_LOOK_AGAIN_MS = 1000
"""How often the queue of tasks is looked at while there is nothing to do."""


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


class RoundSequence:
    """Opens one round after the other and closes each with what it brought.

    Args:
        setup: What the coordinator is made of.
        journal: Its durable record.
        announcer: Publishes what is retained.
        fleet: The roster.
        events: Where events are written.

    Attributes:
        current: The round in flight, or None.
    """

    def __init__(self, setup: Setup, *, journal: Journal, announcer: Announcer, fleet: Fleet, events: EventLog) -> None:
        self._setup = setup
        self._journal = journal
        self._announcer = announcer
        self._fleet = fleet
        self._events = events
        self._program: tuple[int, FederatedProgram] | None = None
        self._next: tuple[Assignment, int] | None = None
        self._not_before_ms = 0
        self.current: RoundRecord | None = None

    @property
    def opening(self) -> bool:
        """True while the blobs of the next round are being handed over."""
        return self._next is not None

    @property
    def idle(self) -> bool:
        """True when no round is in flight or due, and no task is queued."""
        return self.current is None and self._next is None and self._journal.next_task() is None

    def recover(self, now_ms: int) -> None:
        """Close what an earlier run left open, and publish the last outcome: it may not have been."""
        for row in self._journal.open_rounds():
            LOG.warning("round %d.%d abandoned: the coordinator was restarted", row.round, row.attempt)
            ending = Ending(row.cohort, (), {}, Traffic(), now_ms)
            self._journal.abandon_round(row.id, "coordinator_restarted", ending)
        self._conclude_last(now_ms)

    def advance(self, now_ms: int) -> None:
        """Open the next round when it is due: first its blobs, then its announcement."""
        handed_over = self._announcer.advance()
        if self.current is None and self._next is None and now_ms >= self._not_before_ms:
            self._prepare(now_ms)
        elif self._next is not None and handed_over and self._announcer.acknowledged:
            # A round that is announced to a broker that is away would only run out of time.
            self._announce(*self._next, now_ms)

    def cancelled(self) -> bool:
        """Say whether somebody has cancelled the task of the round in flight."""
        if self.current is None:
            return False
        task = self._journal.task(self.current.assignment.task.id)
        return task is None or task.status == "cancelled"

    def stop(self) -> None:
        """Open no further round."""
        self._next = None

    def _prepare(self, now_ms: int) -> None:
        """Choose the next round and have its blobs published."""
        task = self._journal.next_task()
        self._not_before_ms = now_ms + _LOOK_AGAIN_MS
        if task is None:
            return
        try:
            assignment = self._assignment(task)
            if assignment is None:
                self._end_task(task, "done", now_ms)
                return
            self._next = assignment, self._announcer.offer(assignment)
        except (ConfigError, ProgramError, BadBlob) as error:
            LOG.error("task %s failed: %s", task.name, error)
            self._end_task(task, "failed", now_ms, reason=str(error))

    def _assignment(self, task: TaskRow) -> Assignment | None:
        chunk_bytes = self._setup.chunk_bytes
        if self._program is None or self._program[0] != task.id:
            program = load_program(
                self._journal, task, fleet=self._setup.identity.certificate.fleet, chunk_bytes=chunk_bytes
            )
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
            fleet=self._setup.identity.certificate.fleet,
            coordinator=self._setup.identity.certificate.name,
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
        self.current = RoundRecord(assignment, row, machine, now_ms, downloads, self._events)
        self._announcer.announce(envelope)
        self.current.tell("announced", now_ms, state=state.digest.hex())

    def commit(self, current: RoundRecord, committed: Committed, now_ms: int) -> None:
        """Make the next state of the sum, write both down at once, then tell everybody."""
        assignment = current.assignment
        try:
            advance = apply(assignment.program, assignment.position, assignment.state, committed.aggregate)
        except RoundAbandoned as reason:
            ended = Abandoned(reason.reason, reason.detail, committed.cohort, committed.dropped)
            self.abandon(current, ended, now_ms)
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

    def abandon(self, current: RoundRecord, abandoned: Abandoned, now_ms: int) -> None:
        """Write down that the round brought nothing, and why, then tell everybody."""
        ending = current.ending(abandoned, now_ms)
        self._journal.abandon_round(current.row, abandoned.reason, ending)
        current.tell("abandoned", now_ms, **current.summary(ending), reason=abandoned.reason, detail=abandoned.detail)
        self._close(current, now_ms, delay_ms=round(1000 * current.assignment.program.task.time.retry_delay_s))

    def _close(self, current: RoundRecord, now_ms: int, *, delay_ms: int) -> None:
        """Publish the outcome of a round that the journal has, and make room for the next one."""
        self.current = None
        self._not_before_ms = now_ms + delay_ms
        self._conclude_last(now_ms)
        self._announcer.advance()

    def _conclude_last(self, now_ms: int) -> None:
        for row in self._journal.rounds(limit=1):
            self._conclude(row, now_ms)

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
