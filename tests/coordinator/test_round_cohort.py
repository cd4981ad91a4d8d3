"""From check-in to rendezvous: who is selected, who is waited for, and when there are too few."""

from __future__ import annotations

from typing import Any

import pytest
from round_bench import Bench, MakeBench

from coordinator.phases import Configuration, DevicesDropped, DeviceWithdrew, Reporting, Selection
from sottovoce.errors import ConflictingMessage, MalformedMessage, Replayed
from sottovoce.wire.messages import (
    AdvertiseKeys,
    AdvertiseKeysRequest,
    CheckIn,
    NotSelected,
    Ready,
    Roster,
    Selected,
    Withdraw,
)

# --- selection --------------------------------------------------------------------------------------------------------


def _quiet(b: Bench) -> Bench:
    """Devices that check in and then do nothing."""
    for device in b.devices.values():
        device.silent_at = Selected
    return b


def test_selection_waits_for_everybody_who_is_online_until_its_deadline(bench: MakeBench) -> None:
    b = _quiet(bench(6))
    b.check_in(list(b.devices)[:5])
    b.wait(59_999)
    assert isinstance(b.round.phase, Selection)
    b.wait(1)
    assert isinstance(b.round.phase, Configuration)
    assert len(b.round.cohort) == 5


def test_selection_closes_early_when_all_have_answered_and_nobody_new_comes(bench: MakeBench) -> None:
    b = _quiet(bench(6))
    b.check_in(list(b.devices)[:4])
    b.say("pi-04", Withdraw(code="policy"))
    b.offline("pi-05")
    assert isinstance(b.round.phase, Selection)
    assert b.round.next_deadline_ms(b.now_ms) == b.now_ms + 1000
    b.wait(1000)
    assert b.round.cohort == {"pi-00", "pi-01", "pi-02", "pi-03"}


def test_too_few_check_ins_abandon_the_round_at_the_deadline(bench: MakeBench) -> None:
    b = _quiet(bench(6))
    b.check_in(["pi-00", "pi-01"])
    b.wait(60_000)
    assert b.abandoned.reason == "too_few_checked_in"
    assert b.sent(Selected) == []


def test_a_full_cohort_is_drawn_from_all_who_came_within_a_moment(bench: MakeBench) -> None:
    b = _quiet(bench(8, goal=4, wanted=4, minimum=3))
    b.check_in(list(b.devices)[:7])
    assert isinstance(b.round.phase, Selection)
    b.wait(1000)
    assert len(b.round.cohort) == 4
    assert set(b.sent(Selected)) == b.round.cohort
    assert set(b.sent(NotSelected)) == set(list(b.devices)[:7]) - b.round.cohort
    b.say("pi-07", b.devices["pi-07"].check_in())
    assert b.sent(NotSelected)[-1] == "pi-07"


def test_a_repeated_check_in_gets_the_same_answer(bench: MakeBench) -> None:
    b = _quiet(bench(4))
    b.check_in()
    first = b.devices["pi-00"].heard[-1]
    b.say("pi-00", b.devices["pi-00"].check_in())
    assert b.devices["pi-00"].heard[-1] == first
    assert isinstance(first, Selected)


def test_a_second_different_check_in_is_refused(bench: MakeBench) -> None:
    b = bench(6)
    b.check_in(["pi-00"])
    other = CheckIn(b.devices["pi-00"].identity.certificate.der, b.agenda.announcement, fast_aes=False)
    with pytest.raises(ConflictingMessage):
        b.round.receive(b.opened("pi-00", other), b.now_ms)


def test_who_withdraws_may_check_in_again_while_selection_lasts(bench: MakeBench) -> None:
    b = _quiet(bench(4))
    b.check_in(["pi-00", "pi-01", "pi-02"])
    b.say("pi-00", Withdraw(code="policy"))
    b.check_in(["pi-00"])
    assert isinstance(b.round.phase, Selection)
    assert set(b.round.phase.checked_in) == {"pi-00", "pi-01", "pi-02"}


def test_nobody_fills_the_events_by_checking_in_and_withdrawing(bench: MakeBench) -> None:
    b = _quiet(bench(5))
    for _ in range(50):
        b.check_in(["pi-00"])
        b.say("pi-00", Withdraw(code="policy"))
    assert len([effect for effect in b.effects if isinstance(effect, DeviceWithdrew)]) == 4
    assert b.refused == ["conflicting"] * 46
    assert isinstance(b.round.phase, Selection)
    assert b.round.phase.withdrawn == {"pi-00"}


@pytest.mark.parametrize("code", ["", "x" * 65, "two words", "policy\nERROR a line that nobody wrote", "Ü"])
def test_a_withdrawal_gives_a_short_code_or_is_refused(bench: MakeBench, code: str) -> None:
    b = _quiet(bench(4))
    b.check_in(["pi-00"])
    with pytest.raises(MalformedMessage):
        b.round.receive(b.opened("pi-00", Withdraw(code=code)), b.now_ms)
    assert isinstance(b.round.phase, Selection)
    assert set(b.round.phase.checked_in) == {"pi-00"}


