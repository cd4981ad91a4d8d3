"""The machine: what the table does not allow is refused, and the rules that stand above the table."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import msgspec
import pytest
from participation_machine import ANNOUNCED, NOW, SESSION, STATES, Machine, sent

from edge_agent.effects import (
    AdvanceRound,
    BlobFetched,
    Contribution,
    ContributionLoaded,
    Event,
    ForgetPending,
    HoldClientState,
    KeepEvidence,
    Log,
    NextClientState,
    Remember,
    RoundId,
    Send,
    Settle,
    SettleClientState,
    Spend,
    StopWork,
    WorkFinished,
)
from edge_agent.participation import Participation, code_of
from edge_agent.states import (
    IN_SESSION,
    TAKING_PART,
    AwaitingOutcome,
    Opening,
    Sharing,
    State,
    Uploaded,
    Uploading,
    Waiting,
    Watching,
    Working,
)
from edge_agent.steps import STEPS
from sottovoce.errors import (
    BadExamples,
    ConfigError,
    Equivocation,
    PolicyRefusal,
    RemoteProtocolError,
    Replayed,
    RoundAbandoned,
    UnexpectedMessage,
)
from sottovoce.wire.messages import (
    COORDINATOR_MESSAGES,
    AdvertiseKeysRequest,
    Announcement,
    MaskedInput,
    MaskedInputRequest,
    Message,
    Outcome,
    Ready,
    RoundOver,
    UnmaskingRequest,
    Withdraw,
)

EVENTS: dict[type[Event], Event] = {
    BlobFetched: BlobFetched(b"d" * 32),
    WorkFinished: WorkFinished(),
    ContributionLoaded: ContributionLoaded(Contribution({}, 1)),
}


PAIRS = [(state, kind) for state, kind in itertools.product(STATES, COORDINATOR_MESSAGES) if kind is not Announcement]


@pytest.mark.parametrize(
    ("state", "kind"),
    [pair for pair in PAIRS if pair not in STEPS],
    ids=lambda each: each.__name__,
)
def test_what_the_table_does_not_allow_ends_the_part_in_the_round(
    machine: Machine, state: type[State], kind: type[Message]
) -> None:
    before = machine.put(state)
    if state not in TAKING_PART:
        with pytest.raises(UnexpectedMessage):
            machine.receive(machine.message(kind))
        assert machine.participation.state is before
        return
    effects = machine.receive(machine.message(kind))
    after = machine.participation.state
    assert isinstance(after, AwaitingOutcome if state in (Uploading, Uploaded) else Watching)
    assert [e.message for e in effects if isinstance(e, Send)] == [Withdraw("unexpected")]
    if state in IN_SESSION:
        assert before.session.aborted
    if state is Working:
        assert StopWork() in effects


@pytest.mark.parametrize(
    ("state", "kind"),
    [pair for pair in itertools.product(STATES, EVENTS) if pair not in STEPS],
    ids=lambda each: each.__name__,
)
def test_an_event_that_comes_too_late_changes_nothing(machine: Machine, state: type[State], kind: type[Event]) -> None:
    before = machine.put(state)
    assert machine.participation.report(EVENTS[kind], NOW) == []
    assert machine.participation.state is before


def test_every_state_and_every_message_is_in_the_table() -> None:
    assert {state for state, _ in STEPS} == set(STATES)
    assert {kind for _, kind in STEPS} == {*COORDINATOR_MESSAGES, *EVENTS} - {Announcement}


@pytest.mark.parametrize("state", STATES, ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    "changes",
    [{"sender": "stranger"}, {"round": 2}, {"attempt": 0}, {"session": b"o" * 32}],
    ids=lambda changes: next(iter(changes)),
)
def test_messages_of_others_change_nothing(machine: Machine, state: type[State], changes: dict[str, Any]) -> None:
    before = machine.put(state)
    for kind in COORDINATOR_MESSAGES:
        if kind in (Announcement, Outcome):
            continue
        with pytest.raises((Replayed, UnexpectedMessage)):
            machine.receive(machine.message(kind), **changes)
        assert machine.participation.state is before


def test_an_outcome_of_another_round_changes_nothing(machine: Machine) -> None:
    before = machine.put(Sharing)
    outcome = Outcome(b"", b"other".ljust(32), True, "", (), machine.state_ref, NOW)
    effects = machine.receive(outcome)
    assert machine.participation.state is before
    assert not [e for e in effects if isinstance(e, Send | Settle | AdvanceRound)]


def test_an_exact_repeat_changes_nothing_and_is_not_answered(machine: Machine) -> None:
    machine.put(Waiting)
    request = machine.message(AdvertiseKeysRequest)
    machine.receive(request)
    opening = machine.participation.state
    assert machine.receive(request) == []
    assert machine.participation.state is opening


def test_a_session_must_keep_what_the_plan_has_promised(machine: Machine) -> None:
    terms = msgspec.structs.replace(machine.plan.privacy, minimum_cohort=8)
    machine.plan = msgspec.structs.replace(machine.plan, privacy=terms)
    machine.put(Waiting)
    assert sent(machine.receive(machine.invitation())) == [Withdraw("policy")]
    machine.put(Waiting)
    machine.receive(machine.invitation(minimum_survivors=8))
    assert isinstance(machine.participation.state, Opening)


def test_two_survivor_sets_end_the_session_and_the_proof_is_kept(machine: Machine) -> None:
    state = machine.put(Uploaded)
    assert isinstance(state, Uploaded)

    def lie(message: Message) -> Message:
        raise Equivocation("two sets", (b"a signed envelope",))

    state.session.receive = lie  # type: ignore[method-assign]  # the fake session of this file
    effects = machine.receive(machine.message(UnmaskingRequest))
    assert KeepEvidence((b"a signed envelope",)) in effects
    assert sent(effects) == [Withdraw("equivocation")]
    assert state.session.aborted  # type: ignore[attr-defined]


def test_who_has_left_a_session_says_nothing_more_in_it(machine: Machine) -> None:
    machine.put(Uploading)
    participation = machine.participation
    participation._due = participation._schedule(machine.open_round(session=SESSION).send(Ready(True)), 5_000, NOW)
    participation.fail(ConfigError("the disk is full"), NOW)
    assert isinstance(participation.state, AwaitingOutcome)
    assert participation.connected(NOW) == []


def test_a_reason_that_is_no_code_does_not_reach_the_log(machine: Machine) -> None:
    machine.put(Working)
    effects = machine.receive(RoundOver("late\n2026-11-22 a line that nobody wrote"))
    assert not [effect for effect in effects if isinstance(effect, Log) and "nobody wrote" in effect.text]


def test_a_device_that_was_cut_off_after_masking_only_waits_for_the_outcome(machine: Machine) -> None:
    machine.participation = Participation(machine.participation.device, entry=machine.entry(session=SESSION))
    effects = machine.receive(machine.message(Outcome))
    assert Settle(SESSION, "abandoned") in effects
    assert Remember(None) in effects


def test_an_outcome_settles_the_ledger_for_survivors_only(machine: Machine) -> None:
    for survivors, settled in ((("pi-0", "pi-1"), "committed"), (("pi-1",), "abandoned")):
        machine.put(AwaitingOutcome)
        effects = machine.receive(Outcome(b"", b"a" * 32, True, "", survivors, machine.state_ref, NOW))
        assert Settle(SESSION, settled) in effects


@pytest.mark.parametrize("state", STATES, ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    ("committed", "survivors", "survived"),
    [(True, ("pi-0", "pi-1"), True), (True, ("pi-1",), False), (False, ("pi-0", "pi-1"), False), (False, (), False)],
)
def test_every_outcome_settles_the_client_state_of_its_own_round(
    machine: Machine, state: type[State], committed: bool, survivors: tuple[str, ...], survived: bool
) -> None:
    machine.put(state)
    for announcement in (b"a" * 32, b"other".ljust(32)):
        effects = machine.receive(Outcome(b"", announcement, committed, "late", survivors, machine.state_ref, NOW))
        settled = [effect for effect in effects if isinstance(effect, SettleClientState)]
        assert settled == [SettleClientState(RoundId(announcement, "coordinator", 3, 1), survived)]
        # First: what is forgotten of the round after this can be heard again, the client state would be lost.
        later = [i for i, e in enumerate(effects) if isinstance(e, Settle | Remember)]
        assert all(effects.index(settled[0]) < i for i in later)


def test_the_new_client_state_goes_through_the_session_and_is_held_before_the_result_is_erased(
    machine: Machine,
) -> None:
    value = NextClientState(
        slot="control", version=1, types="", plan_name="digits", collection="digits", base="0/0", content=b"secret"
    )
    state = machine.put(Sharing)
    assert isinstance(state, Sharing)
    machine.participation.state = dataclasses.replace(state, client_state=value)
    state.session.receive = lambda message: MaskedInput(ANNOUNCED)  # type: ignore[method-assign]  # a fake
    effects = machine.receive(machine.message(MaskedInputRequest))
    kinds = [type(effect) for effect in effects]
    assert HoldClientState(machine.open_round().id, value) in effects
    assert kinds.index(HoldClientState) < kinds.index(ForgetPending) < kinds.index(Spend)
    assert "secret" not in repr(effects)


def test_masked_bytes_leave_only_after_the_update_is_erased_and_written_down(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    performed: list[str] = []
    agent = world.agents["pi-0"]
    perform = agent._hands.perform
    agent._hands.perform = lambda effects: (performed.extend(_label(e) for e in effects), perform(effects))[1]
    world.run_rendezvous(devices)
    erased, spent, masked = (
        performed.index(label) for label in (ForgetPending.__name__, Spend.__name__, "MaskedInput")
    )
    assert erased < spent < masked


def _label(effect: Any) -> str:
    return type(effect.message if isinstance(effect, Send) else effect).__name__


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PolicyRefusal("rule", "detail"), "policy"),
        (BadExamples("none"), "bad_examples"),
        (RoundAbandoned("late"), "late"),
        (RemoteProtocolError("no"), "protocol"),
        (ConfigError("the disk is full"), "device"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Exception) else each,
)
def test_errors_are_told_by_code_only(error: Any, code: str) -> None:
    assert code_of(error) == code
