"""MNIST over the fleet: how the pictures are dealt out, training that is killed and goes on, and the command."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from simulation.datasets import mnist
from simulation.learning_runs import BUNDLES
from simulation.mnist import Goal, Line, Setting, first_model, main, train
from sottovoce.bundle import read_bundle
from sottovoce.errors import ConfigError
from sottovoce.tensors import decode_tensors

ROOT = Path(__file__).resolve().parents[2]
PIXELS, DEVICES, EXAMPLES = 64, 5, 20
SETTING = Setting(model="2nn", rate=1.0, devices=DEVICES, examples=EXAMPLES, cohort=3)
OPTIONS = ["2nn", "--devices", str(DEVICES), "--examples", str(EXAMPLES), "--cohort", "3", "--rate", "1"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A file like MNIST's, but 8x8 and easy: every tenth pixel is bright, from the label on.

    One test label is wrong, so that 100 % cannot be reached.
    """
    random = np.random.default_rng(7)
    y = {"train": random.integers(0, 10, 120), "test": random.integers(0, 10, 50)}
    x = {part: 255 * (np.arange(PIXELS) % 10 == labels[:, None]).astype(np.uint8) for part, labels in y.items()}
    y["test"][0] = (y["test"][0] + 1) % 10
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=x["train"], y_train=y["train"], x_test=x["test"], y_test=y["test"])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A training's folder that has its model already: one for 8x8, so that nothing needs exporting."""
    made = tmp_path / "training"
    made.mkdir()
    shutil.copy(BUNDLES / "digits.svp", made / "model.svp")
    return made


def log_of(folder: Path) -> list[dict[str, object]]:
    path = folder / "log.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def train_here(pictures: Path, folder: Path, goal: Goal) -> tuple[list[Line], list[Line]]:
    """Return what a training returned and what it told."""
    told: list[Line] = []
    data = mnist(pictures, devices=DEVICES, examples=EXAMPLES, seed=1)
    return train(SETTING, goal, data=data, folder=folder, tell=told.append), told


def test_every_device_gets_its_share_and_no_example_is_dealt_twice(pictures: Path) -> None:
    data = mnist(pictures, devices=6, examples=20, seed=3)
    assert [len(mine["y"]) for mine in data.devices.values()] == [20] * 6
    with np.load(pictures) as stored:
        assert sorted(data.pooled()["y"].tolist()) == sorted(stored["y_train"].tolist())
    assert (data.pooled()["x"].argmax(axis=1) == data.pooled()["y"]).all()
    assert data.pooled()["x"].max() == 1.0
    assert data.pooled()["x"].dtype == np.float32
    again = mnist(pictures, devices=6, examples=20, seed=3)
    assert all((again.devices[name]["y"] == data.devices[name]["y"]).all() for name in data.devices)


def test_a_file_that_is_missing_or_is_not_mnist_is_refused_with_what_to_do(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*absent\.npz: name the file with --data FILE"):
        mnist(tmp_path / "absent.npz", devices=3, examples=1, seed=1)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ConfigError, match=r"other\.npz is not an \.npz with x_train"):
        mnist(tmp_path / "other.npz", devices=3, examples=1, seed=1)
    with pytest.raises(ConfigError, match="has 120 examples, too few for 7 devices with 20 each"):
        mnist(pictures, devices=7, examples=20, seed=1)


def test_training_learns_and_stops_when_the_goal_is_reached(pictures: Path, folder: Path) -> None:
    lines, told = train_here(pictures, folder, Goal(rounds=60, until=0.5))
    assert told == lines
    assert [line.round for line in lines] == [*range(1, len(lines) + 1)]
    assert len(lines) < 60
    assert lines[-1].accuracy is not None
    assert lines[-1].accuracy >= 0.5 > max(line.accuracy or 0 for line in lines[:-1])
    assert {(line.cohort, line.in_sum) for line in lines} == {(3, 3)}
    weights = sum(value.size for value in decode_tensors(read_bundle(folder / "model.svp")[0].initial).values()) - 1
    assert all(line.bytes_up > 4 * weights for line in lines)
    assert [line["round"] for line in log_of(folder)] == [line.round for line in lines]


