"""Whole rounds in memory: the real machine, real secure aggregation, scripted devices, a clock the test moves."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.phases import (
    Abandoned,
    CohortSelected,
    Committed,
    Configuration,
    DevicesDropped,
    DeviceWithdrew,
    RendezvousOpened,
    Reporting,
    Selection,
    Send,
    StageOpened,
)
from coordinator.round import ADVANCES, STEPS
from sottovoce.errors import ConflictingMessage, MalformedMessage, Replayed, UnexpectedMessage
from sottovoce.plan import LaneName, Quantised
from sottovoce.wire.chunks import VectorChunk
from sottovoce.wire.messages import (
    DEVICE_MESSAGES,
    AdvertiseKeys,
    AdvertiseKeysRequest,
    CheckIn,
    MaskedInput,
    MaskedInputRequest,
    Message,
    NotSelected,
    Ready,
    Roster,
    RoundOver,
    Selected,
    ShareKeys,
    Status,
    SurvivorsRequest,
    SurvivorsSignature,
    TaggedVector,
    Unmasking,
    UnmaskingRequest,
    UploadSlot,
    Withdraw,
)

MakeBench = Callable[..., Any]
DOCUMENT = Path(__file__).parents[2] / "docs" / "coordinator.md"


def _expected_mean(bench: Any, survivors: list[str]) -> np.ndarray[Any, Any]:
    devices = [bench.devices[name] for name in survivors]
    weights = np.array([min(device.weight, 10) for device in devices], np.float64)
    return (
        sum(w * d.values["delta"][0].astype(np.float64) for w, d in zip(weights, devices, strict=True)) / weights.sum()
    )


def test_a_round_ends_with_the_weighted_mean_of_everybody(bench: MakeBench) -> None:
    b = bench(6)
    for number, device in enumerate(b.devices.values()):
        device.weight = 2 * number + 1
    b.check_in()
    assert b.committed.survivors == frozenset(b.devices)
    assert b.committed.aggregate.weight == 1 + 3 + 5 + 7 + 9 + 10
    mean = b.committed.aggregate.mean("delta")[0]
    np.testing.assert_allclose(mean, _expected_mean(b, sorted(b.devices)), atol=2e-4)
    assert b.committed.aggregate.sums["correct"][0][0] == 1 + 2 + 3 + 4 + 5 + 6
    assert b.committed.dropped == {}
    assert b.refused == []
    kinds = [type(effect) for effect in b.effects if not isinstance(effect, Send)]
    assert kinds == [CohortSelected, RendezvousOpened, *[StageOpened] * 5, Committed]
    stages = [effect.stage for effect in b.effects if isinstance(effect, StageOpened)]
    assert stages == ["advertise_keys", "share_keys", "masked_input", "consistency_check", "unmasking"]


@pytest.mark.parametrize(("lane", "bits"), [("uint16", 13), ("3x21", 18), ("dense", 16)])
def test_a_round_has_the_same_end_in_every_lane(bench: MakeBench, lane: LaneName, bits: int) -> None:
    plan = bench(6).plan
    delta, correct = plan.aggregations
    delta = replace(delta, lane=lane, encoding=Quantised(half_range=1.0, bits=bits))
    b = bench(6, plan=replace(plan, aggregations=(delta, correct)))
    b.check_in()
    assert b.committed.survivors == frozenset(b.devices)
    mean = b.committed.aggregate.mean("delta")[0]
    weight = sum(min(device.weight, 10) for device in b.devices.values())
    np.testing.assert_allclose(mean, _expected_mean(b, sorted(b.devices)), atol=2 / (2**bits - 1) * 6 * 10 / weight)
    assert b.committed.aggregate.sums["correct"][0][0] == 1 + 2 + 3 + 4 + 5 + 6


def test_curious_mode_has_no_consistency_check(bench: MakeBench) -> None:
    b = bench(4, mode="curious")
    b.check_in()
    assert len(b.committed.survivors) == 4
    assert b.sent(SurvivorsRequest) == []


# --- the machine ------------------------------------------------------------------------------------------------------

_PHASES = ("selection", "configuration", "reporting", "committed", "abandoned")
_PHASE_TYPES = {
    "selection": Selection,
    "configuration": Configuration,
    "reporting": Reporting,
    "committed": Committed,
    "abandoned": Abandoned,
}

_PHASE_NAMES = {phase.__name__ for phase in _PHASE_TYPES.values()}


def _bench_in(bench: MakeBench, phase: str) -> Any:
    b = bench(4)
    if phase == "selection":
        return b
    for device in b.devices.values():
        device.silent_at = {"configuration": Selected, "reporting": AdvertiseKeysRequest}.get(phase)
    b.check_in()
    if phase == "abandoned":
        return _abandon(bench(4))
    assert type(b.round.phase) is _PHASE_TYPES[phase]
    return b


def _abandon(b: Any) -> Any:
    b.perform(b.round.abandon("test"))
    return b


def _message(b: Any, kind: type[Message]) -> Message:
    device = b.devices["pi-00"]
    blank = bytes(32)
    certificate = device.identity.certificate.der
    examples: dict[type[Message], Message] = {
        Status: Status(online=True, version="1"),
        CheckIn: device.check_in(),
        Ready: Ready(present=True),
        Withdraw: Withdraw(code="policy"),
        AdvertiseKeys: AdvertiseKeys(certificate, blank, blank, blank, blank, blank, blank),
        ShareKeys: ShareKeys(blank, b""),
        MaskedInput: MaskedInput(vector=TaggedVector(size=8, chunk_bytes=8, tags=bytes(16))),
        SurvivorsSignature: SurvivorsSignature(blank),
        Unmasking: Unmasking(b""),
    }
    return examples[kind]


@pytest.mark.parametrize(("phase", "kind"), list(itertools.product(_PHASES, DEVICE_MESSAGES)))
def test_what_is_not_in_the_table_is_refused_and_changes_nothing(
    bench: MakeBench, phase: str, kind: type[Message]
) -> None:
    b = _bench_in(bench, phase)
    before = b.round.phase
    if (_PHASE_TYPES[phase], kind) in STEPS:
        return
    with pytest.raises(UnexpectedMessage):
        b.round.receive(b.opened("pi-00", _message(b, kind)), b.now_ms)
    assert b.round.phase is before


def test_the_table_covers_every_phase_and_every_running_phase_can_move_on() -> None:
    assert {phase for phase, _ in STEPS} == set(_PHASE_TYPES.values())
    assert set(ADVANCES) == {Selection, Configuration, Reporting}


def test_the_table_in_the_documentation_is_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    documented = {phase: set(re.findall(r"\w+", names)) for phase, names in rows if phase in _PHASE_NAMES}
    assert documented == {
        phase.__name__: {kind.__name__ for each, kind in STEPS if each is phase} for phase in _PHASE_TYPES.values()
    }


def test_chunks_are_refused_outside_a_rendezvous(bench: MakeBench) -> None:
    for phase in ("selection", "configuration", "committed", "abandoned"):
        b = _bench_in(bench, phase)
        with pytest.raises(UnexpectedMessage):
            b.round.receive_chunk("pi-00", VectorChunk(bytes(32), 0, b"x"), b.now_ms)


# --- selection --------------------------------------------------------------------------------------------------------


def _quiet(b: Any) -> Any:
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
    assert set(b.round.phase.checked_in) == {"pi-00", "pi-01", "pi-02"}


def test_nobody_fills_the_events_by_checking_in_and_withdrawing(bench: MakeBench) -> None:
    b = _quiet(bench(5))
    for _ in range(50):
        b.check_in(["pi-00"])
        b.say("pi-00", Withdraw(code="policy"))
    assert len([effect for effect in b.effects if isinstance(effect, DeviceWithdrew)]) == 4
    assert b.refused == ["conflicting"] * 46
    assert b.round.phase.withdrawn == {"pi-00"}


@pytest.mark.parametrize("code", ["", "x" * 65, "two words", "policy\nERROR a line that nobody wrote", "Ü"])
def test_a_withdrawal_gives_a_short_code_or_is_refused(bench: MakeBench, code: str) -> None:
    b = _quiet(bench(4))
    b.check_in(["pi-00"])
    with pytest.raises(MalformedMessage):
        b.round.receive(b.opened("pi-00", Withdraw(code=code)), b.now_ms)
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


# --- dropouts in every stage ------------------------------------------------------------------------------------------

_STAGES = {
    "advertise_keys": AdvertiseKeysRequest,
    "share_keys": Roster,
    "masked_input": MaskedInputRequest,
    "consistency_check": SurvivorsRequest,
    "unmasking": UnmaskingRequest,
}


@pytest.mark.parametrize("noticed", ["by its last will", "at the deadline"])
@pytest.mark.parametrize("stage", _STAGES)
def test_one_device_lost_in_a_stage_does_not_stop_the_round(bench: MakeBench, stage: str, noticed: str) -> None:
    b = bench(7)
    b.devices["pi-06"].silent_at = _STAGES[stage]
    b.check_in()
    assert isinstance(b.round.phase, Reporting)
    assert b.round.phase.stage == stage
    if noticed == "by its last will":
        b.offline("pi-06")
        b.wait(999)
        assert isinstance(b.round.phase, Reporting)
        assert b.round.phase.stage == stage
        b.wait(1)
    else:
        b.wait(10_000)
    in_the_sum = stage in ("consistency_check", "unmasking")
    survivors = set(b.devices) if in_the_sum else set(b.devices) - {"pi-06"}
    assert b.committed.survivors == survivors
    assert b.committed.dropped == {stage: ("pi-06",)}
    mean = b.committed.aggregate.mean("delta")[0]
    np.testing.assert_allclose(mean, _expected_mean(b, sorted(survivors)), atol=2e-4)


@pytest.mark.parametrize("stage", _STAGES)
def test_too_many_lost_in_a_stage_abandon_the_round_and_nobody_is_unmasked(bench: MakeBench, stage: str) -> None:
    b = bench(7, minimum=6)
    for device in ("pi-03", "pi-04", "pi-05", "pi-06"):
        b.devices[device].silent_at = _STAGES[stage]
    b.check_in()
    for device in ("pi-03", "pi-04", "pi-05", "pi-06"):
        b.offline(device)
    b.wait(9_999)
    assert isinstance(b.round.phase, Reporting), "everybody seems gone: the stage waits for its deadline"
    b.wait(1)
    assert b.abandoned.dropped[stage] == ("pi-03", "pi-04", "pi-05", "pi-06")
    assert b.round.next_deadline_ms(b.now_ms) is None


def test_a_device_that_withdraws_in_the_rendezvous_is_not_waited_for(bench: MakeBench) -> None:
    b = bench(6)
    b.devices["pi-05"].silent_at = MaskedInputRequest
    b.check_in()
    b.say("pi-05", Withdraw(code="policy"))
    assert b.committed.dropped == {"masked_input": ("pi-05",)}


# --- repeats, strangers, nonsense -------------------------------------------------------------------------------------


def test_every_message_said_twice_changes_nothing(bench: MakeBench) -> None:
    b = bench(5)
    b.devices["pi-04"].silent_at = UnmaskingRequest
    b.check_in()
    phase = b.round.phase
    assert isinstance(phase, Reporting)
    for device in b.devices.values():
        for message, session in list(device.said):
            heard = len(device.heard)
            b.say(device.name, message, session)
            assert len(device.heard) <= heard + 1
    assert b.round.phase is phase
    assert b.refused == []
    b.wait(10_000)
    assert b.committed.survivors == frozenset(b.devices)


def test_a_lost_answer_is_repeated_when_the_device_asks_again(bench: MakeBench) -> None:
    b = bench(5)
    b.devices["pi-04"].silent_at = Roster
    b.check_in()
    device = b.devices["pi-04"]
    lost = device.heard[-1]
    device.dead, device.silent_at = False, None
    message, session = device.said[-1]
    assert isinstance(message, AdvertiseKeys)
    b.say("pi-04", message, session)
    assert device.heard.count(lost) == 2
    assert b.committed.survivors == frozenset(b.devices)


def test_a_second_different_advertisement_is_refused(bench: MakeBench) -> None:
    b = bench(5)
    b.devices["pi-04"].silent_at = AdvertiseKeysRequest
    b.check_in()
    message, _ = b.devices["pi-00"].said[-1]
    assert isinstance(message, AdvertiseKeys)
    changed = AdvertiseKeys(*(getattr(message, name) for name in message.__struct_fields__[:-1]), b"n" * 32)
    b.say("pi-00", changed)
    assert b.refused == ["conflicting"]
    b.wait(10_000)
    assert "pi-00" in b.committed.survivors


def test_wrong_chunks_are_refused_and_the_right_ones_still_count(bench: MakeBench) -> None:
    b = bench(5)
    b.devices["pi-04"].silent_at = UploadSlot
    b.check_in()
    phase, device = b.round.phase, b.devices["pi-04"]
    assert isinstance(phase, Reporting)
    assert device.session is not None
    session = phase.session.session_id
    b.say("pi-04", VectorChunk(b"x" * 32, 0, b"y"))
    b.say("pi-04", VectorChunk(session, 0, bytes(64)))
    b.say("pi-04", VectorChunk(session, 10_000, bytes(64)))
    assert b.refused == ["foreign_session", "bad_blob", "bad_blob"]
    device.dead, device.silent_at = False, None
    b.say("pi-04", device.said[-1][0], session)
    assert b.committed.survivors == frozenset(b.devices)


def test_a_device_that_knows_nothing_of_the_end_is_told_once(bench: MakeBench) -> None:
    b = bench(4)
    b.check_in()
    message, session = b.devices["pi-00"].said[-1]
    b.say("pi-00", message, session)
    b.say("pi-00", message, session)
    assert b.sent(RoundOver) == ["pi-00"]


def test_more_devices_than_slots_upload_one_after_the_other(bench: MakeBench) -> None:
    b = bench(6, slots=1)
    b.check_in()
    assert b.committed.survivors == frozenset(b.devices)
    finished = [
        effect.device for effect in b.effects
        if isinstance(effect, Send) and isinstance(effect.message, UploadSlot) and effect.message.complete
    ]  # fmt: skip
    assert sorted(finished) == sorted(b.devices)
    assert len(set(finished)) == 6


def test_a_slot_that_stands_still_goes_to_the_next(bench: MakeBench) -> None:
    b = bench(6, slots=1, slot_idle_ms=2000)
    b.devices["pi-00"].silent_at = UploadSlot
    b.check_in()
    assert isinstance(b.round.phase, Reporting)
    assert b.round.phase.stage == "masked_input"
    assert b.round.next_deadline_ms(b.now_ms) == b.now_ms + 2000
    b.say("pi-01", VectorChunk(b.round.phase.session.session_id, 0, b"no slot yet"))
    assert b.refused == ["no_slot"]
    b.wait(2000)
    assert b.round.phase.session.waiting_for() == {"pi-00"}
    b.wait(8000)
    assert b.committed.dropped == {"masked_input": ("pi-00",)}


def test_a_round_can_be_abandoned_from_outside_at_any_time(bench: MakeBench) -> None:
    for phase in ("selection", "configuration", "reporting"):
        b = _abandon(_bench_in(bench, phase))
        assert b.abandoned.reason == "test"
        assert b.round.abandon("again") == []


def test_every_deadline_is_in_the_future_and_the_round_ends_by_the_announced_time(bench: MakeBench) -> None:
    b = bench(6)
    b.devices["pi-05"].silent_at = MaskedInputRequest
    b.devices["pi-04"].silent_at = UnmaskingRequest
    b.devices["pi-03"].silent_at = Selected
    b.check_in()
    for _ in range(30):
        deadline = b.round.next_deadline_ms(b.now_ms)
        if deadline is None:
            break
        assert deadline > b.now_ms
        b.wait(deadline - b.now_ms)
    assert b.round.over
    assert b.now_ms <= b.terms.rendezvous_closes_ms
