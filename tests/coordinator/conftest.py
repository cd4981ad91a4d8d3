"""What the tests of the coordinator are given: a fleet, a round on a bench, small tasks, a whole coordinator."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_tasks
from choir import Choir
from memory_stage import Player, Stage
from round_bench import START_MS, Bench, MakeBench

from sottovoce.transport.memory import MemoryBroker


@pytest.fixture(scope="session")
def choir(tmp_path_factory: pytest.TempPathFactory) -> Choir:
    """The fleet `choir`."""
    return Choir(tmp_path_factory.mktemp("ca") / "ca")


@pytest.fixture
def bench(choir: Choir) -> MakeBench:
    """Makes a `Bench`."""
    return functools.partial(Bench, choir)


@pytest.fixture(scope="session")
def model_bundle() -> bytes:
    """A bundle that is a model."""
    return tiny_tasks.model_bundle()


@pytest.fixture(scope="session")
def moments_bundle() -> bytes:
    """A bundle that only sums."""
    return tiny_tasks.moments_bundle()


@pytest.fixture
def task_folder(tmp_path: Path, model_bundle: bytes, moments_bundle: bytes) -> Path:
    """A folder with two bundles and two task files."""
    (tmp_path / "tiny.svp").write_bytes(model_bundle)
    (tmp_path / "moments.svp").write_bytes(moments_bundle)
    (tmp_path / "tiny.toml").write_text(tiny_tasks.MODEL_TASK)
    (tmp_path / "moments.toml").write_text(tiny_tasks.SUM_TASK)
    return tmp_path


@pytest.fixture
def request_of(moments_bundle: bytes) -> tiny_tasks.Ask:
    """Makes a request for the sums of the moments bundle."""
    return functools.partial(tiny_tasks.make_request, bundle=moments_bundle)


@pytest.fixture
def stage(choir: Choir, task_folder: Path) -> Iterator[Stage]:
    """A stage with five players, nothing started."""
    broker = MemoryBroker(random.Random(3))
    made = Stage(choir, task_folder, broker, now_ms=START_MS)
    made.players = [Player(broker, choir, name) for name in choir.names(5)]
    yield made
    if made.service is not None:
        made.crash()