def test_a_message_repeated_at_once_gets_its_large_answer_once(bench: MakeBench) -> None:
    b = bench(5)
    for device in b.devices.values():
        device.silent_at = Roster
    b.check_in()
    (advertisement,) = [said for said, _ in b.devices["pi-00"].said if isinstance(said, AdvertiseKeys)]
    rosters = b.sent(Roster).count("pi-00")
    for _ in range(100):
        b.say("pi-00", advertisement)
    assert b.sent(Roster).count("pi-00") == rosters + 1
    b.now_ms += 1000
    b.say("pi-00", advertisement)
    assert b.sent(Roster).count("pi-00") == rosters + 2


@pytest.mark.parametrize("where", [{"round": 3}, {"attempt": 0}, {"round": 5}, {"session": b"x" * 32}])
def test_messages_of_another_round_or_session_are_replays(bench: MakeBench, where: dict[str, Any]) -> None:
    b = bench(4)
    with pytest.raises(Replayed):
        b.round.receive(b.opened("pi-00", b.devices["pi-00"].check_in(), **where), b.now_ms)
    with pytest.raises(Replayed):
        b.round.receive(b.opened("pi-00", b.devices["pi-00"].check_in(b"other" + bytes(27))), b.now_ms)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_rendezvous_waits_for_a_device_that_is_still_training_until_its_time(bench: MakeBench) -> None:
    b = bench(5)
    b.devices["pi-04"].silent_at = Selected
    b.check_in()
    assert isinstance(b.round.phase, Configuration)
    b.wait(600_000)
    assert b.committed.survivors == {"pi-00", "pi-01", "pi-02", "pi-03"}
    assert b.committed.dropped == {"training": ("pi-04",)}
    assert DevicesDropped("training", ("pi-04",)) in b.effects


def test_the_rendezvous_does_not_wait_for_who_is_gone_or_withdrew(bench: MakeBench) -> None:
    b = bench(6)
    b.devices["pi-04"].silent_at = b.devices["pi-05"].silent_at = Selected
    b.check_in()
    b.say("pi-04", Withdraw(code="bad_examples"))
    b.offline("pi-05")
    assert isinstance(b.round.phase, Configuration)
    b.wait(1000)
    assert b.committed.survivors == {"pi-00", "pi-01", "pi-02", "pi-03"}
    assert b.committed.dropped == {"training": ("pi-04", "pi-05")}


def test_a_device_that_left_until_the_rendezvous_is_waited_for(bench: MakeBench) -> None:
    b = bench(5)
    b.devices["pi-04"].present = False
    b.devices["pi-03"].silent_at = Selected
    b.check_in()
    b.offline("pi-04")
    b.say("pi-03", Ready(present=True))
    b.wait(5000)
    assert isinstance(b.round.phase, Configuration)
    b.devices["pi-03"].silent_at, b.devices["pi-03"].dead = None, False
    b.perform(b.round.device_status("pi-04", True, b.now_ms))
    b.settle()
    b.say("pi-04", Ready(present=True))
    assert b.committed.survivors >= {"pi-04"}


def test_too_few_ready_abandon_the_round(bench: MakeBench) -> None:
    b = bench(5)
    for device in list(b.devices)[2:]:
        b.devices[device].silent_at = Selected
    b.check_in()
    b.wait(600_000)
    assert b.abandoned.reason == "too_few_ready"
    assert b.abandoned.dropped == {"training": ("pi-02", "pi-03", "pi-04")}


def test_when_too_many_withdraw_the_round_ends_at_once(bench: MakeBench) -> None:
    b = _quiet(bench(4))
    b.check_in()
    b.say("pi-00", Withdraw(code="self_test_failed"))
    b.say("pi-01", Withdraw(code="self_test_failed"))
    assert b.abandoned.reason == "too_few_ready"


def test_a_stranger_cannot_be_ready(bench: MakeBench) -> None:
    b = _quiet(bench(5, goal=4, wanted=4))
    b.check_in(["pi-00", "pi-01", "pi-02", "pi-03"])
    b.wait(1000)
    b.say("pi-04", Ready(present=True))
    assert b.refused == ["not_in_cohort"]


def test_a_late_device_joins_while_keys_are_advertised_and_not_later(bench: MakeBench) -> None:
    b = bench(6, goal=4, wanted=6)
    late = b.devices["pi-04"], b.devices["pi-05"]
    for device in late:
        device.silent_at = Selected
    b.devices["pi-03"].silent_at = AdvertiseKeysRequest
    b.check_in()
    assert isinstance(b.round.phase, Reporting)
    late[0].dead, late[0].silent_at = False, None
    b.say("pi-04", Ready(present=True))
    b.wait(10_000)
    assert b.committed.survivors == {"pi-00", "pi-01", "pi-02", "pi-04"}
    assert b.committed.dropped == {"training": ("pi-05",), "advertise_keys": ("pi-03",)}