def test_a_training_goes_on_and_ends_where_it_is_done(pictures: Path, folder: Path) -> None:
    first, _ = train_here(pictures, folder, Goal(rounds=2, until=1.0))
    lines, told = train_here(pictures, folder, Goal(rounds=4, until=1.0))
    assert lines == told
    assert lines[:2] == first
    assert [line.round for line in lines] == [1, 2, 3, 4]
    assert lines[2].loss < lines[0].loss
    assert train_here(pictures, folder, Goal(rounds=4, until=1.0))[0] == lines


def test_only_every_few_rounds_are_tested_and_the_last_one(pictures: Path, folder: Path) -> None:
    lines, _ = train_here(pictures, folder, Goal(rounds=5, until=1.0, test_every=2))
    assert [line.accuracy is None for line in lines] == [True, False, True, False, False]


def test_killed_and_called_again_every_round_is_there_once(pictures: Path, folder: Path) -> None:
    arguments = [*OPTIONS, "--data", str(pictures), "--folder", str(folder), "--until", "1"]
    command = [sys.executable, "-m", "simulation.mnist", *arguments, "--rounds", "1000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        rounds = (line for line in running.stdout if line.split()[0].isdigit())
        for _ in range(3):
            next(rounds)
        running.send_signal(signal.SIGKILL)
    before = log_of(folder)
    assert 3 <= len(before) < 1000
    wanted = len(before) + 3
    assert main([*arguments, "--rounds", str(wanted)]) == 1
    after = log_of(folder)
    assert after[: len(before)] == before
    assert [line["round"] for line in after] == [*range(1, wanted + 1)]


def test_a_killed_training_leaves_no_fleet_in_memory(pictures: Path, folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from simulation import memory_fleet, mnist;"
        "memory_fleet._MEMORY_DISK = Path(sys.argv.pop(1)); mnist.main(sys.argv[1:])"
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = [*OPTIONS, "--data", str(pictures), "--folder", str(folder), "--until", "1"]
    command = [sys.executable, "-c", program, str(disk), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        next(line for line in running.stdout if line.split()[0].isdigit())
        assert list(disk.iterdir())
        running.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while list(disk.iterdir()):
        assert time.monotonic() < deadline, "the killed fleet's folder is still there"
        time.sleep(0.01)


def test_another_setting_needs_another_folder(pictures: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(pictures), "--folder", str(folder), "--rounds", "1"]
    assert main([*OPTIONS, *arguments]) == 1
    assert "1       3       3" in capsys.readouterr().out
    assert main([*OPTIONS[:-1], "0.1", *arguments]) == 2
    assert "belongs to the program '2nn-r1-d5x20-c3-s1'" in capsys.readouterr().err


def test_impossible_numbers_and_a_missing_file_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["2nn", "--rounds", "0"]) == 2
    assert "--rounds and --test-every must be at least 1" in capsys.readouterr().err
    assert main(["2nn", "--data", str(tmp_path / "none.npz")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.shared_data
def test_the_real_model_learns_mnist(shared_data: Path, tmp_path: Path) -> None:
    data = mnist(shared_data / "mnist" / "mnist.npz", devices=5, examples=200, seed=1)
    setting = Setting(model="2nn", rate=0.2, devices=5, examples=200, cohort=5)
    bundle = first_model(tmp_path, setting)
    assert sum(value.size for value in decode_tensors(bundle.initial).values()) == 199_210 + 1
    lines = train(setting, Goal(rounds=3, until=1.0), data=data, folder=tmp_path, tell=lambda line: None)
    assert lines[-1].accuracy is not None
    assert lines[-1].accuracy > 0.6
