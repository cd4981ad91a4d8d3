"""Programs drawn at random give on a fleet what the reference executor gives, within what their plans declare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from generated_programs import LARGEST, Drawn, flat, members, programs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import simulation
import sottovoce as sv
from coordinator import connect
from simulation.memory_fleet import MemoryFleet
from simulation.trial import Trial
from sottovoce.errors import ConfigError, TransportError
from sottovoce.language.lowered import Lowered
from sottovoce.language.lowering import lower

DEVICES = 4
_ONE_BY_ONE = settings(
    deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False
)
"""Every example is a real round: nothing is tried again, and nothing is shrunk."""


def agree(lowered: Lowered, found: Any, expected: Any, *, devices: int) -> None:
    """Whole numbers are equal; real ones differ by less than the plan's quantisation, and the rounding of float32."""
    errors = lowered.errors(devices)
    assert len(errors) == len(flat(expected)) == len(flat(found))
    for error, have, want in zip(errors, flat(found), flat(expected), strict=True):
        assert have.dtype == want.dtype
        if want.dtype.kind != "f":
            assert np.array_equal(have, want)
            continue
        assert error is not None, "every result of these programs has a declared error"
        rounding = 8 * devices * np.finfo(np.float32).eps * np.maximum(np.abs(want), 1.0) * LARGEST
        assert np.all(np.abs(have.astype(np.float64) - want) <= error + rounding), (have, want, error)


@pytest.fixture(scope="module")
def fleet() -> Iterator[MemoryFleet]:
    """Devices that get their values with every program."""
    with simulation.fleet(DEVICES, minimum=3) as made:
        yield made


def one_by_one(drawn: Drawn, values: list[dict[str, Any]]) -> None:
    """Run a program in both executors and compare."""
    with sv.use(sv.reference_executor()):
        expected = drawn.program(values, drawn.limit)
    found = drawn.program(values, drawn.limit)
    agree(lower(drawn.program), found, expected, devices=len(values))


lists_of_members = st.lists(members(), min_size=3, max_size=DEVICES)


@seed(1)
@settings(_ONE_BY_ONE, max_examples=25)
@given(programs(), lists_of_members)
def test_a_fleet_answers_as_the_reference_does(fleet: MemoryFleet, drawn: Drawn, values: list[dict[str, Any]]) -> None:
    one_by_one(drawn, values)


@pytest.mark.slow
@seed(2)
@settings(_ONE_BY_ONE, max_examples=200)
@given(programs(), lists_of_members)
def test_two_hundred_programs(fleet: MemoryFleet, drawn: Drawn, values: list[dict[str, Any]]) -> None:
    one_by_one(drawn, values)


# --- on agent processes, over a real mosquitto ------------------------------------------------------------------------

NAMES = [f"pi-{number}" for number in range(1, DEVICES + 1)]


@pytest.fixture(scope="module")
def deployed() -> Iterator[tuple[Trial, list[dict[str, Any]]]]:
    """A running fleet of processes; every device holds one example of the members' type."""
    random = np.random.default_rng(7)
    values = [
        {
            "f": np.float32(random.uniform(-LARGEST, LARGEST)),
            "v": random.uniform(-LARGEST, LARGEST, 3).astype(np.float32),
            "i": np.int32(random.integers(-LARGEST, LARGEST)),
            "b": bool(random.integers(2)),
            "n": {
                "x": np.float32(random.uniform(-LARGEST, LARGEST)),
                "k": random.integers(-LARGEST, LARGEST, 2).astype(np.int32),
            },
        }
        for _ in NAMES
    ]
    with Trial() as trial:
        trial.fleet.enrol(NAMES)
        for name, value in zip(NAMES, values, strict=True):
            columns = {**{key: value[key] for key in "fvib"}, **{f"n_{key}": value["n"][key] for key in "xk"}}
            trial.fleet.give_examples(
                name, "numbers", {key: np.asarray(each)[np.newaxis] for key, each in columns.items()}
            )
            trial.allow(name, modes='["curious"]', minimum_cohort=3, minimum_honest_survivors=2)
        trial.fleet.start_coordinator(until_done=False)
        trial.start(NAMES)
        trial.wait(lambda: _runs(trial), "a coordinator that has made its journal")
        yield trial, values


def _runs(trial: Trial) -> bool:
    """Say whether the coordinator can be asked by now: its agents may be online before it is."""
    try:
        with connect(trial.fleet.config, goal=DEVICES, minimum=3, mode="curious"):
            return True
    except (ConfigError, TransportError):
        return False


def _deployed(deployed: tuple[Trial, list[dict[str, Any]]], drawn: Drawn) -> None:
    trial, values = deployed
    with sv.use(sv.reference_executor()):
        expected = drawn.program(values, drawn.limit)
    with connect(trial.fleet.config, goal=DEVICES, minimum=3, mode="curious", timeout_s=60):
        found = drawn.program(sv.latest("numbers"), drawn.limit)
    agree(lower(drawn.program), found, expected, devices=DEVICES)


@seed(3)
@settings(_ONE_BY_ONE, max_examples=4)
@given(programs())
def test_a_deployed_fleet_answers_as_the_reference_does(
    deployed: tuple[Trial, list[dict[str, Any]]], drawn: Drawn
) -> None:
    _deployed(deployed, drawn)


@pytest.mark.slow
@seed(4)
@settings(_ONE_BY_ONE, max_examples=20)
@given(programs())
def test_twenty_programs_deployed(deployed: tuple[Trial, list[dict[str, Any]]], drawn: Drawn) -> None:
    _deployed(deployed, drawn)
