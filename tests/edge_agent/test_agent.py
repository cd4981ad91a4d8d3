"""Whole rounds of real agents over the memory transport, against a scripted coordinator with a real ServerSession."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.pending import PendingStore
from sottovoce.blobs import canonical, digest_of
from sottovoce.errors import TransportError
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.transport.memory import MemoryTransport
from sottovoce.wire.messages import CheckIn, MaskedInput, NotSelected, Ready, RoundOver, Withdraw


def flat(aggregate: Any) -> Any:
    return np.concatenate([tensor.reshape(-1) for tensor in aggregate.sums["delta"]])


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
    assert world.releases("pi-0") == [(1, "committed")]

    world.coordinator.state_bytes = next_state
    world.coordinator.announce(2)
    world.settle()
    world.coordinator.select(devices)
    world.settle()
    assert world.run_rendezvous(devices).survivors == 4
    world.coordinator.outcome(committed=False, reason="impossible_sum")
    world.settle()
    assert world.releases("pi-0") == [(2, "abandoned"), (1, "committed")]


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
    assert world.releases("pi-0") == [(1, "spent")]


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
    world.slow_training()
    world.fleet(1)
    world.coordinator.announce()
    world.settle()
    world.coordinator.select(["pi-0"])
    world.until(lambda: world.agents["pi-0"]._bench.batches > 3)
    world.coordinator.send("pi-0", RoundOver("late"))
    world.until(lambda: world.state_of("pi-0") == "Watching")
    assert not world.agents["pi-0"]._bench.busy


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
    assert world.releases("pi-0") == [(1, "abandoned"), (1, "abandoned")]


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


# --- small things -----------------------------------------------------------------------------------------------------


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
