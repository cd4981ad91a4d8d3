"""The whole coordinator over the memory broker: scripted devices, a real journal, restarts, and hostile messages."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import re
import struct
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from memory_stage import Stage
from scripted_devices import ScriptedDevice

from coordinator.journal import Journal
from coordinator.revocation import RevocationList
from sottovoce.blobs import digest_of
from sottovoce.errors import LowOrderPoint
from sottovoce.identity import SignedContext, TrustAnchor
from sottovoce.plan import Plan
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.transport.memory import MemoryTransport
from sottovoce.wire.chunks import VectorChunk
from sottovoce.wire.codec import parse, parse_body, seal
from sottovoce.wire.messages import (
    Announcement,
    MaskedInputRequest,
    RoundOver,
    Selected,
    Withdraw,
)
from sottovoce.wire.topics import Topics

pytestmark = pytest.mark.filterwarnings("error")


def test_a_task_runs_to_its_end_and_everybody_gets_the_trained_state(stage: Stage) -> None:
    stage.submit("tiny")
    stage.start()
    stage.run(30, until=stage.done)
    assert [task.status for task in stage.journal.tasks()] == ["done"]
    rounds = stage.journal.rounds()
    assert [(row.phase, row.round, row.attempt, len(row.survivors)) for row in rounds] == [
        ("committed", 1, 0, 5),
        ("committed", 2, 0, 5),
    ]
    final = stage.journal.state_at(1, 2)
    assert final is not None
    kernel = decode_tensors(final[0])["kernel"]
    np.testing.assert_allclose(kernel, np.arange(6).reshape(3, 2) + 2 * 0.125, atol=1e-3)
    assert decode_tensors(final[0])["learning_rate"] == 0.25
    for player in stage.players:
        assert [outcome.committed for outcome in player.outcomes] == [True, True]
        assert player.outcomes[-1].state.digest == digest_of(final[0])
    retained = stage.broker.retained()
    assert f"sv1/choir/all/blob/{digest_of(final[0]).hex()}/0" in retained


def test_the_events_file_tells_the_round_in_order(stage: Stage) -> None:
    stage.submit("tiny")
    stage.start()
    stage.players[4].silent_at = MaskedInputRequest
    stage.run(60, until=stage.done)
    first = [event for event in stage.events if event.get("number") == 1]
    assert [event["event"] for event in first] == [
        "announced", "selected", "rendezvous", "stage", "stage", "stage", "dropped", "abandoned", "announced",
        *(event["event"] for event in first[9:]),
    ]  # fmt: skip
    assert {"event", "time_ms", "task", "plan", "round", "attempt"} <= set(first[0])
    assert first[6]["devices"] == ["pi-04"]
    assert first[6]["stage"] == "masked_input"
    assert first[7]["reason"] == "too_few_devices"


def test_a_committed_event_has_the_accounts_of_the_round(stage: Stage) -> None:
    stage.submit("tiny")
    stage.start()
    stage.run(30, until=stage.done)
    committed = [event for event in stage.events if event["event"] == "committed"]
    assert [event["round"] for event in committed] == [0, 1]
    event = committed[0]
    assert event["cohort"] == event["survivors"] == [player.name for player in stage.players]
    assert event["weight"] == 5 * 4
    assert event["metrics"]["correct"] == 15 / 20
    assert event["bytes_up_per_device"] > 1000
    assert event["bytes_down_per_device"] > 1000
    assert committed[1]["bytes_down_per_device"] < event["bytes_down_per_device"], "plan and program are cached by now"
    assert stage.events[-1] | {"time_ms": 0} == {
        "event": "task_finished", "time_ms": 0, "task": "tiny", "plan": "tiny", "round": 2, "attempt": 0,
        "status": "done", "reason": "",
    }  # fmt: skip


def test_inputs_are_standardised_by_a_first_round_and_sums_are_released(stage: Stage) -> None:
    text = (
        (stage.folder / "tiny.toml").read_text()
        + """
