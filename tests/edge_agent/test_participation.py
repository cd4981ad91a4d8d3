"""The machine: what the table does not allow is refused, and the rules that stand above the table."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest

from edge_agent.effects import (
    AdvanceRound,
    BlobFetched,
    Contribution,
    ContributionLoaded,
    Entry,
    Event,
    FetchPlan,
    ForgetPending,
    HoldClientState,
    KeepEvidence,
    KeepPublished,
    LocalFacts,
    Log,
    NextClientState,
    PlanFetched,
    Remember,
    RoundId,
    Send,
    Settle,
    SettleClientState,
    Spend,
    StopWork,
    WorkFinished,
)
from edge_agent.participation import GRACE_MS, Participation, code_of
from edge_agent.policy import Policy
from edge_agent.states import (
    IN_SESSION,
    TAKING_PART,
    Advertised,
    AwaitingOutcome,
    CheckedIn,
    Device,
    Fetching,
    Idle,
    Opening,
    OpenRound,
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
from sottovoce.identity import SignedContext
from sottovoce.plan import Aggregation, Counted, Extraction, ParticipationTerms, blob_ref, canonical, digest_of
from sottovoce.wire.codec import ALL, Opened
from sottovoce.wire.messages import (
    COORDINATOR_MESSAGES,
    AdvertiseKeysRequest,
    Announcement,
    CheckIn,
    MaskedInput,
    MaskedInputRequest,
    Message,
    NotSelected,
    Outcome,
    Ready,
    Roster,
    RoundOver,
    Selected,
    SurvivorsRequest,
    TaggedVector,
    UnmaskingRequest,
    UploadSlot,
    Withdraw,
)

NOW = 1_780_000_000_000
SESSION = b"s" * 32
ANNOUNCED = TaggedVector(size=100, chunk_bytes=10, tags=bytes(160))
STATES = get_args(State)
EVENTS: dict[type[Event], Event] = {
    BlobFetched: BlobFetched(b"d" * 32),
    WorkFinished: WorkFinished(),
    ContributionLoaded: ContributionLoaded(Contribution({}, 1)),
}


class FakeSession:
    """Stands in for a ClientSession: remembers only whether its secrets were dropped."""

    session_id = SESSION
    masked_vector = bytearray(100)

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


@dataclasses.dataclass
class Machine:
    """A participation in any state, and messages that fit it."""

    participation: Participation
    plan: Any
    parameters: Any
    state_ref: Any
    certificate: Any

    def entry(self, *, session: bytes = b"") -> Entry:
        return Entry(b"a" * 32, "coordinator", "digits", b"p" * 32, 3, 1, "r7", session)

    def open_round(self, *, session: bytes = b"") -> OpenRound:
        return OpenRound(self.entry(session=session), self.announcement(), self.plan, NOW + 1_000_000)

    def announcement(self, *, now_ms: int = NOW, plan: Any = None) -> Announcement:
        return Announcement(
            certificate=b"",
            previous=bytes(32),
            plan=blob_ref(canonical(plan or self.plan)),
            state=self.state_ref,
            now_ms=now_ms,
            selection_closes_ms=now_ms + 10_000,
            rendezvous_ms=now_ms + 60_000,
            rendezvous_closes_ms=now_ms + 90_000,
        )

    def put(self, kind: type[State]) -> State:
        """Put the participation into a state of that kind."""
        round_, spent = self.open_round(), self.open_round(session=SESSION)
        session: Any = FakeSession()
        made: dict[type[State], Callable[[], State]] = {
            Idle: Idle,
            Watching: lambda: Watching(self.entry(), "for a test"),
            CheckedIn: lambda: CheckedIn(round_),
            Fetching: lambda: Fetching(round_, frozenset({b"d" * 32})),
            Working: lambda: Working(round_),
            Waiting: lambda: Waiting(round_),
            Opening: lambda: Opening(round_, self.invitation()),
            Advertised: lambda: Advertised(round_, session, 5),
            Sharing: lambda: Sharing(round_, session, 5, 4),
            Uploading: lambda: Uploading(spent, session, ANNOUNCED),
            Uploaded: lambda: Uploaded(spent, session),
            AwaitingOutcome: lambda: AwaitingOutcome(self.entry(session=SESSION), NOW + 1_000_000),
        }
        self.participation.state = made[kind]()
        return self.participation.state

    def invitation(self, **changes: Any) -> AdvertiseKeysRequest:
        """What opens the rendezvous, with other parameters if need be."""
        return AdvertiseKeysRequest(msgspec.structs.replace(self.parameters, **changes), b"\t" * 32)

    def message(self, kind: type[Message]) -> Message:
        made: dict[type[Message], Callable[[], Message]] = {
            Announcement: self.announcement,
            Outcome: lambda: Outcome(b"", b"a" * 32, False, "late", (), self.state_ref, NOW),
            Selected: lambda: Selected("r7", NOW),
            NotSelected: lambda: NotSelected(NOW),
            AdvertiseKeysRequest: self.invitation,
            Roster: lambda: Roster(bytes(96), 2, 2, ()),
            MaskedInputRequest: lambda: MaskedInputRequest((), b""),
            UploadSlot: lambda: UploadSlot(bytes(2), False),
            SurvivorsRequest: lambda: SurvivorsRequest((0, 1)),
            UnmaskingRequest: lambda: UnmaskingRequest((0, 1), ()),
            RoundOver: lambda: RoundOver("late"),
        }
        return made[kind]()

    def opened(self, message: Message, *, payload: bytes = b"x", **changes: Any) -> Opened[Any]:
        published = isinstance(message, Announcement | Outcome)
        before = isinstance(message, Selected | NotSelected | AdvertiseKeysRequest | Roster | RoundOver) or published
        sessions = isinstance(self.participation.state, (*IN_SESSION, AwaitingOutcome))
        context = SignedContext(
            "coordinator",
            ALL if published else "pi-0",
            "choir",
            3,
            1,
            SESSION if sessions and not before else bytes(32),
        )
        return Opened(
            message,
            self.certificate,
            msgspec.structs.replace(context, **changes),
            digest_of(canonical(message)),
            payload,
        )

    def receive(self, message: Message, now: int = NOW, **changes: Any) -> list[Any]:
        return self.participation.receive(self.opened(message, **changes), now)


@pytest.fixture
def machine(motionless_world: Any) -> Machine:
    world = motionless_world
    setup = world.setup("pi-0")
    device = Device(
        identity=setup.identity,
        anchor=setup.anchor,
        policy=Policy(minimum_cohort=3, minimum_honest_survivors=2),
        entropy=lambda count: bytes(count),
    )
    coordinator = world.coordinator
    return Machine(
        Participation(device),
        coordinator.plan,
        coordinator.parameters(),
        blob_ref(coordinator.state_bytes),
        coordinator.identity.certificate,
    )


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


def announce(machine: Machine, *, plan: Any = None, payload: bytes = b"e", now: int = NOW, **changes: Any) -> list[Any]:
    return machine.receive(machine.announcement(plan=plan), payload=payload, now=now, **changes)


def plan_arrives(machine: Machine, plan: Any = None, *, now: int = NOW, **facts: Any) -> list[Any]:
    known = LocalFacts(**{"last_round": None, "releases": 0, "examples": 9, **facts})
    return machine.participation.report(PlanFetched(canonical(plan or machine.plan), known), now)


def sent(effects: list[Any]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def test_an_announcement_is_answered_when_its_plan_is_known(machine: Machine) -> None:
    assert any(isinstance(effect, FetchPlan) for effect in announce(machine))
    assert machine.participation.deciding
    (check_in,) = sent(plan_arrives(machine))
    assert isinstance(check_in, CheckIn)
    assert check_in.announcement == digest_of(b"e")
    assert not machine.participation.deciding


@pytest.mark.parametrize(("last", "joins"), [((2, 7), True), ((3, 0), True), ((3, 1), False), ((4, 0), False)])
def test_only_rounds_newer_than_the_finished_ones_are_joined(
    machine: Machine, last: tuple[int, int], joins: bool
) -> None:
    announce(machine)
    assert bool(sent(plan_arrives(machine, last_round=last))) is joins


def test_a_replayed_announcement_does_not_end_the_current_round(machine: Machine) -> None:
    before = machine.put(Sharing)
    announce(machine, payload=b"older", round=2)
    assert sent(plan_arrives(machine)) == []
    assert machine.participation.state is before


def test_an_announcement_older_than_the_newest_heard_is_a_replay(machine: Machine) -> None:
    announce(machine)
    with pytest.raises(Replayed):
        announce(machine, payload=b"older", round=2)
    with pytest.raises(Replayed):
        announce(machine, payload=b"older attempt", attempt=0)
    assert any(isinstance(effect, CheckIn) for effect in sent(plan_arrives(machine))), "the newest is still decided on"
    assert announce(machine) == []


def test_a_coordinator_that_lost_its_journal_is_heard_again(machine: Machine) -> None:
    announce(machine)
    again = machine.receive(machine.announcement(now_ms=NOW + 1), payload=b"from the start", round=1, attempt=0)
    assert any(isinstance(effect, FetchPlan) for effect in again)


def warnings(effects: list[Any]) -> list[str]:
    return [effect.text for effect in effects if isinstance(effect, Log) and effect.warning]


def follow(machine: Machine, previous: bytes, *, payload: bytes = b"f", **position: int) -> list[str]:
    """Announce what says that `previous` came before it; return the warnings."""
    message = msgspec.structs.replace(machine.announcement(now_ms=NOW + 1), previous=previous)
    return warnings(machine.receive(message, payload=payload, **position))


@pytest.mark.parametrize(
    ("position", "committed", "forks"),
    [
        ({"round": 3, "attempt": 2}, False, True),
        ({"round": 4, "attempt": 0}, True, True),
        ({"round": 4, "attempt": 0}, False, False),  # Attempts that this device has not heard of may lie between.
        ({"round": 9, "attempt": 0}, True, False),
    ],
)
def test_a_fork_in_the_chain_of_announcements_is_told_to_the_owner(
    machine: Machine, position: dict[str, int], committed: bool, forks: bool
) -> None:
    announce(machine)
    machine.receive(Outcome(b"", digest_of(b"e"), committed, "", (), machine.state_ref, NOW))
    assert bool(follow(machine, b"x" * 32, **position)) is forks


def test_a_chain_that_holds_is_no_fork_and_two_announcements_of_one_round_are(machine: Machine) -> None:
    announce(machine)
    assert follow(machine, digest_of(b"e"), round=3, attempt=2) == []
    (warning,) = follow(machine, digest_of(b"e"), payload=b"another", round=3, attempt=2)
    assert "a fork" in warning
    assert "round 3, attempt 2" in warning


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


def test_a_newer_announcement_ends_the_current_round(machine: Machine) -> None:
    before = machine.put(Uploading)
    announce(machine, payload=b"newer", round=4, attempt=0)
    effects = plan_arrives(machine)
    assert before.session.aborted
    assert Settle(SESSION, "unknown") in effects
    assert isinstance(machine.participation.state, CheckedIn)


def test_the_same_announcement_is_answered_once(machine: Machine) -> None:
    announce(machine)
    plan_arrives(machine)
    assert not [e for e in announce(machine) if isinstance(e, FetchPlan)]


@pytest.mark.parametrize(
    ("facts", "code"), [({"examples": 0}, "bad_examples"), ({"releases": 2}, "policy")], ids=["examples", "releases"]
)
def test_what_is_known_in_advance_withdraws_at_once(machine: Machine, facts: dict[str, int], code: str) -> None:
    announce(machine)
    assert sent(plan_arrives(machine, **facts)) == [
        Withdraw(code, machine.participation.device.identity.certificate.der)
    ]
    assert isinstance(machine.participation.state, Watching)


def published_outcome(machine: Machine) -> list[Any]:
    outcome = machine.message(Outcome)
    changed = msgspec.structs.replace(outcome, announcement=digest_of(b"e"), committed=True, reason="")
    return machine.receive(changed)


@pytest.mark.parametrize(("rule", "follows"), [("participation", True), ("minimum_vocabulary", False)])
def test_a_device_that_is_asked_too_early_still_gets_what_is_published(
    machine: Machine, rule: str, follows: bool
) -> None:
    once = msgspec.structs.replace(machine.plan.privacy, participation=ParticipationTerms(once=True), threshold=3)
    held = Aggregation(name="held", tensors=("int32[2]",), encoding=Counted(maximum=1))
    words = Extraction(
        extractor="text.words/1", column="text", vocabularies=(("a",) if rule != "participation" else ("a", "b"),)
    )
    plan = msgspec.structs.replace(machine.plan, privacy=once, publish=True, extraction=words, aggregations=(held,))
    announce(machine, plan=plan)
    effects = plan_arrives(machine, plan, last_release=(2, NOW / 1000 - 100))
    assert [message.code for message in sent(effects)] == ["policy"]
    assert any(isinstance(effect, Log) and rule in effect.text for effect in effects)
    kept = [effect for effect in published_outcome(machine) if isinstance(effect, KeepPublished)]
    assert [effect.plan for effect in kept] == ([plan.digest] if follows else [])


def test_a_plan_of_another_fleet_is_refused(machine: Machine) -> None:
    foreign = type(machine.plan)(
        **{f: getattr(machine.plan, f) for f in machine.plan.__struct_fields__} | {"fleet": "x"}
    )
    announce(machine, plan=foreign)
    assert sent(plan_arrives(machine, foreign)) == [
        Withdraw("policy", machine.participation.device.identity.certificate.der)
    ]


def test_a_plan_that_is_none_is_refused(machine: Machine) -> None:
    announcement = machine.announcement()
    broken = type(announcement)(
        **{f: getattr(announcement, f) for f in announcement.__struct_fields__} | {"plan": blob_ref(b"junk")}
    )
    machine.receive(broken, payload=b"e")
    facts = LocalFacts(None, 0, 0)
    assert sent(machine.participation.report(PlanFetched(b"junk", facts), NOW)) == [
        Withdraw("bad_plan", machine.participation.device.identity.certificate.der)
    ]


def test_a_stopped_device_goes_on_with_its_route(machine: Machine) -> None:
    entry = Entry(digest_of(b"e"), "coordinator", "digits", machine.plan.program.digest, 3, 1, "r7")
    machine.participation = Participation(machine.participation.device, entry=entry)
    announce(machine)
    assert sent(plan_arrives(machine)) == []
    assert isinstance(machine.participation.state, Fetching)
    assert machine.participation.state.round.entry.route == "r7"


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


# --- resending --------------------------------------------------------------------------------------------------------


def test_a_question_is_repeated_until_it_is_answered(machine: Machine) -> None:
    participation = machine.participation
    announce(machine)
    (check_in,) = sent(plan_arrives(machine))
    now, waits = NOW, []
    for _ in range(6):
        due = participation.next_wakeup_ms()
        assert due is not None
        assert participation.tick(due - 1) == []
        waits.append(due - now)
        now = due
        assert sent(participation.tick(now)) == [check_in]
    # Entropy is all zeros here, which is the shortest jitter: 80 %.
    assert waits == [4_000, 8_000, 16_000, 24_000, 24_000, 24_000]
    machine.participation.receive(machine.opened(Selected("r7", NOW)), now)
    assert not isinstance(participation.state, CheckedIn)
    assert sent(participation.tick(now + 40_000)) == []


def test_a_reconnect_repeats_at_once(machine: Machine) -> None:
    announce(machine)
    question = sent(plan_arrives(machine))
    assert sent(machine.participation.connected(NOW + 10)) == question


def test_chunks_in_flight_are_forgotten_when_masked_input_is_repeated(machine: Machine) -> None:
    machine.put(Uploading)
    first = machine.receive(UploadSlot(bytes(2), False))
    assert [effect.index for effect in first] == [0, 1]
    assert machine.receive(UploadSlot(bytes(2), False)) == []
    third = machine.receive(UploadSlot(bytes([0b1, 0]), False))
    assert [effect.index for effect in third] == [2]
    machine.participation._due = machine.participation._schedule(
        machine.open_round(session=SESSION).send(Ready(True)), 5_000, NOW
    )
    machine.participation.connected(NOW)
    again = machine.receive(UploadSlot(bytes([0b1, 0]), False))
    assert [effect.index for effect in again] == [1, 2]


def test_a_silent_round_is_given_up(machine: Machine) -> None:
    announce(machine)
    plan_arrives(machine)
    closes = NOW + 90_000 + GRACE_MS
    machine.participation.tick(closes - 1)
    assert isinstance(machine.participation.state, CheckedIn)
    machine.participation.tick(closes)
    assert isinstance(machine.participation.state, Watching)
    assert machine.participation.next_wakeup_ms() is None


def test_the_coordinators_time_is_never_before_what_it_signed(machine: Machine) -> None:
    in_1970 = 12_345
    machine.participation.receive(machine.opened(machine.announcement(), payload=b"e"), in_1970)
    assert machine.participation.coordinator_ms(in_1970 + 500) == NOW + 500


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
