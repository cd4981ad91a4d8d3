"""Agents that are killed and started again, and devices that only come for a visit."""

from __future__ import annotations

from typing import Any

import pytest

from sottovoce.wire.messages import CheckIn, MaskedInput, Ready, Unmasking


def start_of_slow_training(world: Any) -> Any:
    """Return the agent of pi-0, enrolled, started and selected for 200 batches, of which none is run."""
    world.slow_training()
    world.enrol("pi-0")
    agent = world.start("pi-0")
    world.coordinator.announce()
    world.settle()
    world.coordinator.select(["pi-0"])
    return agent


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
    assert world.releases("pi-0") == [(1, "committed")]


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
