"""A federated program on a fleet of processes: kill it, the coordinator or a device; it ends as if nobody had."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from five_rounds import GOAL, MINIMUM, ROUNDS

from coordinator.journal_rows import RoundRow
from simulation.datasets import device_names, digits
from simulation.trial import Trial
from sottovoce.language.programs import read_releases

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("five_rounds.py")
FILES = [ROOT / "simulation" / "bundles" / "digits.svp", ROOT / "tests" / "edge_agent" / "visits.svp"]
DEVICES = device_names(GOAL)

HARM = (
    # who is killed, and at which event of the coordinator after the one before
    ("program", {"event": "announced"}),
    ("program", {"event": "stage", "stage": "masked_input"}),
    ("coordinator", {"event": "stage", "stage": "share_keys"}),
    ("device", {"event": "stage", "stage": "masked_input"}),
    ("program", {"event": "committed"}),
    ("coordinator", {"event": "selected"}),
    ("device", {"event": "stage", "stage": "unmasking"}),
    ("coordinator", {"event": "committed"}),
)


class Fleet:
    """A fleet and the program that runs on it, started again whenever it has been killed."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self.trial = trial
        self.folder = folder
        self.killed: set[str] = set()
        self._victims = itertools.cycle(DEVICES[:2])
        self._running: subprocess.Popen[str] | None = None

    def start_program(self) -> None:
        command = [sys.executable, str(PROGRAM), str(self.trial.fleet.config), str(self.folder), *map(str, FILES)]
        self._running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def kill(self, who: str) -> None:
        """Kill one of the three with SIGKILL and start it again."""
        if who == "program":
            assert self._running is not None
            self._running.kill()
            self._running.communicate()
            self.start_program()
        elif who == "coordinator":
            self.trial.fleet.kill_coordinator()
            self.trial.fleet.start_coordinator(until_done=False)
        else:
            device = next(self._victims)
            self.trial.fleet.kill_agent(device)
            self.trial.fleet.start_agent(device)
            self.killed.add(device)

    def finish(self) -> int:
        """Wait for the program's end and return what it prints."""
        assert self._running is not None
        printed, errors = self._running.communicate(timeout=120)
        assert self._running.returncode == 0, errors
        return int(printed)

    def stop(self) -> None:
        if self._running is not None and self._running.poll() is None:
            self._running.kill()
            self._running.communicate()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Trial() as trial:
        trial.fleet.enrol(DEVICES)
        parts = digits(devices=GOAL, seed=1).devices.values()
        for number, (device, examples) in enumerate(zip(DEVICES, parts, strict=True)):
            trial.allow(device, minimum_cohort=MINIMUM, minimum_honest_survivors=2, max_releases_per_state=100)
            trial.fleet.give_examples(device, "digits", examples)
            trial.fleet.give_examples(device, "visits", {"x": np.array([8**number], np.float32)})
        trial.fleet.start_coordinator(until_done=False)
        trial.start(DEVICES)
        made = Fleet(trial, tmp_path / "five")
        try:
            yield made
        finally:
            made.stop()


def committed(fleet: Fleet, task: str) -> list[RoundRow]:
    with fleet.trial.journal() as journal:
        return [row for row in journal.rounds() if row.phase == "committed" and row.task == task]


def _plans(fleet: Fleet, name: str) -> int:
    """How many different plans of this name there were."""
    path = fleet.trial.fleet.coordinator_home / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        query = "SELECT count(DISTINCT plan) FROM rounds WHERE plan_name = ?"
        return int(database.execute(query, (name,)).fetchone()[0])


def test_killed_anywhere_it_ends_with_the_same_rounds(fleet: Fleet) -> None:
    fleet.start_program()
    for who, event in HARM:
        fleet.trial.until(event["event"], **{key: value for key, value in event.items() if key != "event"})
        fleet.kill(who)
    in_slots = fleet.finish()

    trained, counted = committed(fleet, "digits"), committed(fleet, "remembered")
    assert (len(trained), len(counted)) == (ROUNDS, ROUNDS + 1), "every round is committed once, whoever was killed"
    assert _plans(fleet, "digits") == 1, "the plan is the same in every round"
    alternating = sorted([*trained, *counted], key=lambda row: row.round)
    assert [row.task for row in alternating] == ["digits", "remembered"] * ROUNDS + ["remembered"]
    assert [release.value["round"] for release in read_releases(fleet.folder)] == list(range(ROUNDS))

    for number, device in enumerate(DEVICES):
        rounds_kept = in_slots // 8**number % 8
        survived = sum(device in row.survivors for row in counted[:-1])
        if device in fleet.killed or device not in counted[-1].survivors:
            assert rounds_kept <= survived, f"{device} keeps the client state of a round that it did not survive"
        else:
            assert rounds_kept == survived, device