[standardise]
bundle = "moments.svp"
[standardise.results.count]
maximum = 1000
[standardise.results.sum]
half_range = 1000.0
bits = 40
[standardise.results.sum_of_squares]
half_range = 1000.0
bits = 40
"""
    )
    (stage.folder / "tiny.toml").write_text(text)
    stage.submit("tiny")
    stage.submit("moments")
    stage.start()
    stage.run(60, until=stage.done)
    plans = [row.plan_name for row in stage.journal.rounds()]
    assert plans == ["tiny-moments", "tiny", "tiny", "moments"]
    kept = stage.journal.state_at(1, 3)
    assert kept is not None
    state = decode_tensors(kept[0])
    # Five devices, each with count 4, sum 8 and sum of squares 24: mean 2, variance 6 - 4.
    np.testing.assert_allclose(state["mean"], 2.0, atol=1e-6)
    np.testing.assert_allclose(state["variance"], 2.0, atol=1e-6)
    released = stage.journal.state_at(2, 1)
    assert released is not None
    assert released[1] is not None
    assert decode_tensors(released[1])["count"] == 20.0


def _final_states(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
    """What devices have and what the server has after the last round of task 1."""
    given, kept = stage.journal.state_at(1, 2), stage.journal.server_state_at(1, 2)
    assert given is not None
    assert kept is not None
    return decode_tensors(given[0]), decode_tensors(kept)


@pytest.mark.parametrize("crash", [False, True])
def test_the_moments_of_a_server_optimizer_outlive_a_crash_and_never_leave_the_server(
    stage: Stage, crash: bool
) -> None:
    text = (stage.folder / "tiny.toml").read_text()
    lines = 'learning_rate = 0.25\nserver = "adam"\nserver_learning_rate = 0.1\nserver_tau = 0.125'
    (stage.folder / "tiny.toml").write_text(text.replace("learning_rate = 0.25", lines))
    stage.submit("tiny")
    stage.start()
    if crash:
        stage.run(60, until=lambda: len(stage.journal.rounds()) > 1)
        stage.crash()
        stage.start()
    stage.run(60, until=stage.done)
    assert [task.status for task in stage.journal.tasks()] == ["done"]
    given, kept = _final_states(stage)
    assert list(given) == ["kernel", "mean", "variance", "learning_rate"]
    first, second = np.zeros(()), np.full((), 0.125**2)
    kernel = np.arange(6).reshape(3, 2).astype(np.float64)
    for _ in range(2):  # every device's update is 0.125 everywhere
        first, second = 0.9 * first + 0.1 * 0.125, 0.99 * second + 0.01 * 0.125**2
        kernel = kernel + 0.1 * first / (np.sqrt(second) + 0.125)
    np.testing.assert_allclose(given["kernel"], kernel, atol=1e-3)
    moments = {name: array for name, array in kept.items() if "moment" in name}
    assert len(moments) == 2
    np.testing.assert_allclose(next(iter(moments.values())), first, atol=1e-4)
    published = b"".join(payload for topic, payload in stage.broker.retained().items() if "/blob/" in topic)
    assert given["kernel"].tobytes() in published
    for array in moments.values():
        assert array.tobytes() not in published


def test_announcements_form_a_chain_and_only_needed_blobs_stay_at_the_broker(stage: Stage) -> None:
    stage.submit("tiny")
    stage.start()
    seen: list[tuple[bytes, bytes]] = []

    def note() -> bool:
        payload = stage.broker.retained().get("sv1/choir/all/round")
        if payload is not None and (not seen or seen[-1][1] != digest_of(payload)):
            seen.append((parse_body(parse(payload), Announcement).previous, digest_of(payload)))
        return stage.done()

    stage.run(30, until=note)
    assert [previous for previous, _ in seen] == [bytes(32), *(digest for _, digest in seen[:-1])]
    digests = {topic.split("/")[4] for topic in stage.broker.retained() if "/blob/" in topic}
    states = [stage.journal.state_at(1, position) for position in range(3)] if stage.journal else []
    assert digest_of(states[0][0]).hex() not in digests or len(digests) <= 5, "superseded states are cleared"
    assert {digest_of(kept[0]).hex() for kept in states[1:] if kept} <= digests


# --- restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash_after", range(3, 80, 9))
def test_after_a_crash_at_any_point_the_task_goes_on_from_the_last_committed_round(
    stage: Stage, crash_after: int
) -> None:
    """The coordinator dies after so many deliveries; its successor abandons what was in flight and goes on."""
    stage.submit("tiny")
    stage.start()
    assert stage.service is not None
    for _ in range(crash_after):
        stage.service.step(stage.now_ms, 0)
        for player in stage.players:
            player.step()
    stage.now_ms += 1000
    stage.crash()
    stage.start()
    stage.run(120, until=stage.done)
    assert [task.status for task in stage.journal.tasks()] == ["done"]
    rows = stage.journal.rounds()
    committed = [row for row in rows if row.phase == "committed"]
    assert [row.position for row in committed] == [0, 1]
    assert {row.reason for row in rows} <= {"", "coordinator_restarted"}
    final = stage.journal.state_at(1, 2)
    assert final is not None
    np.testing.assert_allclose(decode_tensors(final[0])["kernel"], np.arange(6).reshape(3, 2) + 0.25, atol=1e-3)
    for player in stage.players:
        assert player.announced == sorted(player.announced), "round numbers only grow"
        assert player.outcomes[-1].committed
    wanted = {digest_of(kept[0]).hex() for kept in (stage.journal.state_at(1, 1), final) if kept}
    digests = {topic.split("/")[4] for topic in stage.broker.retained() if "/blob/" in topic}
    assert wanted <= digests


def test_blobs_that_an_earlier_run_left_behind_are_cleared(stage: Stage) -> None:
    leftover = Topics("choir").blob_chunk(b"l" * 32, 0)
    stage.transport = MemoryTransport(stage.broker, "coordinator")
    stage.transport.publish(leftover, b"left behind", retain=True)
    stage.transport.close()
    stage.submit("tiny")
    stage.start()
    stage.settle()
    assert leftover not in stage.broker.retained()


def test_a_broker_that_forgot_everything_is_given_everything_again(stage: Stage) -> None:
    stage.submit("tiny")
    stage.start()
    stage.run(30, until=stage.done)
    before = {topic: payload for topic, payload in stage.broker.retained().items() if "/all/" in topic}
    stage.broker.restart(keep_state=False)
    stage.settle()
    after = {topic: payload for topic, payload in stage.broker.retained().items() if "/all/" in topic}
    assert after == before


def test_stopping_abandons_the_round_and_tells_everybody(stage: Stage) -> None:
    stage.submit("tiny")
    stage.start()
    stage.players[0].silent_at = Selected
    stage.settle()
    assert stage.service is not None
    stage.service.stop(stage.now_ms)
    assert stage.service.flushed
    assert [(row.phase, row.reason) for row in stage.journal.rounds()] == [("abandoned", "coordinator_stopped")]
    while any(player.step() for player in stage.players):
        pass
    assert [outcome.reason for outcome in stage.players[1].outcomes] == ["coordinator_stopped"]


def test_a_cancelled_task_ends_its_round(stage: Stage) -> None:
    stage.submit("tiny")
    stage.start()
    stage.players[0].silent_at = Selected
    stage.settle()
    stage.journal.end_task(1, "cancelled")
    stage.run(3)
    assert [row.reason for row in stage.journal.rounds()] == ["cancelled"]


def test_a_task_whose_bundle_is_damaged_fails_with_its_reason_and_the_next_one_runs(stage: Stage) -> None:
    stage.submit("tiny")
    with Journal(stage.folder / "journal.sqlite") as journal:
        journal._db.execute("UPDATE blobs SET content = x'00'")
    stage.submit("moments")
    stage.start()
    stage.run(60, until=stage.done)
    first, second = stage.journal.tasks()
    assert (first.status, second.status) == ("failed", "done")
    assert "bundle" in first.reason


def test_a_state_that_another_release_wrote_fails_its_task_and_not_the_coordinator(stage: Stage) -> None:
    stage.submit("tiny")
    with Journal(stage.folder / "journal.sqlite") as journal:
        journal.begin_task(1, state=encode_tensors({"kernel": np.zeros((3, 2), np.float32)}), broadcast=b"")
    stage.submit("moments")
    stage.start()
    stage.run(60, until=stage.done)
    first, second = stage.journal.tasks()
    assert (first.status, second.status) == ("failed", "done")
    assert "another release's" in first.reason


# --- what others do wrong ---------------------------------------------------------------------------------------------


def test_hostile_messages_are_counted_and_the_round_goes_on(stage: Stage, choir: Any) -> None:
    stage.submit("tiny")
    stage.start()
    stage.players[4].silent_at = Selected
    stage.settle()
    hostile = stage.players[4]
    topics, publish = hostile.topics, hostile.transport.publish
    generator = random.Random(7)
    for size in range(0, 4000, 97):
        publish(topics.up_message(hostile.name), generator.randbytes(size))
        publish(topics.up_chunk(hostile.name, "1"), generator.randbytes(size))
        publish(topics.status(hostile.name), generator.randbytes(size + 1))
    valid = seal(Withdraw(code="x"), hostile.identity, SignedContext(hostile.name, "coordinator", "choir", 1, 0))
    for at in range(0, len(valid), 3):
        publish(topics.up_message(hostile.name), valid[:at] + bytes([valid[at] ^ 0xFF]) + valid[at + 1 :])
    hostile.say(hostile.device.check_in(), round=77)
    hostile.say(hostile.device.check_in(b"o" * 32))
    hostile.say(VectorChunk(b"s" * 32, 0, b"x"))
    hostile.say_status(online=False)
    stage.run(30, until=stage.done)
    stage.now_ms += 2000
    stage.settle()
    refusals = stage.journal.refusals()
    assert {"malformed", "bad_signature", "replayed", "unexpected"} <= set(refusals)
    assert "internal_error" not in refusals
    assert stage.journal.rounds()[0].phase == "committed"
    assert stage.journal.rounds()[0].dropped == {"training": ["pi-04"]}


@pytest.mark.parametrize(
    ("bug", "times"),
    [(ZeroDivisionError, 1), (LowOrderPoint, 2)],  # What looks like a bad message is first blamed on one.
)
def test_a_bug_costs_the_round_and_not_the_coordinator(
    stage: Stage, caplog: pytest.LogCaptureFixture, bug: type[Exception], times: int
) -> None:
    broken = [True] * times

    def entropy(count: int) -> bytes:
        if broken.pop() if broken else False:
            raise bug("a bug")
        return bytes(count)

    stage.submit("tiny")
    stage.start(entropy=entropy)
    stage.run(60, until=stage.done)
    assert [row.reason for row in stage.journal.rounds()] == ["internal_error", "", ""]
    assert bug.__name__ in caplog.text


def test_logging_is_bounded_however_many_messages_are_refused(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.start()
    for _ in range(500):
        stage.players[0].transport.publish(stage.players[0].topics.up_message("pi-00"), b"nonsense")
    with caplog.at_level(logging.WARNING, logger="coordinator"):
        stage.settle()
    assert len([record for record in caplog.records if "refused" in record.message]) == 1


def test_who_speaks_of_an_old_round_is_told_once_that_it_is_over(stage: Stage) -> None:
    stage.submit("tiny")
    stage.start()
    stage.run(30, until=stage.done)
    player = stage.players[0]
    player.device.heard.clear()
    for _ in range(3):
        player.say(Withdraw(code="late"))
    stage.settle()
    assert player.device.heard == [RoundOver(reason="over")]


def test_a_broker_that_loses_repeats_and_reorders_does_not_stop_the_task(stage: Stage) -> None:
    stage.broker.faults = type(stage.broker.faults)(loss=0.2, duplicate=0.2, reorder=0.2)
    stage.submit("tiny")
    stage.start()
    stage.run(300, until=stage.done)
    assert [task.status for task in stage.journal.tasks()] == ["done"]


# --- nothing individual is kept ---------------------------------------------------------------------------------------


PATTERN = np.array([[0.111, -0.222], [0.333, -0.444], [0.0555, -0.0666]], np.float32)


def _everything_reachable(root: object) -> list[object]:
    """Every object that `root` leads to; the broker in this process is no part of the coordinator."""
    seen: dict[int, object] = {}
    stack = [root]
    while stack:
        each = stack.pop()
        if id(each) in seen or isinstance(each, type | ModuleType | MemoryTransport):
            continue
        seen[id(each)] = each
        stack += gc.get_referents(each)
    return list(seen.values())


def test_nothing_of_a_single_device_is_left_after_the_rounds(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """One device's update is a pattern; afterwards it is looked for plain, quantised and masked, everywhere."""
    masked: list[bytes] = []
    player = stage.players[2]
    original = player.scripted

    def with_pattern(plan: Plan, digest: bytes) -> ScriptedDevice:
        device = original(plan, digest)
        device.values["delta"] = [PATTERN]
        return device

    def note_what_is_uploaded() -> bool:
        session = player.device.session if player.device is not None else None
        if session is not None and session.masked_vector is not None:
            masked.append(bytes(session.masked_vector))
        return False

    player.scripted, player.note = with_pattern, note_what_is_uploaded
    stage.submit("tiny")
    stage.start()
    with caplog.at_level(logging.DEBUG):
        stage.run(30, until=stage.done)
    assert masked, "the device did upload a masked vector"
    needles = {PATTERN.tobytes(), PATTERN.astype(np.float64).tobytes()}
    needles |= {vector[start : start + 16] for vector in masked for start in (0, 4, 8)}
    exact = [(float(x) * 0.4 + 1.0) * 65535 / 2 for x in PATTERN.ravel()]
    needles |= {
        struct.pack("<3I", *rounded) for rounded in itertools.product(*((int(x), int(x) + 1) for x in exact[:3]))
    }
    reachable = _everything_reachable(stage.service)
    haystacks = [path.read_bytes() for path in stage.folder.iterdir() if path.is_file()]
    haystacks += [bytes(each) for each in reachable if isinstance(each, bytes | bytearray | memoryview)]
    haystacks += [each.tobytes() for each in reachable if isinstance(each, np.ndarray)]
    assert len(haystacks) > 30, "there is something to look through"
    assert not [
        needle for needle in needles if any(needle in haystack for haystack in [*haystacks, caplog.text.encode()])
    ]


