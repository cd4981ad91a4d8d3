"""Federated programs: killed anywhere, a program ends with the same rounds, the same state and every release once."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sottovoce.errors import ConfigError
from sottovoce.language.programs import Release, federated_program, next_key, read_releases
from sottovoce.values import Record

PROGRAM = '''
"""A five-round program over rounds that somebody else keeps; it kills itself at a point that it is given."""
import os, signal, sqlite3, sys
import numpy as np
from sottovoce.language.programs import federated_program, next_key
from sottovoce.values import Record

folder, die_at = sys.argv[1], int(sys.argv[2])
points = 0

def point():
    global points
    points += 1
    if points == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

class Rounds:
    """Answers by key, durably, as the coordinator's journal does; a second round under one key would show."""
    def __init__(self):
        self.db = sqlite3.connect(folder + "/fleet.sqlite", isolation_level=None)
        self.db.execute("CREATE TABLE IF NOT EXISTS rounds (id INTEGER PRIMARY KEY, key TEXT UNIQUE, asked TEXT)")
    def run(self, asked):
        key = next_key()
        assert key
        point()
        known = self.db.execute("SELECT asked, id FROM rounds WHERE key = ?", (key,)).fetchone()
        if known is None:
            self.db.execute("INSERT INTO rounds (key, asked) VALUES (?, ?)", (key, asked))
            point()
            known = self.db.execute("SELECT asked, id FROM rounds WHERE key = ?", (key,)).fetchone()
        assert known[0] == asked, f"nondeterministic: {known[0]} and {asked} under {key}"
        return known[1]

fleet = Rounds()
with federated_program("five", folder + "/run") as program:
    point()
    size = fleet.run("how many devices")
    state = program.restore(Record({"model": np.zeros(3, np.float32), "seen": (size,)}))
    point()
    for number in program.rounds(5):
        point()
        loss = fleet.run(f"train {number} from {state.model.tolist()}")
        accuracy = fleet.run(f"evaluate {number}")
        point()
        state = Record({"model": state.model + loss, "seen": (*state.seen, loss, accuracy)})
        program.commit(state, release={"round": number, "loss": loss})
        point()
    last = fleet.run("the last question")
    point()
    print(points, state.model.tolist(), state.seen, last, [(r.number, r.value["loss"]) for r in program.releases()])
