"""Whole rounds of real agents over the memory transport, against a scripted coordinator with a real ServerSession."""

from __future__ import annotations

import logging
import random
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.hardware import has_fast_aes
from edge_agent.ledger import Ledger
from edge_agent.pending import PendingStore
from sottovoce.bundle import decode_bundle, encode_bundle
from sottovoce.errors import TransportError
from sottovoce.plan import LocalWork, blob_ref, canonical, digest_of
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.transport.memory import MemoryTransport
from sottovoce.wire.messages import (
    AdvertiseKeys,
    CheckIn,
    MaskedInput,
    NotSelected,
    Ready,
    RoundOver,
    Selected,
    Unmasking,
    Withdraw,
)


def flat(aggregate: Any) -> Any:
    return np.concatenate([tensor.reshape(-1) for tensor in aggregate.sums["delta"]])


def releases(world: Any, name: str) -> list[tuple[int, str]]:
    with Ledger(world.homes[name].ledger) as ledger:
        return [(row.round, row.status) for row in ledger.rows()]


# --- whole rounds -----------------------------------------------------------------------------------------------------


def test_a_round_sums_what_every_device_computed(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    assert {world.state_of(name) for name in devices} == {"Waiting"}
    computed = [
        world.agents[name]._bench.load(world.coordinator.plan.digest, state(world), now_ms=0) for name in devices
    ]

    aggregate = world.run_rendezvous(devices)

    assert aggregate.survivors == 4
    assert aggregate.weight == 4 * 20
    expected = sum(np.concatenate([t.reshape(-1) for t in each.values["delta"]]) * 20 / 100 for each in computed)
    np.testing.assert_allclose(flat(aggregate), expected, atol=4 * 2 / 2**16)
    assert aggregate.sums["correct"][0][0] == sum(each.values["correct"][0][0] for each in computed)


def state(world: Any) -> bytes:
    return digest_of(world.coordinator.state_bytes)


def test_two_rounds_and_the_ledger_of_both(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    world.run_rendezvous(devices)
    next_state = moved(world.coordinator.state_bytes)
    world.coordinator.outcome(committed=True, survivors=devices, state=next_state)
    world.settle()
    assert {world.state_of(name) for name in devices} == {"Watching"}
    assert releases(world, "pi-0") == [(1, "committed")]

    world.coordinator.state_bytes = next_state
    world.coordinator.announce(2)
    world.settle()
    world.coordinator.select(devices)
    world.settle()
    assert world.run_rendezvous(devices).survivors == 4
    world.coordinator.outcome(committed=False, reason="impossible_sum")
    world.settle()
    assert releases(world, "pi-0") == [(2, "abandoned"), (1, "committed")]


def moved(state_bytes: bytes) -> bytes:
    return encode_tensors({name: tensor + np.float32(0.01) for name, tensor in decode_tensors(state_bytes).items()})


def test_a_dropout_in_the_rendezvous_does_not_stop_the_others(world: Any) -> None:
    devices = world.fleet(6)
    world.train(devices)
    world.coordinator.open_rendezvous(devices)
    world.settle()
    world.coordinator.close_stage()
    world.settle()
    world.kill("pi-5")
    while world.coordinator.stage != "over":
        world.settle()
        world.coordinator.close_stage()
    assert world.coordinator.session.survivors == ("pi-0", "pi-1", "pi-2", "pi-3", "pi-4")
    assert world.coordinator.aggregate().weight == 5 * 20


@pytest.mark.parametrize("seed", range(3))
def test_lost_repeated_and_reordered_messages_change_nothing(world: Any, seed: int) -> None:
    world.broker._rng = random.Random(seed)
    world.broker.faults = type(world.broker.faults)(loss=0.2, duplicate=0.2, reorder=0.2)
    devices = world.fleet(4)
    world.coordinator.announce()

    def everybody(kind: type) -> Any:
        return lambda: all(world.coordinator.said(name, kind) for name in devices)

    patiently(world, everybody(CheckIn))
    world.coordinator.select(devices)
    patiently(world, everybody(Ready))
    world.coordinator.open_rendezvous(devices)
    while world.coordinator.stage != "over":
        patiently(world, lambda: not world.coordinator.session.waiting_for())
        world.coordinator.close_stage()
    assert world.coordinator.aggregate().survivors == 4
    assert releases(world, "pi-0") == [(1, "spent")]


def patiently(world: Any, condition: Any) -> None:
    """Turn the crank until `condition` holds, letting time pass so that questions are repeated."""
    for _ in range(2_000):
        if condition():
            return
        world.pass_time(200)
        for agent in world.agents.values():
            agent.turn(0)
        for _ in range(4):
            world.coordinator.turn()
    raise AssertionError("it never came to that")


def test_a_vector_larger_than_a_message_goes_in_chunks_two_at_a_time(world: Any) -> None:
    devices = world.fleet(4)
    world.broker.max_payload_bytes = 4_500
    for name in devices:
        world.broker.disconnect(name)
        world.broker.reconnect(name)
    world.train(devices)
    aggregate = world.run_rendezvous(devices)
    assert aggregate.survivors == 4
    vector = world.coordinator.said("pi-0", MaskedInput)[0].vector
    assert vector.chunk_bytes <= 4_500
    assert world.coordinator.chunks_taken >= 4 * vector.chunk_count >= 4 * 5


def test_a_vector_that_stalls_is_taken_up_again(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    world.coordinator.uploads = False
    world.coordinator.open_rendezvous(devices)
    while world.coordinator.stage != "masked_input":
        world.settle()
        world.coordinator.close_stage()
    world.settle()
    assert world.coordinator.chunks_taken == 0
    world.coordinator.uploads = True
    world.pass_time(7_000)
    world.settle()
    assert world.coordinator.session.waiting_for() == frozenset()
    assert len({canonical(m) for m in world.coordinator.said("pi-0", MaskedInput)}) == 1


def test_the_link_comes_back_in_a_rendezvous(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    world.coordinator.open_rendezvous(devices)
    world.settle()
    world.coordinator.close_stage()
    world.broker.disconnect("pi-1")
    world.settle()
    world.broker.reconnect("pi-1")
    while world.coordinator.stage != "over":
        world.settle()
        world.coordinator.close_stage()
    assert "pi-1" in world.coordinator.session.survivors


def test_devices_say_whether_they_are_there(world: Any) -> None:
    devices = world.fleet(1)
    world.coordinator.announce()
    world.settle()
    world.broker.disconnect("pi-0")
    world.settle()
    assert world.coordinator.statuses == {"pi-0": False}
    world.broker.reconnect("pi-0")
    world.settle()
    assert world.coordinator.statuses == {"pi-0": True}
    world.agents.pop(devices[0]).close()
    world.settle()
    assert world.coordinator.statuses == {"pi-0": False}


# --- the end of a part ------------------------------------------------------------------------------------------------


def test_who_is_not_selected_waits_for_the_outcome_and_uses_it(world: Any) -> None:
    world.fleet(1)
    world.coordinator.announce()
    world.settle()
    world.coordinator.send("pi-0", NotSelected(retry_ms=world.clock() + 60_000))
    world.settle()
    assert world.state_of("pi-0") == "Watching"
    new = moved(world.coordinator.state_bytes)
    world.coordinator.outcome(committed=True, survivors=["pi-7"], state=new)
    world.settle()
    kept = list((world.homes["pi-0"].path / "latest").iterdir())
    assert [path.stem for path in kept] == [digest_of(world.coordinator.bundle_bytes).hex()]
    assert new in kept[0].read_bytes()


def test_a_device_that_comes_after_the_round_still_gets_its_result(world: Any) -> None:
    new = moved(world.coordinator.state_bytes)
    world.coordinator.announce()
    world.coordinator.outcome(committed=True, survivors=[], state=new)
    world.fleet(1)
    world.settle()
    assert "pi-0" not in world.coordinator.heard
    (kept,) = (world.homes["pi-0"].path / "latest").iterdir()
    assert new in kept.read_bytes()


def test_a_round_that_is_over_for_this_device_ends_its_work(world: Any) -> None:
    world.coordinator.plan = slow_plan(world)
    world.fleet(1)
    world.coordinator.announce()
    world.settle()
    world.coordinator.select(["pi-0"])
    world.until(lambda: world.agents["pi-0"]._bench.batches > 3)
    world.coordinator.send("pi-0", RoundOver("late"))
    world.until(lambda: world.state_of("pi-0") == "Watching")
    assert not world.agents["pi-0"]._bench.busy


def slow_plan(world: Any) -> Any:
    return msgspec.structs.replace(world.coordinator.plan, work=LocalWork(epochs=20, batch_size=2))


def start_of_slow_training(world: Any) -> Any:
    """Return the agent of pi-0, enrolled, started and selected for 200 batches, of which none is run."""
    world.coordinator.plan = slow_plan(world)
    world.enrol("pi-0")
    agent = world.start("pi-0")
    world.coordinator.announce()
    world.settle()
    world.coordinator.select(["pi-0"])
    return agent


def test_a_pending_result_is_used_in_the_next_attempt_without_training_again(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    world.coordinator.outcome(committed=False, reason="too_few_ready")
    world.settle()
    agent = world.agents["pi-0"]
    before = agent._bench.batches
    world.coordinator.announce(1, 1)
    world.settle()
    world.coordinator.select(devices)
    world.settle()
    assert world.state_of("pi-0") == "Waiting"
    assert agent._bench.batches == before
    assert world.run_rendezvous(devices).survivors == 4


def test_a_spent_update_is_gone_and_the_next_attempt_trains_again_as_often_as_the_owner_allows(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    for attempt in (1, 2):
        world.run_rendezvous(devices)
        assert not list(world.homes["pi-0"].pending.glob("result-*"))
        world.coordinator.outcome(committed=False, reason="too_few_survivors")
        world.settle()
        world.coordinator.announce(1, attempt)
        world.settle()
        if attempt == 1:
            world.coordinator.select(devices)
            world.settle()
    assert world.coordinator.last("pi-0").code == "policy"
    assert releases(world, "pi-0") == [(1, "abandoned"), (1, "abandoned")]


def test_a_superseded_result_is_forgotten(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    world.coordinator.outcome(committed=True, survivors=["pi-7"], state=moved(world.coordinator.state_bytes))
    world.settle()
    assert list(world.homes["pi-0"].pending.iterdir()) == []


def test_nothing_masked_leaves_when_the_ledger_cannot_be_written(world: Any) -> None:
    devices = world.fleet(6)
    with sqlite3.connect(world.homes["pi-0"].ledger) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON release BEGIN SELECT RAISE(ABORT, 'full'); END")
    database.close()
    world.train(devices)
    world.coordinator.open_rendezvous(devices)
    while world.coordinator.stage != "over":
        world.settle()
        world.coordinator.close_stage()
    assert world.coordinator.said("pi-0", MaskedInput) == []
    assert isinstance(world.coordinator.last("pi-0"), Withdraw)
    assert world.coordinator.session.survivors == ("pi-1", "pi-2", "pi-3", "pi-4", "pi-5")


# --- what is refused --------------------------------------------------------------------------------------------------


def withdrawn(world: Any, *, select: bool = True) -> str:
    """Run one device into a round that it must refuse; return the code it gives."""
    world.start("pi-0")
    world.coordinator.announce()
    world.settle()
    if select:
        world.coordinator.select(["pi-0"])
        world.settle()
    assert world.state_of("pi-0") == "Watching"
    (withdrawal,) = world.coordinator.said("pi-0", Withdraw)
    assert world.coordinator.last("pi-0") == withdrawal
    return str(withdrawal.code)


def test_no_examples(world: Any) -> None:
    world.enrol("pi-0", examples={})
    with_known_certificate(world)
    assert withdrawn(world, select=False) == "bad_examples"


def with_known_certificate(world: Any) -> None:
    """A withdrawal before any check-in carries no certificate: the coordinator knows it from earlier rounds."""
    certificate = world.setup("pi-0").identity.certificate
    world.coordinator.certificates[certificate.fingerprint] = certificate


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: {"x": x, "y": np.where(np.arange(len(y)) == 3, 10, y).astype(np.int32)},
        lambda x, y: {"x": x[:, :63], "y": y},
        lambda x, y: {"x": x},
    ],
    ids=["label out of range", "wrong shape", "no labels"],
)
def test_examples_that_do_not_fit(world: Any, change: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((20, 64), np.float32), rng.integers(0, 10, 20).astype(np.int32)
    world.enrol("pi-0", examples=change(x, y))
    assert withdrawn(world) == "bad_examples"
    assert world.agents["pi-0"]._bench.batches == 0


def test_weights_that_are_no_numbers(world: Any) -> None:
    tensors = decode_tensors(world.coordinator.state_bytes)
    tensors["hidden_kernel"][0, 0] = np.nan
    world.coordinator.state_bytes = encode_tensors(tensors)
    world.enrol("pi-0")
    assert withdrawn(world) == "non_finite"
    assert list(world.homes["pi-0"].pending.iterdir()) == []


def test_a_state_that_is_none(world: Any) -> None:
    world.coordinator.state_bytes = b"junk"
    world.enrol("pi-0")
    assert withdrawn(world) == "malformed"


def test_a_program_that_computes_wrongly_on_this_device(world: Any) -> None:
    bundle = decode_bundle(world.coordinator.bundle_bytes)
    expected = {name: tensor + 1 for name, tensor in decode_tensors(bundle.self_test.expected).items()}
    test = msgspec.structs.replace(bundle.self_test, expected=encode_tensors(expected))
    use_bundle(world, encode_bundle(msgspec.structs.replace(bundle, self_test=test)))
    world.enrol("pi-0")
    assert withdrawn(world) == "self_test_failed"
    assert world.agents["pi-0"]._bench.batches == 0


def use_bundle(world: Any, content: bytes) -> None:
    world.coordinator.bundle_bytes = content
    ref = blob_ref(content, chunk_bytes=world.coordinator.chunk_bytes)
    world.coordinator.plan = msgspec.structs.replace(world.coordinator.plan, program=ref)


def test_a_program_that_is_none(world: Any) -> None:
    use_bundle(world, b"junk")
    world.enrol("pi-0")
    assert withdrawn(world) == "bad_bundle"


def test_a_plan_that_sums_what_the_program_does_not_compute(world: Any) -> None:
    plan = world.coordinator.plan
    other = msgspec.structs.replace(plan.aggregations[1], name="secret")
    world.coordinator.plan = msgspec.structs.replace(plan, aggregations=(plan.aggregations[0], other))
    world.enrol("pi-0")
    assert withdrawn(world) == "bad_bundle"


def test_a_plan_that_the_owner_does_not_allow_leaves_no_trace(world: Any) -> None:
    plan = world.coordinator.plan
    world.coordinator.plan = msgspec.structs.replace(plan, collection="letters")
    world.policy = type(world.policy)(minimum_cohort=3, minimum_honest_survivors=2, collections=("digits",))
    world.enrol("pi-0")
    with_known_certificate(world)
    assert withdrawn(world, select=False) == "policy"
    world.coordinator.outcome(committed=True)
    world.settle()
    assert not (world.homes["pi-0"].path / "latest").exists()


def test_a_session_that_the_owner_does_not_allow(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    world.coordinator.open_rendezvous(devices, mode="curious")
    world.settle()
    assert {world.coordinator.last(name) for name in devices} == {Withdraw("policy")}
    assert world.coordinator.said("pi-0", AdvertiseKeys) == []


def test_a_corrupt_blob_is_awaited_until_a_good_one_comes(world: Any) -> None:
    devices = world.fleet(1)
    coordinator = world.coordinator
    coordinator.announce(blobs=False)
    for content in (canonical(coordinator.plan), coordinator.state_bytes):
        coordinator.publish_blob(content)
    ref = coordinator.plan.program
    for index in range(ref.chunk_count):
        good = coordinator.bundle_bytes[ref.chunk_slice(index)]
        coordinator.transport.publish(coordinator.topics.blob_chunk(ref.digest, index), good[::-1], retain=True)
    world.settle()
    coordinator.select(devices)
    world.settle()
    assert world.state_of("pi-0") == "Fetching"
    assert world.agents["pi-0"]._library.refused == ref.chunk_count
    coordinator.publish_blob(coordinator.bundle_bytes)
    world.settle()
    assert world.state_of("pi-0") == "Waiting"


def test_a_topic_below_a_blob_that_is_none_costs_nobody_the_round(world: Any) -> None:
    world.fleet(1)
    coordinator = world.coordinator
    coordinator.announce(blobs=False)
    coordinator.publish_blob(canonical(coordinator.plan))
    world.settle()
    coordinator.select(["pi-0"])
    world.settle()
    below = coordinator.topics.blob_filter(coordinator.plan.program.digest).removesuffix("+")
    coordinator.transport.publish(below + "x", b"junk")
    world.settle()
    assert world.state_of("pi-0") == "Fetching"
    assert world.agents["pi-0"].refused == {"malformed": 1}
    assert coordinator.said("pi-0", Withdraw) == []


def test_chunks_that_stop_coming_are_asked_for_again(world: Any) -> None:
    world.fleet(1)
    world.coordinator.announce(blobs=False)
    world.settle()
    plan = canonical(world.coordinator.plan)
    topic = world.coordinator.topics.blob_chunk(digest_of(plan), 0)
    world.broker._retained[topic] = plan
    world.settle()
    assert "pi-0" not in world.coordinator.heard
    world.pass_time(31_000)
    world.settle()
    assert world.coordinator.said("pi-0", CheckIn)


def test_a_clock_in_1970_is_no_obstacle(world: Any) -> None:
    devices = world.fleet(3)
    world.enrol("pi-3")
    world.start("pi-3", clock=lambda: world.clock() - world.clock.now_ms + 5_000)
    world.train([*devices, "pi-3"])
    assert world.run_rendezvous([*devices, "pi-3"]).survivors == 4
    with Ledger(world.homes["pi-3"].ledger) as ledger:
        assert ledger.last_signed_ms() == world.clock()
        assert ledger.rows()[0].at_unix_s * 1000 >= world.clock()


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda envelope: envelope[:-10], "malformed"),
        (lambda envelope: envelope[:-1] + bytes([envelope[-1] ^ 1]), "bad_signature"),
        (lambda envelope: b"\0" * 100, "malformed"),
        (lambda envelope: bytes(255 * 1024), "malformed"),
    ],
    ids=["truncated", "signature", "junk", "large"],
)
def test_a_falsified_announcement_is_counted_and_dropped(world: Any, tamper: Any, reason: str) -> None:
    world.fleet(1)
    good = world.coordinator.announce()
    world.coordinator.transport.publish(world.coordinator.topics.round(), tamper(good), retain=True)
    world.settle()
    assert world.agents["pi-0"].refused == {reason: 1}
    assert world.state_of("pi-0") == "CheckedIn"


def test_a_stranger_is_not_believed(world: Any, motionless_world: Any) -> None:
    world.fleet(1)
    stranger = motionless_world.coordinator
    world.coordinator.announce()
    world.settle()
    ours, world.coordinator.identity = world.coordinator.identity, stranger.identity
    world.coordinator.announce(2)
    world.coordinator.select(["pi-0"])
    world.coordinator.identity = ours
    world.settle()
    assert world.agents["pi-0"].refused == {"bad_certificate": 2}
    assert world.state_of("pi-0") == "CheckedIn"


def test_messages_for_others_and_of_other_rounds_are_dropped(world: Any) -> None:
    world.fleet(1)
    world.coordinator.announce()
    world.settle()
    message = Selected(route="r7", now_ms=world.clock())
    down = world.coordinator.topics.down("pi-0")
    world.coordinator.transport.publish(down, world.coordinator.seal(message, "pi-1"))
    world.coordinator.round = 2
    world.coordinator.transport.publish(down, world.coordinator.seal(message, "pi-0"))
    world.settle()
    assert world.agents["pi-0"].refused == {"malformed": 1, "replayed": 1}
    assert world.state_of("pi-0") == "CheckedIn"


def test_an_old_announcement_changes_nothing(world: Any) -> None:
    devices = world.fleet(4)
    old = world.coordinator.announce(1)
    world.settle()
    world.coordinator.announce(2)
    world.settle()
    world.coordinator.select(devices)
    world.settle()
    world.coordinator.transport.publish(world.coordinator.topics.round(), old, retain=True)
    world.settle()
    assert {world.state_of(name) for name in devices} == {"Waiting"}
    assert world.run_rendezvous(devices).survivors == 4
    world.kill("pi-0")
    world.start("pi-0")
    world.settle()
    assert len(world.coordinator.said("pi-0", CheckIn)) == 2


def test_a_flood_of_junk_is_counted_but_hardly_logged(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    world.fleet(1)
    world.coordinator.announce()
    world.settle()
    with caplog.at_level(logging.INFO, logger="edge-agent"):
        for number in range(200):
            world.coordinator.transport.publish(world.coordinator.topics.down("pi-0"), b"junk %d" % number)
        world.settle()
    assert world.agents["pi-0"].refused["malformed"] == 200
    assert len([record for record in caplog.records if "dropped" in record.message]) == 1


# --- killed and started again -----------------------------------------------------------------------------------------


def restart(world: Any, name: str) -> Any:
    world.kill(name)
    return world.start(name)


def test_killed_in_training_a_device_goes_on_with_the_next_batch(world: Any) -> None:
    agent = start_of_slow_training(world)
    run = 0
    for stop_after in (7, 23):
        bench = agent._bench
        world.until(lambda bench=bench, stop=stop_after: bench.batches >= stop)
        run += bench.batches
        agent = restart(world, "pi-0")
    world.settle()
    assert world.state_of("pi-0") == "Waiting"
    assert run + agent._bench.batches == 20 * 20 // 2
    assert len(world.coordinator.said("pi-0", CheckIn)) == 1
    assert isinstance(world.coordinator.last("pi-0"), Ready)


def test_a_checkpoint_is_written_only_when_the_last_one_is_old_enough(world: Any) -> None:
    world.checkpoint_s = 5.0
    agent = start_of_slow_training(world)
    world.until(lambda: agent._bench.batches == 7)
    assert not list(world.homes["pi-0"].pending.glob("checkpoint-*"))
    world.pass_time(5000)
    world.until(lambda: agent._bench.batches == 8)  # This one is kept.
    world.until(lambda: agent._bench.batches == 11)
    agent = restart(world, "pi-0")
    world.settle()
    assert world.state_of("pi-0") == "Waiting"
    assert 8 + agent._bench.batches == 20 * 20 // 2


def test_stopped_in_an_orderly_way_in_training_a_device_goes_on_with_the_next_batch(world: Any) -> None:
    world.checkpoint_s = 3600.0
    agent = start_of_slow_training(world)
    world.until(lambda: agent._bench.batches == 7)
    agent.close()
    del world.agents["pi-0"]
    agent = world.start("pi-0")
    world.settle()
    assert world.state_of("pi-0") == "Waiting"
    assert 7 + agent._bench.batches == 20 * 20 // 2


def test_killed_while_it_waits_a_device_says_ready_again_and_joins(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    agent = restart(world, "pi-0")
    world.settle()
    assert world.state_of("pi-0") == "Waiting"
    assert agent._bench.batches == 0
    assert world.run_rendezvous(devices).survivors == 4


def test_killed_after_masking_a_device_never_masks_again_and_learns_the_outcome(world: Any) -> None:
    devices = world.fleet(6)
    world.train(devices)
    world.coordinator.open_rendezvous(devices)
    while world.coordinator.stage != "masked_input":
        world.settle()
        world.coordinator.close_stage()
    world.settle()
    restart(world, "pi-0")
    world.settle()
    assert world.state_of("pi-0") == "AwaitingOutcome"
    while world.coordinator.stage != "over":
        world.settle()
        world.coordinator.close_stage()
    assert world.coordinator.said("pi-0", Unmasking) == []
    assert "pi-0" in world.coordinator.session.survivors
    assert len(world.coordinator.said("pi-0", MaskedInput)) == 1
    world.coordinator.outcome(committed=True, survivors=devices)
    world.settle()
    assert releases(world, "pi-0") == [(1, "committed")]


def test_a_round_that_ended_while_the_device_was_off_is_forgotten(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    world.kill("pi-0")
    world.coordinator.outcome(committed=False, reason="too_few_ready")
    world.coordinator.announce(2)
    world.start("pi-0")
    world.settle()
    assert world.state_of("pi-0") == "CheckedIn"
    assert [message.announcement for message in world.coordinator.said("pi-0", CheckIn)][1:] == [
        world.coordinator.announced
    ]


def test_damaged_files_of_an_earlier_run_are_no_obstacle(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    world.kill("pi-0")
    for path in world.homes["pi-0"].pending.iterdir():
        path.write_bytes(b"damaged")
    for path in world.homes["pi-0"].blobs.iterdir():
        path.write_bytes(b"damaged")
    world.start("pi-0")
    world.settle()
    world.coordinator.select(["pi-0"])
    world.settle()
    assert world.state_of("pi-0") == "Waiting"
    assert world.run_rendezvous(devices).survivors == 4


# --- visits -----------------------------------------------------------------------------------------------------------


def visit(world: Any, name: str, *, step_ms: int = 100) -> str:
    """Let a device make one visit while the coordinator runs; return what it prints."""
    agent = world.start(name, resident=False)
    for _ in range(20_000):
        appointment = agent.visit_over()
        if appointment is not None:
            agent.close()
            world.agents.pop(name)
            return str(appointment)
        if not agent.turn(0):
            world.pass_time(step_ms)
        world.coordinator.turn()
    raise AssertionError("the visit does not end")


def test_visits_carry_a_device_through_a_round(world: Any) -> None:
    devices = world.fleet(3)
    world.enrol("pi-3")
    assert visit(world, "pi-3") == "no round is open"

    world.coordinator.announce(training_ms=600_000)
    assert visit(world, "pi-3").startswith("checked in; the selection of round 1 closes at 2026-12-01 00:00:1")
    world.settle()
    world.coordinator.select([*devices, "pi-3"])
    world.settle()

    assert visit(world, "pi-3").startswith("the work is done; the rendezvous of round 1 is at 2026-12-01 00:10:0")
    assert world.coordinator.last("pi-3") == Ready(present=False)

    world.pass_time(560_000)
    agent = world.start("pi-3", resident=False)
    world.settle()
    assert world.coordinator.last("pi-3") == Ready(present=True)
    assert agent.visit_over() is None
    assert world.run_rendezvous([*devices, "pi-3"]).survivors == 4
    assert agent.visit_over() is None
    world.coordinator.outcome(committed=True, survivors=[*devices, "pi-3"])
    world.settle()
    world.pass_time(5_000)
    assert str(agent.visit_over()) == "nothing to do in round 1: committed"


def test_a_visit_that_finds_no_broker_says_so(world: Any) -> None:
    world.enrol("pi-0")
    world.start("pi-0", resident=False)
    world.broker.disconnect("pi-0")
    agent = world.agents["pi-0"]
    agent.turn(0)
    agent.turn(0)
    assert agent.visit_over() is None
    world.pass_time(31_000)
    with pytest.raises(Exception, match=r"no connection to the broker 127\.0\.0\.1:1883 within 30 s"):
        agent.visit_over()


# --- small things -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "fast"),
    [("flags\t: fpu aes sse2\n", True), ("Features\t: fp asimd aes\n", True), ("Features : fp\nmodel: aes\n", False)],
)
def test_aes_instructions_are_recognised(cpu: str, fast: bool) -> None:
    assert has_fast_aes(cpu) is fast


def test_examples_are_kept_only_as_long_as_the_owner_says(world: Any, tmp_path: Path) -> None:
    from edge_agent.agent import Agent
    from edge_agent.config import Retention
    from edge_agent.examples import ExampleStore

    world.enrol("pi-0")
    setup = world.setup("pi-0")
    config = type(setup.config)(
        device="pi-0",
        fleet=setup.config.fleet,
        broker=setup.config.broker,
        policy=world.policy,
        retention={"digits": Retention(max_count=5)},
    )
    agent = Agent(type(setup)(**{**fields(setup), "config": config}), MemoryTransport(world.broker, "pi-0"))
    agent.start()
    world.agents["pi-0"] = agent
    world.coordinator.announce()
    world.settle()
    with ExampleStore(world.homes["pi-0"].examples) as store:
        assert store.count("digits") == 5


def fields(setup: Any) -> dict[str, Any]:
    return {name: getattr(setup, name) for name in setup.__slots__}


def test_pending_files_are_sealed(world: Any) -> None:
    devices = world.fleet(1)
    world.train(devices)
    identity = world.setup("pi-0").identity
    names = [path.name for path in world.homes["pi-0"].pending.iterdir()]
    assert any(name.startswith("result-") for name in names)
    lines: list[str] = []
    PendingStore(world.homes["pi-0"].pending, identity, discarded=lines.append).sweep(now_ms=world.clock())
    assert lines == []


def test_a_device_whose_id_is_taken_stops_and_says_so(world: Any) -> None:
    world.fleet(1)
    world.settle()
    MemoryTransport(world.broker, "pi-0")
    with pytest.raises(TransportError, match="another client took this id"):
        world.settle()
