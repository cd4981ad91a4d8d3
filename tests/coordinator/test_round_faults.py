"""A rendezvous that goes wrong: devices lost in every stage, repeats, strangers, nonsense, and uploads that stall."""

from __future__ import annotations

import numpy as np
import pytest
from round_bench import MakeBench

from coordinator.phases import Reporting, Send
from sottovoce.wire.chunks import VectorChunk
from sottovoce.wire.messages import (
    AdvertiseKeys,
    AdvertiseKeysRequest,
    MaskedInputRequest,
    Roster,
    RoundOver,
    Selected,
    SurvivorsRequest,
    UnmaskingRequest,
    UploadSlot,
    Withdraw,
)

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
    np.testing.assert_allclose(mean, b.expected_mean(sorted(survivors)), atol=2e-4)


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
