"""The coordinator's side of one round, without I/O: selection, configuration, reporting, then committed or abandoned.

Two appointments (after Bonawitz et al. 2019, section 2.2): devices check in and train in the *training window*, and
those that are ready meet in the *rendezvous*, where the stages of secure aggregation (Bonawitz et al. 2017) run within
seconds. A device lost while training costs nothing.

`Round` is fed with verified messages, chunks, status hints and the time; it answers with effects and never waits. What
a device may say in which phase stands in `STEPS`; anything else raises and changes nothing. After every input
`ADVANCES` says whether the phase moves on: deadlines are the coordinator's, and nobody can hold a round past them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from coordinator import rendezvous
from coordinator.cohort import choose_cohort
from coordinator.phases import (
    NO_SESSION,
    ROUTE,
    Abandoned,
    Agenda,
    CohortSelected,
    Committed,
    Configuration,
    DevicesDropped,
    DeviceWithdrew,
    Effect,
    Phase,
    Reporting,
    Selection,
    Send,
    Terms,
)
from coordinator.presence import Presence
from coordinator.rendezvous import NotInCohort, Situation
from sottovoce.blobs import canonical, digest_of
from sottovoce.errors import ConflictingMessage, MalformedMessage, Replayed, UnexpectedMessage
from sottovoce.secagg.mask_removal import AT_ONCE, Spread
from sottovoce.wire.chunks import VectorChunk
from sottovoce.wire.codec import Opened
from sottovoce.wire.messages import (
    REASON_CODE,
    AdvertiseKeys,
    CheckIn,
    MaskedInput,
    Message,
    NotSelected,
    Ready,
    RoundOver,
    Selected,
    ShareKeys,
    SurvivorsSignature,
    Unmasking,
    Withdraw,
)

Step: TypeAlias = Callable[[Situation, Any, Opened[Any]], tuple[Phase, list[Effect]]]
Advance: TypeAlias = Callable[[Situation, Any], "tuple[Phase, list[Effect]] | None"]
_WITHOUT_SESSION = (CheckIn, Ready, Withdraw, AdvertiseKeys)
_MOST_CHECK_INS = 4
"""A device that withdrew may check in again, but not for ever: each time is a line in the events."""
_REPEAT_MS = 1000
"""A device waits longer than this before it asks again."""


class Round:
    """One round: feed it and perform the effects it returns, in order. One thread owns it; it is never reused.

    Args:
        agenda: What it is about.
        terms: Numbers and deadlines.
        presence: Who is connected; the round keeps it up to date from `device_status`.
        entropy: Returns that many random bytes.
        now_ms: The coordinator's time.
        spread: Over how many threads masks are taken off.
    """

    def __init__(
        self,
        agenda: Agenda,
        terms: Terms,
        *,
        presence: Presence,
        entropy: Callable[[int], bytes],
        now_ms: int,
        spread: Spread = AT_ONCE,
    ) -> None:
        self.agenda = agenda
        self.terms = terms
        self.phase: Phase = Selection({}, frozenset(), last_check_in_ms=now_ms, full_since_ms=None)
        self._presence = presence
        self._entropy = entropy
        self._spread = spread
        self._accepted: dict[tuple[str, type[Message]], bytes] = {}
        self._decisions: dict[str, Send] = {}
        self._last: dict[str, Send] = {}
        self._told: set[str] = set()
        self._check_ins: Counter[str] = Counter()
        self._repeated_ms: dict[str, int] = {}

    @property
    def over(self) -> bool:
        """True once the round is committed or abandoned."""
        return isinstance(self.phase, Committed | Abandoned)

    def receive(self, opened: Opened[Any], now_ms: int) -> list[Effect]:
        """Take in a verified message of a device.

        Raises:
            Replayed: It belongs to another round, attempt, session or announcement.
            MalformedMessage: A withdrawal without a code.
            ConflictingMessage: This device already said something else of this kind, or checks in again and again.
            UnexpectedMessage: The phase does not allow it.
            RemoteProtocolError: The session refuses it.
            CryptoError: A signature or certificate inside it does not verify.
        """
        device, message = opened.certificate.name, opened.message
        self._check_context(opened)
        if isinstance(message, Withdraw) and not REASON_CODE.fullmatch(message.code):
            raise MalformedMessage(f"{device} withdraws with a reason that is no code")
        step = STEPS.get((type(self.phase), type(message)))
        if step is None:
            raise UnexpectedMessage(self.phase, message)
        if self.over:
            return self._say_it_is_over(device)
        body = digest_of(canonical(message))
        accepted = self._accepted.get((device, type(message)))
        if accepted == body:
            return self._repeat(device, message, now_ms)
        if accepted is not None and not isinstance(message, Ready):
            raise ConflictingMessage(f"{device} sent a second, different {type(message).__name__}")
        if isinstance(message, CheckIn) and self._check_ins[device] >= _MOST_CHECK_INS:
            raise ConflictingMessage(f"{device} has checked in and withdrawn {_MOST_CHECK_INS} times")
        self.phase, effects = step(self._situation(now_ms), self.phase, opened)
        self._check_ins[device] += isinstance(message, CheckIn)
        if isinstance(message, Withdraw):
            self._accepted.pop((device, CheckIn), None)
        else:
            self._accepted[device, type(message)] = body
        return self._advance(effects, now_ms)

    def receive_chunk(self, device: str, chunk: VectorChunk, now_ms: int) -> list[Effect]:
        """Take in a chunk of a masked vector; it is verified against what the device signed.

        Raises:
            UnexpectedMessage: No rendezvous is open.
            RemoteProtocolError: Another session, no upload slot, or content that does not match.
        """
        if not isinstance(self.phase, Reporting):
            raise UnexpectedMessage(self.phase, chunk)
        self.phase, effects = rendezvous.receive_chunk(self._situation(now_ms), self.phase, device, chunk)
        return self._advance(effects, now_ms)

    def device_status(self, device: str, online: bool, now_ms: int) -> list[Effect]:
        """Take in a hint that `device` is or is not connected."""
        self._presence.note(device, online=online, now_ms=now_ms)
        return self._advance([], now_ms)

    def tick(self, now_ms: int) -> list[Effect]:
        """Let time pass."""
        return self._advance([], now_ms)

    def abandon(self, reason: str, detail: str = "") -> list[Effect]:
        """End the round without a result, from outside."""
        if self.over:
            return []
        dropped = self.phase.dropped if isinstance(self.phase, Reporting) else {}
        self.phase = Abandoned(reason, detail, self.cohort, dropped)
        return self._advance([], 0)

    def next_deadline_ms(self, now_ms: int) -> int | None:
        """Return the next time after `now_ms` at which `tick` may have something to do; None when the round is over."""
        if self.over:
            return None
        return min((time for time in self._deadlines() if time > now_ms), default=now_ms)

    @property
    def cohort(self) -> frozenset[str]:
        """The devices selected; nobody before that."""
        return frozenset() if isinstance(self.phase, Selection) else frozenset(self.phase.cohort)

    def _situation(self, now_ms: int) -> Situation:
        return Situation(self.agenda, self.terms, self._presence, self._entropy, self._spread, now_ms)

    def _check_context(self, opened: Opened[Any]) -> None:
        context, message = opened.context, opened.message
        if (context.round, context.attempt) != (self.agenda.round, self.agenda.attempt):
            raise Replayed(f"{type(message).__name__} of round {context.round}, attempt {context.attempt}")
        if isinstance(message, _WITHOUT_SESSION) and context.session != NO_SESSION:
            raise Replayed(f"{type(message).__name__} belongs to no session")
        if isinstance(message, CheckIn) and message.announcement != self.agenda.announcement:
            raise Replayed("a check-in for another announcement")

    def _repeat(self, device: str, message: Message, now_ms: int) -> list[Effect]:
        """Answer an exact repeat with what was said last, so that a lost answer costs one resend and nothing more.

        A roster is a thousand times larger than the message that asks for it again: repeats in quick succession get
        one answer, or whoever can repeat a message could fill the queue that all others are answered through.
        """
        if isinstance(message, CheckIn):
            answer = self._decisions.get(device)
            return [answer] if answer else []
        if (
            isinstance(message, MaskedInput)
            and isinstance(self.phase, Reporting)
            and self.phase.stage == "masked_input"
        ):
            return rendezvous.progress(self.phase, device)
        if device not in self._last or now_ms - self._repeated_ms.get(device, -_REPEAT_MS) < _REPEAT_MS:
            return []
        self._repeated_ms[device] = now_ms
        return [self._last[device]]

    def _say_it_is_over(self, device: str) -> list[Effect]:
        if device in self._told:
            return []
        self._told.add(device)
        return [Send(device, RoundOver(reason="committed" if isinstance(self.phase, Committed) else "abandoned"))]

    def _advance(self, effects: list[Effect], now_ms: int) -> list[Effect]:
        """Let the phase move on as far as it can, and remember what was said to whom; the last effect is the end."""
        situation = self._situation(now_ms)
        while not self.over and (moved := ADVANCES[type(self.phase)](situation, self.phase)) is not None:
            self.phase, more = moved
            effects = effects + more
        if isinstance(self.phase, Committed | Abandoned):
            for conversation in (self._accepted, self._decisions, self._last):
                conversation.clear()
            return [*effects, self.phase]
        for effect in effects:
            if isinstance(effect, Send):
                self._last[effect.device] = effect
                if isinstance(effect.message, Selected | NotSelected):
                    self._decisions[effect.device] = effect
        return effects

    def _deadlines(self) -> list[int]:
        match self.phase:
            case Selection(last_check_in_ms=last, full_since_ms=full):
                settled = [time + self.terms.settle_ms for time in (last, full) if time is not None]
                return [self.terms.selection_closes_ms, *settled]
            case Configuration():
                return [self.terms.rendezvous_ms, *self._presence.gone_at_ms()]
            case Reporting() as phase:
                idle = phase.uploads.next_deadline_ms()
                ends = [phase.stage_closes_ms] if idle is None else [phase.stage_closes_ms, idle]
                return [*ends, *self._presence.gone_at_ms()]
            case _:
                return []


# --- what a device may say, phase by phase ----------------------------------------------------------------------------


def _check_in(situation: Situation, phase: Selection, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    device, message, now_ms = opened.certificate.name, opened.message, situation.now_ms
    checked_in = {**phase.checked_in, device: message.fast_aes}
    full = len(checked_in) >= situation.terms.wanted
    return Selection(
        checked_in=checked_in,
        withdrawn=phase.withdrawn - {device},
        last_check_in_ms=now_ms,
        full_since_ms=(phase.full_since_ms or now_ms) if full else None,
    ), []


def _withdraw_before(situation: Situation, phase: Selection, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    device = opened.certificate.name
    if device in phase.withdrawn:
        return phase, []
    left = {name: fast_aes for name, fast_aes in phase.checked_in.items() if name != device}
    full = phase.full_since_ms if len(left) >= situation.terms.wanted else None
    withdrawn = phase.withdrawn | {device}
    next_phase = replace(phase, checked_in=left, withdrawn=withdrawn, full_since_ms=full)
    return next_phase, [DeviceWithdrew(device, opened.message.code)]


def _too_late(situation: Situation, phase: Phase, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    return phase, [Send(opened.certificate.name, NotSelected(retry_ms=situation.terms.rendezvous_ms))]


def _ready(situation: Situation, phase: Configuration, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    device = opened.certificate.name
    if device not in phase.cohort or device in phase.withdrawn:
        raise NotInCohort(f"{device} is not in the cohort")
    return replace(phase, ready={**phase.ready, device: opened.message.present}), []


def _withdraw_in_training(
    situation: Situation, phase: Configuration, opened: Opened[Any]
) -> tuple[Phase, list[Effect]]:
    device = opened.certificate.name
    if device not in phase.cohort or device in phase.withdrawn:
        return phase, []
    ready = {name: stays for name, stays in phase.ready.items() if name != device}
    next_phase = replace(phase, ready=ready, withdrawn=phase.withdrawn | {device})
    return next_phase, [DeviceWithdrew(device, opened.message.code)]


def _withdraw_in_rendezvous(situation: Situation, phase: Reporting, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    device = opened.certificate.name
    if device not in phase.cohort or device in phase.withdrawn:
        return phase, []
    return rendezvous.withdraw(phase, device), [DeviceWithdrew(device, opened.message.code)]


def _over(situation: Situation, phase: Phase, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    return phase, []


_ENDED: tuple[type[Phase], ...] = (Committed, Abandoned)
_FOR_THE_SESSION: tuple[type[Message], ...] = (AdvertiseKeys, ShareKeys, SurvivorsSignature, Unmasking)
_IN_A_ROUND: tuple[type[Message], ...] = (CheckIn, Ready, Withdraw, MaskedInput, *_FOR_THE_SESSION)
STEPS: dict[tuple[type[Phase], type[Message]], Step] = {
    (Selection, CheckIn): _check_in,
    (Selection, Withdraw): _withdraw_before,
    (Configuration, CheckIn): _too_late,
    (Configuration, Ready): _ready,
    (Configuration, Withdraw): _withdraw_in_training,
    (Reporting, CheckIn): _too_late,
    (Reporting, Ready): rendezvous.late_ready,
    (Reporting, Withdraw): _withdraw_in_rendezvous,
    (Reporting, MaskedInput): rendezvous.masked_input,
    **{(Reporting, kind): rendezvous.session_message for kind in _FOR_THE_SESSION},
    **{(ended, kind): _over for ended in _ENDED for kind in _IN_A_ROUND},
}
"""Every legal (phase, message) pair; what is not here is refused and changes nothing."""


# --- when a phase moves on --------------------------------------------------------------------------------------------


def _close_selection(situation: Situation, phase: Selection) -> tuple[Phase, list[Effect]] | None:
    """Fix the cohort when it is full, when everybody who is connected has answered, or at the deadline.

    A full cohort waits a moment for others, so that the quickest devices are not always the chosen ones.
    """
    terms, now_ms, count = situation.terms, situation.now_ms, len(phase.checked_in)
    everybody = not situation.presence.online - phase.checked_in.keys() - phase.withdrawn
    settled = now_ms - phase.last_check_in_ms >= terms.settle_ms
    full = phase.full_since_ms is not None and (everybody or now_ms - phase.full_since_ms >= terms.settle_ms)
    enough = count >= terms.minimum
    if not (full or (enough and everybody and settled) or now_ms >= terms.selection_closes_ms):
        return None
    if not enough:
        return Abandoned("too_few_checked_in", f"{count} devices of at least {terms.minimum}", frozenset(), {}), []
    chosen = choose_cohort(phase.checked_in, wanted=terms.wanted, entropy=situation.entropy)
    cohort = {device: phase.checked_in[device] for device in sorted(chosen)}
    passed_over = phase.checked_in.keys() - chosen
    selected = [Send(device, Selected(route=ROUTE, now_ms=now_ms)) for device in cohort]
    refused = [Send(device, NotSelected(retry_ms=terms.rendezvous_ms)) for device in sorted(passed_over)]
    effects: list[Effect] = [CohortSelected(chosen, frozenset(passed_over)), *selected, *refused]
    return Configuration(cohort=cohort, ready={}, withdrawn=frozenset()), effects


def _close_training(situation: Situation, phase: Configuration) -> tuple[Phase, list[Effect]] | None:
    """Open the rendezvous when enough are ready, or nobody else will be, or at its time."""
    terms, now_ms = situation.terms, situation.now_ms
    due = now_ms >= terms.rendezvous_ms
    possible = phase.cohort.keys() - phase.withdrawn
    if len(possible) < terms.minimum or (due and len(phase.ready) < terms.minimum):
        detail = f"{len(phase.ready)} devices ready of at least {terms.minimum}"
        lost = tuple(sorted(phase.cohort.keys() - phase.ready.keys()))
        effects: list[Effect] = [DevicesDropped("training", lost)] if lost else []
        return Abandoned("too_few_ready", detail, frozenset(phase.cohort), {"training": lost} if lost else {}), effects
    gone = {device for device in possible if situation.presence.gone(device, now_ms)}
    away = {d for d, stays in phase.ready.items() if not stays and situation.presence.offline(d)}
    here = phase.ready.keys() - away - gone
    nobody_else = not away and not possible - here - gone
    if not (due or (not away and len(here) >= terms.goal) or (nobody_else and len(here) >= terms.minimum)):
        return None
    return rendezvous.open_rendezvous(situation, cohort=phase.cohort, ready=phase.ready, withdrawn=phase.withdrawn)


ADVANCES: dict[type[Phase], Advance] = {
    Selection: _close_selection,
    Configuration: _close_training,
    Reporting: rendezvous.advance,
}