'''


def _run(folder: Path, die_at: int = 0) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, str(folder / "program.py"), str(folder), str(die_at)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )


def _asked(folder: Path) -> list[str]:
    database = sqlite3.connect(folder / "fleet.sqlite")
    try:
        return [row[0] for row in database.execute("SELECT asked FROM rounds ORDER BY id")]
    finally:
        database.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """What the program prints and asks when nobody kills it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(" ", 1)[1], _asked(folder)


def test_a_program_killed_at_any_point_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: tuple[str, list[str]]
) -> None:
    """Each of the forty-odd points is a SIGKILL of a real process; the next start goes on."""
    printed, asked = undisturbed
    for point in itertools.count(1):
        folder = tmp_path / f"{point}"
        first = _run(folder, die_at=point)
        if first.returncode == 0:
            break
        assert first.returncode == -signal.SIGKILL, first.stderr
        second = _run(folder)
        assert second.returncode == 0, second.stderr
        assert second.stdout.split(" ", 1)[1] == printed
        assert _asked(folder) == asked, "the same rounds, none of them twice"
    assert point > 40, "there were that many points to die at"


def test_a_program_killed_again_and_again_gets_there(tmp_path: Path, undisturbed: tuple[str, list[str]]) -> None:
    for _ in range(60):
        done = _run(tmp_path / "run", die_at=9)
        if done.returncode == 0:
            break
    assert done.stdout.split(" ", 1)[1] == undisturbed[0]
    assert _asked(tmp_path / "run") == undisturbed[1]


def test_state_and_releases_outlive_the_process_that_made_them(tmp_path: Path) -> None:
    with federated_program("five", tmp_path) as program:
        state = program.restore({"weights": np.zeros(2, np.float32)})
        for number in program.rounds(2):
            state = {"weights": state["weights"] + 1}
            program.commit(state, release=Record({"number": number}))
            assert read_releases(tmp_path)[-1].number == number, "others may read while it runs"
    with federated_program("five", tmp_path) as program:
        assert program.position == 2
        np.testing.assert_array_equal(program.restore(None)["weights"], [2, 2])
        assert list(program.rounds(2)) == []
        assert program.releases() == [Release(0, Record({"number": 0})), Release(1, Record({"number": 1}))]


def test_the_first_initial_state_is_the_one_that_counts(tmp_path: Path) -> None:
    """An initial state drawn at random would otherwise be another one after a crash in round 0."""
    with federated_program("five", tmp_path) as program:
        assert program.restore(1) == 1
    with federated_program("five", tmp_path) as program:
        assert program.restore(2) == 1


def test_a_round_without_a_release_releases_nothing(tmp_path: Path) -> None:
    with federated_program("five", tmp_path) as program:
        program.restore(0)
        for number in program.rounds(3):
            program.commit(number, release=number if number == 1 else None)
        assert program.releases() == [Release(1, 1)]


def test_keys_say_the_run_the_round_and_the_call(tmp_path: Path) -> None:
    assert next_key() == ""
    with federated_program("five", tmp_path / "a") as program:
        program.restore(0)
        keys = [next_key(), next_key()]
        for number in program.rounds(2):
            keys += [next_key(), next_key()]
            program.commit(number)
        keys.append(next_key())
    assert next_key() == ""
    run = keys[0].split("/")[1]
    steps = ["start/0", "start/1", "0/0", "0/1", "1/0", "1/1", "end-2/0"]
    assert keys == [f"five/{run}/{step}" for step in steps]
    with federated_program("five", tmp_path / "a") as program:
        program.restore(0)
        assert next_key() == keys[0], "the same place in the same run"
        assert list(program.rounds(2)) == []
        assert next_key() == keys[-1]
    with federated_program("five", tmp_path / "b"):
        assert next_key() != keys[0], "a new folder is a new run: yesterday's sums are not its own"


def test_one_process_at_a_time_runs_a_program(tmp_path: Path) -> None:
    with federated_program("five", tmp_path), pytest.raises(ConfigError, match="another process is running"):
        federated_program("five", tmp_path).__enter__()
    with federated_program("five", tmp_path):
        pass


def test_a_round_that_is_left_without_a_commit_is_run_again(tmp_path: Path) -> None:
    with federated_program("five", tmp_path) as program:
        program.restore("before")
        for number in program.rounds(2):
            if number == 1:
                break
            program.commit("after round 0")
    with federated_program("five", tmp_path) as program:
        assert program.restore("before") == "after round 0"
        assert next(program.rounds(2)) == 1


def test_what_a_program_must_not_do_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be called 'no spaces'"):
        federated_program("no spaces", tmp_path)
    with pytest.raises(ConfigError, match=r"use a federated program in a `with`"):
        federated_program("five", tmp_path).restore(0)
    with federated_program("five", tmp_path / "a") as program:
        with pytest.raises(ConfigError, match=r"restore the state before the first round"):
            next(program.rounds(1))
        program.restore(0)
        with pytest.raises(ConfigError, match=r"there is no round to commit"):
            program.commit(1)
        rounds = program.rounds(2)
        next(rounds)
        with pytest.raises(ConfigError, match=r"round 0 was not committed"):
            next(rounds)
        rounds = program.rounds(2)
        next(rounds)
        with pytest.raises(ConfigError, match=r"the state is a object, which cannot be stored"):
            program.commit(object())
        program.commit(1)
        with pytest.raises(ConfigError, match=r"commit once in each"):
            program.commit(1)
    with pytest.raises(ConfigError, match=r"belongs to the program 'five', not 'other'"):
        federated_program("other", tmp_path / "a").__enter__()
    with pytest.raises(ConfigError, match=r"there is no federated program"):
        read_releases(tmp_path / "nowhere")


def test_a_commit_is_whole_or_not_there(tmp_path: Path) -> None:
    with federated_program("five", tmp_path) as program:
        program.restore("before")
        for number in program.rounds(1):
            other = sqlite3.connect(tmp_path / "program.sqlite")
            other.execute("INSERT INTO releases VALUES (?, x'00')", (number,))
            other.commit()
            other.close()
            with pytest.raises(ConfigError, match="cannot be written"):
                program.commit("after", release=1)
            assert program.position == 0
            break
    with federated_program("five", tmp_path) as program:
        assert program.restore("x") == "before"
