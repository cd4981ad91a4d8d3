"""What real agents refuse: examples, programs, states, plans, sessions, and messages that are not what they seem."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.ledger import Ledger
from sottovoce.blobs import blob_ref, canonical, digest_of
from sottovoce.bundle import decode_bundle, encode_bundle
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.wire.messages import AdvertiseKeys, CheckIn, Selected, Withdraw


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
