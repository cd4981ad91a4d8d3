"""From one round to the next: which task is due, how a round is opened, and what its end leads to.

The order of things makes a crash at any point harmless: a round is in the journal before it is announced, blobs are
retained before what names them, and a new state is in the journal before its outcome is published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.announcer import Announcer
from coordinator.assignment import Assignment, LoadedTask, begin, load_task, next_assignment
from coordinator.events import LOG, EventLog
from coordinator.fleet import Fleet
from coordinator.journal import Journal
from coordinator.journal_rows import Ending, Opening, RoundRow, TaskRow, TaskStatus, Traffic
from coordinator.phases import Abandoned, Agenda, Committed
from coordinator.presence import Presence
from coordinator.record import RoundRecord
from coordinator.requests import sums_of
from coordinator.revocation import RevocationList
from coordinator.round import Round
from coordinator.settings import UploadSettings
from coordinator.terms import terms_at
from coordinator.threshold import thresholded
from sottovoce.blobs import blob_ref, digest_of
from sottovoce.errors import RoundAbandoned, SottovoceError
from sottovoce.identity import Identity, TrustAnchor
from sottovoce.secagg.mask_removal import AT_ONCE, Spread
from sottovoce.wire.messages import Outcome

LOOK_AGAIN_MS = 150
"""How often the queue is looked at while there is nothing to do: whoever asks is sitting in front of it."""
_DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Setup:
    """What a coordinator is made of.

    Attributes:
        identity: Its key and certificate.
        anchor: The fleet CA's certificate, never its key.
        chunk_bytes: Largest piece of a blob.
        uploads: Slots for masked vectors.
        entropy: Returns that many random bytes.
        spread: Over how many threads masks are taken off.
        revoked: The CA's list of revoked certificates, looked at again and again; None where there is none.
    """

    identity: Identity
    anchor: TrustAnchor
    chunk_bytes: int
    uploads: UploadSettings
    entropy: Callable[[int], bytes]
    spread: Spread = AT_ONCE
    revoked: RevocationList | None = None


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
        self._loaded: dict[int, LoadedTask] = {}
        self._next: tuple[Assignment, int] | None = None
        self._look_again_ms = 0
        self._retry_ms: dict[int, int] = {}
        self.current: RoundRecord | None = None

    @property
    def opening(self) -> bool:
        """True while the blobs of the next round are being handed over."""
        return self._next is not None

    @property
    def idle(self) -> bool:
        """True when no round is in flight or due, and no task is queued."""
        return self.current is None and self._next is None and not self._journal.due_tasks()

    def recover(self, now_ms: int) -> None:
        """Close what an earlier run left open, and publish the last outcome: it may not have been."""
        for row in self._journal.open_rounds():
            LOG.warning("round %d.%d abandoned: the coordinator was restarted", row.round, row.attempt)
            ending = Ending(row.cohort, (), {}, Traffic(), now_ms)
            self._journal.abandon_round(row.id, "coordinator_restarted", ending, detail="the coordinator was restarted")
        self._conclude_last(now_ms)

    def advance(self, now_ms: int) -> None:
        """Open the next round when it is due: first its blobs, then its announcement."""
        handed_over = self._announcer.advance()
        if self.current is None and self._next is None and now_ms >= self._look_again_ms:
            self._prepare(now_ms)
        elif self._next is not None and self._unwanted(self._next[0].task.id, now_ms):
            self._next = None
        elif self._next is not None and handed_over and self._announcer.acknowledged:
            # A round that is announced to a broker that is away would only run out of time.
            self._announce(*self._next, now_ms)

    def overtaken(self, now_ms: int) -> tuple[str, str] | None:
        """Return why the round in flight need not go on, as a code and in words: cancelled, or out of time."""
        if self.current is None or (code := self._unwanted(self.current.assignment.task.id, now_ms)) is None:
            return None
        phase = type(self.current.round.phase).__name__.lower()
        return code, f"it ended in the phase {phase}, with {len(self.current.round.cohort)} devices chosen"

    def _unwanted(self, number: int, now_ms: int) -> str | None:
        task, deadline_ms = self._journal.task(number), self._journal.deadline_of(number)
        if task is None or task.status == "cancelled":
            return "cancelled"
        return _DEADLINE if deadline_ms is not None and now_ms > deadline_ms else None

    def stop(self) -> None:
        """Open no further round."""
        self._next = None

    def _prepare(self, now_ms: int) -> None:
        """Choose the next round and have its blobs published."""
        self._look_again_ms = now_ms + LOOK_AGAIN_MS
        due = self._journal.due_tasks()
        self._loaded = {task.id: self._loaded[task.id] for task in due if task.id in self._loaded}
        for task in due:
            if self._unwanted(task.id, now_ms) == _DEADLINE:
                self._end_task(task, "failed", now_ms, reason=self._why_not(task))
            elif now_ms >= self._retry_ms.get(task.id, 0):
                self._take_up(task, now_ms)
                return

    def _why_not(self, task: TaskRow) -> str:
        """Return why a request has no answer: the last abandon reason that says more than that time ran out."""
        rows = self._journal.rounds_of(task.id)
        if not rows:
            return "no_round: the coordinator was busy with other rounds, or away from its broker, all the time"
        row = next((row for row in reversed(rows) if row.reason != _DEADLINE), rows[-1])
        return f"{row.reason}: {row.detail}"

    def _take_up(self, task: TaskRow, now_ms: int) -> None:
        try:
            assignment = self._assignment(task)
            if assignment is None:
                self._end_task(task, "done", now_ms)
                return
            self._next = assignment, self._announcer.offer(assignment)
        except SottovoceError as error:
            LOG.error("task %s failed: %s", task.name, error)
            self._end_task(task, "failed", now_ms, reason=str(error))

    def _assignment(self, task: TaskRow) -> Assignment | None:
        if task.id not in self._loaded:
            self._loaded[task.id] = load_task(self._journal, task)
        loaded = self._loaded[task.id]
        if task.status == "queued":
            begin(self._journal, task, loaded.program)
        fleet = self._setup.identity.certificate.fleet
        return next_assignment(self._journal, task, loaded, fleet=fleet, chunk_bytes=self._setup.chunk_bytes)

    def _end_task(self, task: TaskRow, status: TaskStatus, now_ms: int, *, reason: str = "") -> None:
        self._journal.end_task(task.id, status, reason)
        self._forget(task, status, now_ms, reason=reason)

    def _forget(self, task: TaskRow, status: TaskStatus, now_ms: int, *, reason: str = "") -> None:
        """Tell that a task, as the journal has it, is over."""
        self._loaded.pop(task.id, None)
        self._retry_ms.pop(task.id, None)
        self._look_again_ms = now_ms
        self._events.write(
            "task_finished", time_ms=now_ms, task=task.name, plan=task.name, round=task.position, attempt=0,
            status=status, reason=reason,
        )  # fmt: skip
        LOG.info("%s %s: %s", "request" if task.kind == "request" else "task", task.name, status)

    def _announce(self, assignment: Assignment, new_blob_bytes: int, now_ms: int) -> None:
        self._next = None
        number, attempt = self._journal.next_number()
        terms = terms_at(assignment.loaded.terms, self._setup.uploads, now_ms=now_ms)
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
        machine = Round(
            agenda,
            terms,
            presence=presence,
            entropy=self._setup.entropy,
            now_ms=now_ms,
            spread=self._setup.spread,
        )
        downloads = new_blob_bytes + len(envelope)
        self.current = RoundRecord(assignment, row, machine, now_ms, downloads, self._events)
        self._announcer.announce(envelope)
        self.current.tell("announced", now_ms, state=state.digest.hex())

    def commit(self, current: RoundRecord, committed: Committed, now_ms: int) -> None:
        """Make the next state of the sum, write both down at once, then tell everybody."""
        assignment = current.assignment
        # From here on nothing knows what too few devices have said.
        sums = thresholded(sums_of(committed.aggregate, number=current.number[0]), assignment.plan)
        try:
            result = assignment.result(sums)
        except RoundAbandoned as reason:
            ended = Abandoned(reason.reason, reason.detail, committed.cohort, committed.dropped)
            self.abandon(current, ended, now_ms)
            return
        ending = current.ending(committed, now_ms)
        self._journal.commit_round(current.row, ending, result)
        current.tell(
            "committed",
            now_ms,
            **current.summary(ending),
            survivors=ending.survivors,
            metrics=dict(result.metrics),
            weight=sums.weight,
            state=digest_of(result.broadcast).hex(),
        )
        self._close(current, now_ms)
        if assignment.task.kind == "request":
            self._forget(replace(assignment.task, position=1), "done", now_ms)

    def abandon(self, current: RoundRecord, abandoned: Abandoned, now_ms: int) -> None:
        """Write down that the round brought nothing, and why, then tell everybody."""
        ending = current.ending(abandoned, now_ms)
        self._journal.abandon_round(current.row, abandoned.reason, ending, detail=abandoned.detail)
        current.tell("abandoned", now_ms, **current.summary(ending), reason=abandoned.reason, detail=abandoned.detail)
        terms = current.assignment.loaded.terms
        self._retry_ms[current.assignment.task.id] = now_ms + round(1000 * terms.time.retry_delay_s)
        self._close(current, now_ms)

    def _close(self, current: RoundRecord, now_ms: int) -> None:
        """Publish the outcome of a round that the journal has, and make room for the next one."""
        self.current = None
        self._look_again_ms = now_ms
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
