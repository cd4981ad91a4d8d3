"""Fleets of real processes over a real mosquitto, with real signals: whoever dies, the sum is right and rounds go on."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.program import build_program
from coordinator.task import read_task
from simulation.datasets import Examples, device_names
from simulation.process_fleet import peak_rss_mb
from simulation.trial import Trial, read_files
from sottovoce.secagg.lanes import encode, layout_of
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

BUNDLES = Path(__file__).resolve().parents[2] / "simulation" / "bundles"
STAGES = ("advertise_keys", "share_keys", "masked_input", "consistency_check", "unmasking")
SLOW_S = 0.4
"""How long a slow device's questions are on their way: time enough to kill it before it answers."""


@pytest.fixture(scope="module", autouse=True)
def _without_tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no process of a fleet find TensorFlow: a module of that name stands in front of it and cannot be imported."""
    folder = tmp_path_factory.mktemp("front")
    (folder / "tensorflow.py").write_text("raise ImportError('no TensorFlow on this device')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        yield


# --- killed at every stage: the sum is exactly the survivors' ---------------------------------------------------------

SUMS = {"count": 10_000, "sum": 1_000_000, "sum_of_squares": 20_000_000}
PLANTED = np.array([4001, 3989, 3967, 3947, 3931, 3929, 3923, 3919, 3917])
"""The sums of one device, by which its contribution would be known anywhere."""


@dataclass(frozen=True)
class Aftermath:
    """What is left of a fleet of which one agent after the other was killed.

    Attributes:
        trial: The fleet, still running.
        examples: Every device's own.
        victims: Stage -> who was killed in it.
        committed: Stage -> the event of the round that was under way.
        released: Stage -> the sums it released.
    """

    trial: Trial
    examples: Mapping[str, Array]
    victims: Mapping[str, str]
    committed: Mapping[str, Mapping[str, Any]]
    released: Mapping[str, Mapping[str, Array]]


def sums_task(name: str, *, goal: int) -> dict[str, Any]:
    return {
        "name": name,
        "bundle": str(BUNDLES / "moments_har.svp"),
        "collection": "motion",
        "purpose": "Count and add up, to see that a sum is exact.",
        "cohort": {"goal": goal, "minimum": 4},
        "time": {"selection_s": 20, "training_s": 20, "stage_s": 15, "retry_delay_s": 0.2},
        "work": {"batch_size": 2},
        "results": {result: {"maximum": maximum} for result, maximum in SUMS.items()},
    }


def whole_numbers(seed: int) -> Array:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 8, (2 + seed % 4, 128, 9)).astype(np.float32)


def plain_sums(examples: Array) -> dict[str, list[int]]:
    rows = examples.astype(np.int64).reshape(-1, 9)
    return {"count": [len(rows)], "sum": rows.sum(0).tolist(), "sum_of_squares": (rows**2).sum(0).tolist()}


def planted() -> Array:
    examples = np.zeros((1, 128, 9), np.float32)
    examples[0, 77] = PLANTED
    return examples


@pytest.fixture(scope="module")
def aftermath() -> Iterator[Aftermath]:
    devices = device_names(10)
    examples = {device: whole_numbers(seed) for seed, device in enumerate(devices)} | {devices[0]: planted()}
    victims = dict(zip(STAGES, devices[5:], strict=True))
    with Trial() as trial:
        trial.fleet.enrol(devices)
        for device in devices:
            trial.allow(device, minimum_cohort=4, minimum_honest_survivors=2)
            trial.fleet.give_examples(device, "motion", {"x": examples[device]})
        trial.slow_down(victims.values(), delay_s=SLOW_S)
        for stage in STAGES:
            trial.submit(sums_task(f"sums_{stage}", goal=len(devices)))
        trial.start(devices)
        trial.fleet.start_coordinator(until_done=False)
        committed = {stage: killed_in(trial, stage, victim) for stage, victim in victims.items()}
        released = {stage: sums_of(trial, f"sums_{stage}") for stage in STAGES}
        yield Aftermath(trial, examples, victims, committed, released)


def killed_in(trial: Trial, stage: str, victim: str) -> Mapping[str, Any]:
    opened = trial.until("stage", "abandoned", plan=f"sums_{stage}", stage=stage)
    trial.fleet.kill_agent(victim)
    assert victim in opened["expected"]
    return trial.until("committed", "abandoned", plan=f"sums_{stage}")


def sums_of(trial: Trial, task: str) -> dict[str, Array]:
    with trial.journal() as journal:
        number = next(row.id for row in journal.tasks() if row.name == task)
        _, released = journal.state_at(number, 1) or (b"", None)
    return decode_tensors(released or b"")


@pytest.mark.parametrize("stage", STAGES)
def test_with_an_agent_killed_the_sum_is_exactly_that_of_the_survivors(aftermath: Aftermath, stage: str) -> None:
    survivors = aftermath.committed[stage]["survivors"]
    plain = [plain_sums(aftermath.examples[device]) for device in survivors]
    expected = {name: np.sum([each[name] for each in plain], axis=0).tolist() for name in SUMS}
    assert {name: value.tolist() for name, value in aftermath.released[stage].items()} == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_agent_is_reported_lost_in_the_stage_in_which_it_died(aftermath: Aftermath, stage: str) -> None:
    committed, victim = aftermath.committed[stage], aftermath.victims[stage]
    assert committed["dropped"] == {stage: [victim]}
    # From the consistency check on its masked vector is in the sum, and the others can unmask it.
    in_the_sum = STAGES.index(stage) > STAGES.index("masked_input")
    lost = set() if in_the_sum else {victim}
    assert set(committed["survivors"]) == set(committed["cohort"]) - lost
    dead = list(aftermath.victims.values())[: STAGES.index(stage)]
    assert set(committed["cohort"]) == aftermath.examples.keys() - set(dead)