def test_the_search_for_single_updates_would_find_one(stage: Stage) -> None:
    stage.start()
    assert stage.service is not None
    stage.service._refusals.planted = bytearray(b"--" + PATTERN.tobytes())  # type: ignore[attr-defined]
    reachable = _everything_reachable(stage.service)
    assert any(isinstance(each, bytearray) and PATTERN.tobytes() in each for each in reachable)


# --- revoked while it runs --------------------------------------------------------------------------------------------


def test_a_list_of_revoked_certificates_is_read_again_when_it_changes(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that is copied only by half: it is named once, and the one before stays in force."""
    caplog.set_level(logging.INFO)
    authority = stage.choir.authority.certificate
    path = stage.folder / "revoked.pem"
    path.write_bytes(stage.choir.revoke(stage.choir.names(6)[-1]))
    revoked = RevocationList(path, authority)
    stage.start(anchor=TrustAnchor(authority, revoked_serials=revoked.read()), revoked=revoked)
    stage.submit("tiny")
    stage.run(60, until=stage.done)
    assert len(stage.journal.rounds()[-1].survivors) == 5
    path.write_bytes(stage.choir.revoke("pi-03"))
    for damaged in (False, True):
        if damaged:
            path.write_bytes(path.read_bytes()[:100])
        stage.run(5)
        stage.submit("moments")
        stage.run(60, until=stage.done)
        assert stage.journal.rounds()[-1].phase == "committed"
        assert list(stage.journal.rounds()[-1].survivors) == ["pi-00", "pi-01", "pi-02", "pi-04"]
    assert re.search(r"read the new list of revoked certificates \(\d+\); out by it: pi-03", caplog.text)
    assert caplog.text.count("is not a PEM X.509 CRL") == 1
