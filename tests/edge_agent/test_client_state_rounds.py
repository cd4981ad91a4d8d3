"""Client state in whole rounds: survivors of committed rounds keep what they computed, and nobody else, ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from memory_world import World, visits_world

from edge_agent.client_states import ClientStates, forget_client_states
from edge_agent.examples import ExampleStore
from edge_agent.home import Home
from edge_agent.policy import Policy
from sottovoce.blobs import canonical
from sottovoce.bundle import decode_bundle
from sottovoce.plan import LocalWork
from sottovoce.tensors import encode_tensors
from sottovoce.wire.messages import Withdraw

ROOT = Path(__file__).resolve().parents[2]
READINGS = {f"pi-{number}": 10.0**number for number in range(6)}
DEVICES = list(READINGS)


@pytest.fixture
def visits(tmp_path: Path) -> Iterator[World]:
    """Six enrolled devices, each with one reading of its own."""
    world = visits_world(tmp_path)
    enrol(world)
    yield world
    for name in list(world.agents):
        world.kill(name)


def enrol(world: World) -> None:
    for name, reading in READINGS.items():
        world.enrol(name, examples={"temperature": np.array([reading])}, collection="readings")


def start(world: World) -> list[str]:
    for name in DEVICES:
        world.start(name)
    return DEVICES


def train(world: World, number: int, *, attempt: int = 0, devices: list[str] = DEVICES) -> None:
    world.coordinator.announce(number, attempt)
    world.settle()
    world.coordinator.select(devices)
    world.settle()


def sums(aggregate: Any) -> tuple[float, float]:
    """What all devices have summed now, and what they had kept before."""
    return float(aggregate.sums["now"][0][0]), float(aggregate.sums["before"][0][0])


def next_state(world: World, number: int) -> None:
    """The state of every round is another one, or the device would refuse to answer it so often."""
    world.coordinator.state_bytes = encode_tensors({}) if number == 1 else b"\x80"
    plan = world.coordinator.plan
    world.coordinator.plan = msgspec.structs.replace(plan, work=LocalWork(batch_size=2 + number, order="stored"))


def kept(world: World, name: str) -> tuple[float, int]:
    """What the device has kept: the total of all committed rounds, and how many they were."""
    setup = world.setup(name)
    store = ClientStates(
        world.homes[name].client_states, setup.identity, maximum_bytes=10_000, entropy=os.urandom, log=print
    )
    state = decode_bundle(world.coordinator.bundle_bytes).client_state
    assert state is not None
    reading = store._kept(state)
    store.close()
    return (0.0, 0) if reading is None else (float(reading.values["total"][0]), int(reading.values["rounds"][0]))


def test_every_round_begins_with_what_the_committed_rounds_have_left(visits: World) -> None:
    start(visits)
    for number, before in ((1, 0.0), (2, 111111.0), (3, 222222.0)):
        next_state(visits, number)
        train(visits, number)
        assert sums(visits.run_rendezvous(DEVICES)) == (111111.0, before)
        visits.coordinator.outcome(committed=True, survivors=DEVICES)
        visits.settle()
    assert {name: kept(visits, name) for name in DEVICES} == {name: (3 * READINGS[name], 3) for name in DEVICES}


def test_only_survivors_keep_what_they_computed(visits: World) -> None:
    start(visits)
    train(visits, 1)
    visits.run_rendezvous(DEVICES)
    visits.coordinator.outcome(committed=True, survivors=DEVICES[:5])
    visits.settle()
    assert {name: kept(visits, name)[1] for name in DEVICES} == {
        "pi-0": 1,
        "pi-1": 1,
        "pi-2": 1,
        "pi-3": 1,
        "pi-4": 1,
        "pi-5": 0,
    }
    next_state(visits, 2)
    train(visits, 2)
    assert sums(visits.run_rendezvous(DEVICES)) == (111111.0, 11111.0)


def test_a_device_that_is_dropped_in_the_rendezvous_keeps_the_old_value(visits: World) -> None:
    start(visits)
    train(visits, 1)
    visits.coordinator.open_rendezvous(DEVICES)
    visits.settle()
    visits.coordinator.close_stage()
    visits.settle()
    visits.kill("pi-5")
    while visits.coordinator.stage != "over":
        visits.settle()
        visits.coordinator.close_stage()
    assert visits.coordinator.session.survivors == tuple(DEVICES[:5])
    visits.coordinator.outcome(committed=True, survivors=visits.coordinator.session.survivors)
    visits.start("pi-5")
    visits.settle()
    assert {name: kept(visits, name)[1] for name in DEVICES} == {
        "pi-0": 1,
        "pi-1": 1,
        "pi-2": 1,
        "pi-3": 1,
        "pi-4": 1,
        "pi-5": 0,
    }


def test_an_abandoned_round_leaves_the_old_value_and_its_next_attempt_begins_with_it(visits: World) -> None:
    start(visits)
    train(visits, 1)
    assert sums(visits.run_rendezvous(DEVICES)) == (111111.0, 0.0)
    visits.coordinator.outcome(committed=False, reason="impossible_sum", survivors=DEVICES)
    visits.settle()
    assert kept(visits, "pi-0") == (0.0, 0)
    train(visits, 1, attempt=1)
    assert sums(visits.run_rendezvous(DEVICES)) == (111111.0, 0.0)
    visits.coordinator.outcome(committed=True, survivors=DEVICES)
    visits.settle()
    assert kept(visits, "pi-0") == (1.0, 1)


def test_a_result_that_was_not_sent_waits_with_its_client_state(visits: World) -> None:
    start(visits)
    train(visits, 1)
    batches = visits.agents["pi-0"]._bench.batches
    visits.coordinator.outcome(committed=False, reason="too_few_ready")
    visits.settle()
    visits.kill("pi-0")
    visits.start("pi-0")
    train(visits, 1, attempt=1)
    assert visits.agents["pi-0"]._bench.batches == 0 < batches
    visits.run_rendezvous(DEVICES)
    visits.coordinator.outcome(committed=True, survivors=DEVICES)
    visits.settle()
    assert kept(visits, "pi-0") == (1.0, 1)


def test_killed_after_masking_it_hears_the_retained_outcome(visits: World) -> None:
    start(visits)
    train(visits, 1)
    visits.run_rendezvous(DEVICES)
    visits.kill("pi-0")
    visits.coordinator.outcome(committed=True, survivors=DEVICES)
    visits.settle()
    visits.start("pi-0")
    visits.settle()
    assert kept(visits, "pi-0") == (1.0, 1)


def test_whoever_misses_the_outcome_keeps_the_old_value(visits: World) -> None:
    """The retained outcome is of a later round: nothing signed says any more that its update is in the sum."""
    start(visits)
    train(visits, 1)
    visits.run_rendezvous(DEVICES)
    visits.kill("pi-0")
    del visits.broker._sessions["pi-0"]  # The broker has waited long enough for it, and forgets what it kept for it.
    visits.coordinator.outcome(committed=True, survivors=DEVICES)
    visits.settle()
    next_state(visits, 2)
    train(visits, 2, devices=DEVICES[1:])
    visits.run_rendezvous(DEVICES[1:])
    visits.coordinator.outcome(committed=True, survivors=DEVICES[1:])
    visits.settle()
    visits.start("pi-0")
    visits.settle()
    assert {name: kept(visits, name)[1] for name in DEVICES} == {name: 2 * (name != "pi-0") for name in DEVICES}
    next_state(visits, 3)
    train(visits, 3)
    assert sums(visits.run_rendezvous(DEVICES)) == (111111.0, 2 * 111110.0)


def test_an_outcome_that_comes_after_the_next_announcement_still_counts(visits: World) -> None:
    """Topics have no order among each other: the next round may be heard of first."""
    start(visits)
    train(visits, 1)
    visits.run_rendezvous(DEVICES)
    first, number = visits.coordinator.announced, visits.coordinator.round
    visits.coordinator.announce(2)
    visits.settle()
    assert {visits.state_of(name) for name in DEVICES} == {"CheckedIn"}
    second = visits.coordinator.announced
    visits.coordinator.announced, visits.coordinator.round = first, number
    visits.coordinator.outcome(committed=True, survivors=DEVICES)
    visits.settle()
    visits.coordinator.announced, visits.coordinator.round = second, 2
    assert kept(visits, "pi-0") == (1.0, 1)
    assert visits.state_of("pi-0") == "CheckedIn"


# --- the owner --------------------------------------------------------------------------------------------------------


def test_a_program_that_keeps_more_than_the_owner_allows_is_refused(visits: World) -> None:
    visits.policy = Policy(minimum_cohort=3, minimum_honest_survivors=2, max_client_state_bytes=10)
    start(visits)
    train(visits, 1)
    assert visits.coordinator.said("pi-0", Withdraw)[-1].code == "policy"
    assert visits.agents["pi-0"]._bench.batches == 0


def test_what_the_owner_forgets_in_the_middle_of_a_round_is_not_kept(visits: World) -> None:
    start(visits)
    train(visits, 1)
    forget_client_states(visits.homes["pi-0"].client_states)
    visits.run_rendezvous(DEVICES)
    visits.coordinator.outcome(committed=True, survivors=DEVICES)
    visits.settle()
    assert kept(visits, "pi-0") == (0.0, 0)
    assert kept(visits, "pi-1") == (10.0, 1)


# --- newest examples --------------------------------------------------------------------------------------------------


def latest_only(world: World) -> None:
    work = LocalWork(batch_size=1, max_examples=1, order="stored")
    world.coordinator.plan = msgspec.structs.replace(world.coordinator.plan, work=work)


def read_again(world: World, name: str, reading: float) -> None:
    with ExampleStore(world.homes[name].examples) as store:
        store.add("readings", {"temperature": np.array([reading])}, now_s=world.at.timestamp())


def answered(world: World, number: int) -> float:
    train(world, number)
    now, _ = sums(world.run_rendezvous(DEVICES))
    world.coordinator.outcome(committed=True, survivors=DEVICES)
    world.settle()
    return now


def test_a_question_is_answered_again_when_there_is_something_new_to_say(visits: World) -> None:
    latest_only(visits)
    start(visits)
    assert [answered(visits, number) for number in (1, 2)] == [111111.0, 111111.0]
    train(visits, 3)
    assert {visits.coordinator.said(name, Withdraw)[-1].code for name in DEVICES} == {"policy"}
    for name in DEVICES:
        read_again(visits, name, 2.0)
    assert answered(visits, 4) == 12.0


def test_an_unsent_result_is_not_passed_off_as_the_newest(visits: World) -> None:
    latest_only(visits)
    start(visits)
    train(visits, 1)
    visits.coordinator.outcome(committed=False, reason="too_few_ready")
    visits.settle()
    read_again(visits, "pi-0", 5.0)
    assert answered(visits, 2) == 111115.0


# --- kills ------------------------------------------------------------------------------------------------------------

_CHILD = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from memory_world import visits_world
from test_client_state_rounds import enrol, start, train, DEVICES
folder, when, label, count = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
world = visits_world(folder)
enrol(world)
start(world)
from edge_agent.performer import Performer
agent = world.agents["pi-0"]
train(world, 1)
(folder / "announcement").write_bytes(world.broker.retained()[world.coordinator.topics.round()])
(folder / "announced").write_bytes(world.coordinator.announced)
left = [count]
def die(effect, moment):
    message = getattr(effect, "message", None)
    if when == moment and label in (type(effect).__name__, type(message).__name__):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
perform = agent._hands.perform
def perform_and_die(effects):
    for effect in effects:
        die(effect, "before")
        perform([effect])
        die(effect, "after")
agent._hands.perform = perform_and_die
world.run_rendezvous(DEVICES)
world.coordinator.outcome(committed=True, survivors=DEVICES)
world.settle()
"""
UNSENT, SENT = DEVICES[1:], DEVICES
KILLS: list[tuple[str, str, int, list[str], int]] = [
    ("before", "HoldClientState", 1, UNSENT, 0),
    ("after", "HoldClientState", 1, UNSENT, 0),
    ("after", "ForgetPending", 1, UNSENT, 0),
    ("after", "Spend", 1, UNSENT, 0),
    ("after", "Remember", 1, UNSENT, 0),
    ("after", "MaskedInput", 1, UNSENT, 0),
    ("after", "SendChunk", 1, SENT, 1),
    ("after", "SurvivorsSignature", 1, SENT, 1),
    ("before", "Unmasking", 1, SENT, 1),
    ("after", "Unmasking", 1, SENT, 1),
    ("before", "SettleClientState", 1, SENT, 1),
    ("after", "SettleClientState", 1, SENT, 1),
    ("after", "Settle", 1, SENT, 1),
    ("after", "Remember", 2, SENT, 1),
]


