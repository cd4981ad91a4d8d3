"""Announced rounds: which are joined, and which are replays, forks, or refused before anything runs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from participation_machine import NOW, SESSION, Machine, announce, plan_arrives, sent

from edge_agent.effects import Entry, FetchPlan, KeepPublished, LocalFacts, Log, PlanFetched, Settle
from edge_agent.participation import Participation
from edge_agent.states import CheckedIn, Fetching, Sharing, Uploading, Watching
from sottovoce.blobs import blob_ref, digest_of
from sottovoce.errors import Replayed
from sottovoce.plan import Aggregation, Counted, Extraction, ParticipationTerms
from sottovoce.wire.messages import CheckIn, Outcome, Withdraw


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
