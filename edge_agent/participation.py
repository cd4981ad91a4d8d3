"""The device's side of a round as a plain object: fed with verified messages and local events, it returns effects.

It never waits, reads no clock and touches no disk. Five rules stand above the table of `edge_agent.steps`:

- An announcement opens the next round *beside* the current one: only when its plan has arrived is it known whether the
  round is new, and then the older round ends for this device.
- The announcements of a coordinator are a chain: see `edge_agent.announcements`.
- An exact repeat of a message that was handled in this round changes nothing (QoS 1 repeats). What the table does not
  allow ends the device's part in the round and drops every secret; a stranger's or an old round's message is refused
  and changes nothing.
- Every outcome settles the client state that is held for its round, also when that round is no longer the current one:
  a device that was killed after masking, or that has gone on already, hears how it ended from the retained outcome.
- While an answer is due the last message is sent again, after a while and at once after a reconnect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_agent.announcements import Announced, Announcements, check_announced
from edge_agent.effects import (
    Effect,
    Entry,
    Event,
    FetchPlan,
    KeepEvidence,
    KeepTime,
    LocalFacts,
    Log,
    PlanFetched,
    Remember,
    RoundId,
    Send,
    SettleClientState,
)
from edge_agent.states import (
    IN_SESSION,
    TAKING_PART,
    Advertised,
    AwaitingOutcome,
    CheckedIn,
    Device,
    Idle,
    Moment,
    OpenRound,
    Sharing,
    State,
    Uploaded,
    Uploading,
    Waiting,
    Watching,
    entry_of,
    present,
    send,
    session_id_of,
)
from edge_agent.steps import STEPS, StepFunction, begin_fetching, leave
from sottovoce.blobs import canonical, digest_of
from sottovoce.errors import (
    ConfigError,
    CryptoError,
    Equivocation,
    PolicyRefusal,
    ProgramError,
    RemoteProtocolError,
    Replayed,
    RoundAbandoned,
    SottovoceError,
    UnexpectedMessage,
)
from sottovoce.plan import Plan, decode_plan
from sottovoce.wire.codec import Opened
from sottovoce.wire.messages import (
    AdvertiseKeysRequest,
    Announcement,
    CheckIn,
    Message,
    NotSelected,
    Outcome,
    Ready,
    Roster,
    RoundOver,
    Selected,
    UploadSlot,
    Withdraw,
)

RESEND_MS = 5_000
RESEND_LIMIT_MS = 30_000
_BEFORE_THE_SESSION = (Selected, NotSelected, AdvertiseKeysRequest, Roster, RoundOver, Outcome)
_EXPECTING_AN_ANSWER = (CheckedIn, Waiting, Advertised, Sharing, Uploading, Uploaded, AwaitingOutcome)


@dataclass(frozen=True, slots=True)
class _Due:
    """The last message, to be sent again at `at_ms`."""

    send: Send
    interval_ms: int
    at_ms: int


class Participation:
    """One device's part in one round after the other.

    Attributes:
        device: Who takes part, and on which terms.
        state: Where it stands; see `edge_agent.states`.
    """

    def __init__(
        self, device: Device, *, entry: Entry | None = None, last_signed_ms: int = 0, resend_ms: int = RESEND_MS
    ) -> None:
        """Start from what the disk remembers.

        Args:
            device: Who takes part.
            entry: The round this device was in when it was stopped, if any.
            last_signed_ms: The latest time that a coordinator signed, as far as it is remembered.
            resend_ms: How long to wait for an answer before the first repetition.
        """
        self.device = device
        self.state: State = AwaitingOutcome(entry) if entry is not None and entry.session else Idle()
        self._entry = entry
        self._announcements = Announcements()
        self._candidate: Announced | None = None
        self._due: _Due | None = None
        self._seen: set[bytes] = set()
        self._resend_ms = resend_ms
        self._last_signed_ms = last_signed_ms
        self._offset_ms = 0

    # --- what comes in ------------------------------------------------------------------------------------------------

    def receive(self, opened: Opened[Message], now_ms: int) -> list[Effect]:
        """Take a verified message of a coordinator and return what to do.

        Args:
            opened: The message; its signature and certificate are verified, its role is `coordinator`.
            now_ms: A clock of this process that never goes back, in ms; wall-clock time where that is known.

        Raises:
            Replayed: It belongs to another round, attempt, session or coordinator; nothing has changed.
            UnexpectedMessage: It has no place here; nothing has changed, for there was nothing to drop.
        """
        match opened.message:
            case Announcement() as announcement:
                return [*self._keep_time(announcement.now_ms, now_ms), *self._announced(opened, announcement, now_ms)]
            case Outcome() as outcome:
                self._announcements.end(outcome)
                in_round = self._receive_in_round(opened, now_ms)
                return [*self._keep_time(outcome.now_ms, now_ms), self._settled(opened, outcome), *in_round]
            case Selected() as selected:
                return [*self._receive_in_round(opened, now_ms), *self._keep_time(selected.now_ms, now_ms)]
            case _:
                return self._receive_in_round(opened, now_ms)

    def report(self, event: Event, now_ms: int) -> list[Effect]:
        """Take an event of the shell and return what to do; one that has come too late changes nothing."""
        if isinstance(event, PlanFetched):
            return self._plan_fetched(event, now_ms)
        step = STEPS.get((type(self.state), type(event)))
        return [] if step is None else self._take(step, event, now_ms)

    def fail(self, error: SottovoceError, now_ms: int) -> list[Effect]:
        """End the part in the current round because of `error`; every secret is dropped."""
        return self._withdraw(error, now_ms)

    def connected(self, now_ms: int) -> list[Effect]:
        """The link is up (again): send at once what still waits for an answer."""
        return self._resend(now_ms)

    def tick(self, now_ms: int) -> list[Effect]:
        """Do what is due by now: repeat the last message, or give up a round that has gone silent."""
        give_up_ms = self._give_up_ms()
        if give_up_ms is not None and now_ms >= give_up_ms:
            return self._leave("no outcome was heard in time", now_ms)
        return self._resend(now_ms) if self._due is not None and now_ms >= self._due.at_ms else []

    def next_wakeup_ms(self) -> int | None:
        """Return the local time at which `tick` has something to do, None if nothing is due."""
        due_ms = self._due.at_ms if self._due is not None else None
        return min((at for at in (due_ms, self._give_up_ms()) if at is not None), default=None)

    def coordinator_ms(self, now_ms: int) -> int:
        """Return the best guess of the coordinator's time: never before anything it has signed."""
        return max(now_ms + self._offset_ms, self._last_signed_ms)

    @property
    def deciding(self) -> bool:
        """True while an announcement waits for its plan."""
        return self._candidate is not None

    # --- announcements ------------------------------------------------------------------------------------------------

    def _announced(self, opened: Opened[Message], announcement: Announcement, now_ms: int) -> list[Effect]:
        context, current = opened.context, entry_of(self.state)
        position = (context.round, context.attempt)
        announced = Announced(digest_of(opened.payload), context.sender, position, announcement, now_ms)
        if self._announcements.repeats(announced) or (current and current.announcement == announced.digest):
            return []
        warning = self._announcements.hear(announced)
        self._candidate = announced
        return [*warning, FetchPlan(announcement.plan, announcement.state.digest)]

    def _plan_fetched(self, event: PlanFetched, now_ms: int) -> list[Effect]:
        candidate = self._candidate
        if candidate is None or digest_of(event.content) != candidate.announcement.plan.digest:
            return []
        self._candidate = None
        try:
            plan = decode_plan(event.content)
        except ConfigError as error:
            return self._refuse(candidate, None, error, now_ms, code="bad_plan")
        if outcome := self._announcements.outcome_of(candidate):
            return self._look_back(candidate, plan, outcome, now_ms)
        if not self._is_new(candidate, plan, event.facts):
            round_, attempt = candidate.position
            return [Log(f"round {round_}, attempt {attempt} of {plan.name} is over for this device")]
        # Twice: the first leaves the session, the second also stops waiting for its outcome.
        left = [*self._leave("a newer round is open", now_ms), *self._leave("a newer round is open", now_ms)]
        try:
            check_announced(self.device, candidate, plan, event.facts, now_ms=self.coordinator_ms(now_ms))
        except (PolicyRefusal, ProgramError, ConfigError) as error:
            return [*left, *self._refuse(candidate, plan, error, now_ms)]
        return [*left, *self._join(candidate.open(plan), now_ms)]

    def _look_back(self, candidate: Announced, plan: Plan, outcome: Outcome, now_ms: int) -> list[Effect]:
        """Take note of a round that had ended before this device heard of it: its new state is still of use."""
        if not isinstance(self.state, Idle):
            return []
        self._enter(Watching(candidate.entry(plan), "it had ended already"), [], now_ms)
        step = STEPS[Watching, Outcome]
        return self._take(step, outcome, now_ms)

    def _is_new(self, candidate: Announced, plan: Plan, facts: LocalFacts) -> bool:
        """Say whether the announced round is newer than all that are finished, and than the current one."""
        current = entry_of(self.state)
        running = (current.round, current.attempt) if current and current.plan_name == plan.name else None
        return all(candidate.position > done for done in (facts.last_round, running) if done is not None)

    def _join(self, round_: OpenRound, now_ms: int) -> list[Effect]:
        """Check in, or go on where a stopped agent was."""
        if self._entry is not None and self._entry.announcement == round_.entry.announcement:
            resumed = replace(round_, entry=self._entry)
            next_state, effects = begin_fetching(resumed)
            return self._enter(next_state, [Log(f"going on with round {resumed.entry.round}"), *effects], now_ms)
        check_in = CheckIn(
            certificate=self.device.identity.certificate.der,
            announcement=round_.entry.announcement,
            fast_aes=self.device.fast_aes,
        )
        return self._enter(CheckedIn(round_), [round_.send(check_in)], now_ms)

    def _refuse(
        self, candidate: Announced, plan: Plan | None, error: SottovoceError, now_ms: int, code: str | None = None
    ) -> list[Effect]:  # fmt: skip
        # A plan that the owner refuses leaves no trace: its states are not fetched either. One that is only not due yet
        # is followed: what the others make of it is for everybody.
        refused = isinstance(error, PolicyRefusal) and error.rule != "participation"
        entry = candidate.entry(None if refused else plan)
        effects: list[Effect] = [
            Log(f"round {entry.round}: {error}", warning=True),
            send(entry, Withdraw(code=code or code_of(error), certificate=self.device.identity.certificate.der)),
        ]
        return self._enter(Watching(entry, str(error)), effects, now_ms)

    # --- messages of the round ----------------------------------------------------------------------------------------

    def _settled(self, opened: Opened[Message], outcome: Outcome) -> SettleClientState:
        context = opened.context
        round_ = RoundId(outcome.announcement, context.sender, context.round, context.attempt)
        return SettleClientState(round_, outcome.committed and self.device.name in outcome.survivors)

    def _receive_in_round(self, opened: Opened[Message], now_ms: int) -> list[Effect]:
        message, entry = opened.message, entry_of(self.state)
        if isinstance(message, Outcome) and (entry is None or message.announcement != entry.announcement):
            return []
        if entry is None:
            raise UnexpectedMessage(self.state, message)
        self._check_context(opened, entry)
        digest = digest_of(type(message).__name__.encode() + canonical(message))
        if digest in self._seen:
            return []
        step = STEPS.get((type(self.state), type(message)))
        if step is None:
            unexpected = UnexpectedMessage(self.state, message)
            if not isinstance(self.state, TAKING_PART):
                raise unexpected
            return self._withdraw(unexpected, now_ms)
        if not isinstance(message, UploadSlot):
            self._seen.add(digest)
        return self._take(step, message, now_ms)

    def _check_context(self, opened: Opened[Message], entry: Entry) -> None:
        context, name = opened.context, type(opened.message).__name__
        if context.sender != entry.coordinator or (context.round, context.attempt) != (entry.round, entry.attempt):
            raise Replayed(f"a {name} of another round or coordinator")
        before = isinstance(opened.message, _BEFORE_THE_SESSION)
        if context.session != (bytes(32) if before else entry.session or session_id_of(self.state)):
            raise Replayed(f"a {name} of another session")

    def _take(self, step: StepFunction, message: Message | Event, now_ms: int) -> list[Effect]:
        try:
            next_state, effects = step(self.device, self.state, message, self._moment(now_ms))
        except SottovoceError as error:
            return self._withdraw(error, now_ms)
        return self._enter(next_state, list(effects), now_ms)

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _withdraw(self, error: SottovoceError, now_ms: int) -> list[Effect]:
        entry, was = entry_of(self.state), type(self.state).__name__
        if entry is None or not isinstance(self.state, TAKING_PART):
            return [Log(str(error), warning=True)]
        effects = self._leave(str(error), now_ms)
        withdrawal = send(entry, Withdraw(code=code_of(error)))
        evidence = [KeepEvidence(error.evidence)] if isinstance(error, Equivocation) else []
        warning = Log(f"round {entry.round}: leaving it ({was}): {error}", warning=True)
        return [*effects, warning, withdrawal, *evidence]

    def _leave(self, reason: str, now_ms: int) -> list[Effect]:
        next_state, effects = leave(self.state, reason)
        return self._enter(next_state, list(effects), now_ms)

    # --- bookkeeping --------------------------------------------------------------------------------------------------

    def _enter(self, state: State, effects: list[Effect], now_ms: int) -> list[Effect]:
        """Make `state` the current one and set the clock for the answer that is now due."""
        before, entry = entry_of(self.state), entry_of(state)
        if isinstance(self.state, IN_SESSION) and not isinstance(state, IN_SESSION):
            self.state.session.abort()
        leaving = isinstance(state, AwaitingOutcome) and not isinstance(self.state, AwaitingOutcome)
        self.state = state
        if before is None or entry is None or before.announcement != entry.announcement:
            self._seen.clear()
        self._entry = next((e.entry for e in reversed(effects) if isinstance(e, Remember)), self._entry)
        questions = [e for e in effects if isinstance(e, Send) and not isinstance(e.message, Withdraw)]
        if questions and isinstance(state, _EXPECTING_AN_ANSWER):
            self._due = self._schedule(questions[-1], self._resend_ms, now_ms)
        elif leaving or not isinstance(state, _EXPECTING_AN_ANSWER):
            self._due = None
        elif self._due is not None:
            self._due = self._schedule(self._due.send, self._due.interval_ms, now_ms)
        return effects

    def _resend(self, now_ms: int) -> list[Effect]:
        if self._due is None:
            return []
        again, interval_ms = self._due.send, self._due.interval_ms
        if isinstance(again.message, CheckIn | Ready):
            interval_ms = min(2 * interval_ms, max(RESEND_LIMIT_MS, self._resend_ms))
        if isinstance(again.message, Ready) and isinstance(self.state, Waiting):
            here = present(self.device, self.state.round.announcement, self._moment(now_ms))
            again = replace(again, message=Ready(present=here))
        if isinstance(self.state, Uploading):
            self.state = replace(self.state, in_flight=frozenset())
        self._due = self._schedule(again, interval_ms, now_ms)
        return [again]

    def _schedule(self, again: Send, interval_ms: int, now_ms: int) -> _Due:
        jitter = int.from_bytes(self.device.entropy(2), "little") / 0xFFFF
        return _Due(again, interval_ms, now_ms + int(interval_ms * (0.8 + 0.4 * jitter)))

    def _give_up_ms(self) -> int | None:
        if isinstance(self.state, TAKING_PART):
            return self.state.round.give_up_ms
        return self.state.give_up_ms if isinstance(self.state, AwaitingOutcome) else None

    def _keep_time(self, signed_ms: int, now_ms: int) -> list[Effect]:
        self._offset_ms = max(self._offset_ms, signed_ms - now_ms)
        if signed_ms <= self._last_signed_ms:
            return []
        self._last_signed_ms = signed_ms
        return [KeepTime(signed_ms)]

    def _moment(self, now_ms: int) -> Moment:
        return Moment(local_ms=now_ms, coordinator_ms=self.coordinator_ms(now_ms))


def code_of(error: SottovoceError) -> str:
    """Return the short code by which the coordinator is told of `error`; never its text."""
    match error:
        case PolicyRefusal():
            return "policy"
        case ProgramError(code=code):
            return code
        case RemoteProtocolError(reason=reason) | CryptoError(reason=reason) | RoundAbandoned(reason=reason):
            return reason
        case _:
            return "device"