@pytest.mark.parametrize(
    ("when", "label", "count", "survivors", "rounds"),
    KILLS,
    ids=[f"{when}-{label}-{n}" for when, label, n, *_ in KILLS],
)
def test_a_kill_between_any_two_effects_commits_for_survivors_and_for_nobody_else(
    tmp_path: Path, when: str, label: str, count: int, survivors: list[str], rounds: int
) -> None:
    killed = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path), when, label, str(count)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    world = visits_world(tmp_path)
    world.homes = {name: Home(tmp_path / name) for name in DEVICES}
    coordinator = world.coordinator
    coordinator.round, coordinator.announced = 1, (tmp_path / "announced").read_bytes()
    for content in (canonical(coordinator.plan), coordinator.bundle_bytes, coordinator.state_bytes):
        coordinator.publish_blob(content)
    coordinator.transport.publish(coordinator.topics.round(), (tmp_path / "announcement").read_bytes(), retain=True)
    coordinator.outcome(committed=True, survivors=survivors)
    world.start("pi-0")
    world.settle()
    assert kept(world, "pi-0") == (float(rounds), rounds)
    # Whatever was left behind, the next round begins with it and goes on.
    for name in DEVICES[1:]:
        world.start(name)
    next_state(world, 2)
    train(world, 2)
    now, before = sums(world.run_rendezvous(DEVICES))
    assert (now, before) == (111111.0, rounds + sum(kept(world, name)[0] for name in DEVICES[1:]))
    coordinator.outcome(committed=True, survivors=DEVICES)
    world.settle()
    assert kept(world, "pi-0") == (float(rounds + 1), rounds + 1)
    for name in DEVICES:
        world.kill(name)
