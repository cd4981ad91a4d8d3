"""Computations on a fleet in memory: what the reference executor says, the devices say too."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import simulation
import sottovoce as sv
from simulation.device_examples import temperatures
from simulation.fleet_terms import Stage
from simulation.memory_fleet import MemoryFleet
from sottovoce.errors import RoundAbandoned

READINGS = [[19.5, 20.5], [21.5], [22.0, 21.0, 24.0], [18.0, 23.5], [30.0]]
THRESHOLD = 21.25


@sv.tf_computation("float32", "float32")
def exceeds(reading, threshold):  # type: ignore[no-untyped-def]
    return reading > threshold


@sv.federated_computation("{float32}@CLIENTS", "float32@SERVER")
def fraction_above(readings, threshold):  # type: ignore[no-untyped-def]
    """Which part of the devices is above a threshold."""
    above = sv.federated_map(exceeds, (readings, sv.federated_broadcast(threshold)))
    return sv.federated_mean(sv.federated_map(sv.cast("float32"), above))


@sv.federated_computation("{int32}@CLIENTS")
def total(values):  # type: ignore[no-untyped-def]
    return sv.federated_sum(values, bound=(-1000, 1000))


visits = sv.client_state("visits", "int32")


@sv.tf_computation("int32", "float32")
def one_more(count, reading):  # type: ignore[no-untyped-def]
    return count + 1


@sv.federated_computation("{float32}@CLIENTS")
def count_visits(readings):  # type: ignore[no-untyped-def]
    """How often the devices of this round have taken part before, summed up."""
    before = visits.read()
    visits.write(sv.federated_map(one_more, (before, readings)))
    return sv.federated_sum(before, bound=(0, 100))


@pytest.fixture(scope="module")
def fleet() -> Iterator[MemoryFleet]:
    """Five devices that know a temperature; what is called inside runs on them."""
    with simulation.fleet(5, collections={"temperature": READINGS}, minimum=3) as made:
        yield made


def test_devices_answer_as_the_reference_does(fleet: MemoryFleet) -> None:
    newest = [readings[-1] for readings in READINGS]
    with sv.use(sv.reference_executor()):
        expected = fraction_above(newest, THRESHOLD)
    assert expected == np.float32(0.8)
    assert fraction_above(sv.latest("temperature"), THRESHOLD) == pytest.approx(expected, abs=1e-6)
    assert fraction_above(newest, THRESHOLD) == pytest.approx(expected, abs=1e-6)
    assert fraction_above(newest[:3], 100.0) == pytest.approx(0.0, abs=1e-6)


def test_several_computations_run_in_one_fleet(fleet: MemoryFleet) -> None:
    assert total([1, -2, 3, 1000, -1000]) == 2
    assert fraction_above(sv.latest("temperature"), 29.0) == pytest.approx(0.2, abs=1e-6)
    assert total([5, 6, 7]) == 18
    assert type(total([5, 6, 7])) is np.int32


def test_inside_the_with_only(fleet: MemoryFleet) -> None:
    rounds = len(fleet.events)
    with sv.use(sv.reference_executor()):
        assert total([1, 2]) == 3
    assert len(fleet.events) == rounds


@pytest.mark.parametrize(
    ("stage", "survives"), [("share_keys", False), ("masked_input", False), ("unmasking", True), ("outcome", True)]
)
def test_client_state_moves_on_for_survivors_only(stage: Stage, survives: bool) -> None:
    with simulation.fleet(5, collections={"temperature": READINGS}, minimum=3) as made:
        assert count_visits(sv.latest("temperature")) == 0
        made.kill(made.devices[1], stage=stage)
        # The dead one was in the sum with the one visit it had before, or it was not in the sum.
        assert count_visits(sv.latest("temperature")) == (5 if survives else 4)
        # All others have been there twice; the dead one has heard how the round ended before it takes part again.
        assert count_visits(sv.latest("temperature")) == 8 + (2 if survives else 1)


def test_client_state_of_an_abandoned_round_is_dropped() -> None:
    with simulation.fleet(4, collections={"temperature": READINGS[:4]}, minimum=4) as made:
        made.kill(made.devices[0], stage="masked_input")
        with pytest.raises(RoundAbandoned):
            count_visits(sv.latest("temperature"))
        assert count_visits(sv.latest("temperature")) == 0
        assert count_visits(sv.latest("temperature")) == 4


@sv.tf_computation("float32")
def inverse(reading):  # type: ignore[no-untyped-def]
    return 1 / reading


@pytest.mark.parametrize("whole", [False, True])
def test_a_device_that_finds_no_number_takes_no_part_and_says_why(whole: bool) -> None:
    """Whatever the bound, and although a cast to whole numbers leaves no NaN behind."""

    @sv.federated_computation("{float32}@CLIENTS")
    def inverses(readings):  # type: ignore[no-untyped-def]
        found = sv.federated_map(inverse, readings)
        return sv.federated_sum(sv.federated_map(sv.cast("int32"), found) if whole else found, bound=(0, 9))

    readings = [[0.5], [1.0], [0.25], [0.0], [-0.5]]
    with simulation.fleet(5, collections={"numbers": readings}, minimum=3) as made:
        assert inverses(sv.latest("numbers")) == pytest.approx(2 + 1 + 4, abs=1e-3)
        told = {fields["device"]: fields["code"] for name, fields in made.events if name == "withdrew"}
        assert told == {made.devices[3]: "non_finite"}


@sv.federated_computation("{float32}@CLIENTS")
def mean_temperature(readings):  # type: ignore[no-untyped-def]
    """The mean temperature of all rooms."""
    return sv.federated_mean(readings, bound=(-40, 60))


def test_the_same_seed_gives_the_same_answer_to_the_last_bit_on_any_link() -> None:
    answers = []
    for faults in ({}, {}, {"loss": 0.2, "duplicate": 0.2, "reorder": 0.2}):
        with simulation.fleet(5, seed=7, **faults):
            answers.append([mean_temperature(sv.latest("temperature")) for _ in range(2)])
    newest = temperatures(5, seed=7)["temperature"][:, -1]
    assert answers[0] == answers[1]
    assert np.allclose(answers, newest.mean(), atol=1e-4)
    with simulation.fleet(5, seed=8):
        assert mean_temperature(sv.latest("temperature")) not in answers[0]


def test_a_cohort_of_a_larger_fleet() -> None:
    with simulation.fleet(30, collections={"number": list(range(30))}, cohort=4) as made:
        sums = [number_sum(sv.latest("number")) for _ in range(3)]
    cohorts = [fields["cohort"] for event, fields in made.events if event == "selected"]
    assert sums == [sum(made.devices.index(device) for device in cohort) for cohort in cohorts]


@sv.federated_computation("{int32}@CLIENTS")
def number_sum(numbers):  # type: ignore[no-untyped-def]
    return sv.federated_sum(numbers, bound=(0, 30))
