"""While an answer is due the last message is sent again, and a round that stays silent is given up."""

from __future__ import annotations

from participation_machine import NOW, SESSION, Machine, announce, plan_arrives, sent

from edge_agent.announcements import GRACE_MS
from edge_agent.states import CheckedIn, Uploading, Watching
from sottovoce.wire.messages import Ready, Selected, UploadSlot


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
