"""What the tests of the agent are given: fleets in memory, a device's machine, an example store."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_world import World, make_world
from participation_machine import Machine, machine_of

from edge_agent.examples import ExampleStore


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A fleet without devices yet, with a CA of its own."""
    made = make_world(tmp_path)
    yield made
    for name in list(made.agents):
        made.kill(name)


@pytest.fixture
def world_of_today(tmp_path: Path) -> World:
    """A fleet whose certificates are valid now, for processes that read the machine's clock."""
    return make_world(tmp_path, at=datetime.datetime.now(datetime.UTC))


@pytest.fixture(scope="session")
def motionless_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One enrolled device and a coordinator's identity; nothing runs. For tests of the machine alone."""
    made = make_world(tmp_path_factory.mktemp("world"))
    made.enrol("pi-0", examples={})
    return made


@pytest.fixture
def machine(motionless_world: World) -> Machine:
    """The machine of that one device."""
    return machine_of(motionless_world)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExampleStore]:
    """An empty store of examples, `examples.sqlite`."""
    with ExampleStore(tmp_path / "examples.sqlite") as opened:
        yield opened
