"""The command `scripts/train_mnist`: MNIST as McMahan et al. 2017 train it, on a fleet in memory, every round masked.

100 devices hold 600 pictures each, dealt out at random; ten of them, drawn anew for every round, train from the
server's weights, and only their masked sum is ever seen (arXiv 1602.05629, section 3: IID, C = 0.1, B = 10). The models
are the zoo's; `sottovoce export` turns them into client programs, and the rounds need no TensorFlow any more.

Everything is in one folder: the model, the program's state after the last committed round, and the log. Killed at any
point and called again, the training goes on: on a new fleet of the same devices, with the round that was not committed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

import sottovoce as sv
from simulation.baselines import accuracy
from simulation.datasets import DATA_VARIABLE, MNIST_FILE, DividedData, mnist
from simulation.learning_runs import redrawn
from simulation.memory_fleet import MemoryFleet, fleet
from sottovoce.bundle import Bundle, encode_bundle, read_bundle
from sottovoce.errors import ConfigError, SottovoceError
from sottovoce.language.expressions import Terms
from sottovoce.language.learning import ClientOptimizer, IterativeProcess, build_fed_avg
from sottovoce.language.ports import Bound
from sottovoce.plan import LocalWork
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors

COLLECTION = "mnist"
_CLIP_NORM, _HALF_RANGE, _BITS = 10.0, 0.5, 20
"""What a device's update is held to; an epoch at the rates below stays well inside, so that nothing is lost."""
_LARGEST_LOSS = 10
"""Mean loss above which the metric is cut; a model that guesses has 2.3."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model of the paper is trained.

    Attributes:
        model: A function that returns a Keras model, as `sottovoce export` takes it.
        epochs: E, passes of a device over its examples in a round.
        rate: The devices' learning rate.
        until: The accuracy that the paper counts rounds to.
        rounds: Most rounds that it may take.
    """

    model: str
    epochs: int
    rate: float
    until: float
    rounds: int


RECIPES = {
    "2nn": Recipe("models.zoo.two_nn:two_nn", epochs=1, rate=0.2, until=0.97, rounds=174),
    "cnn": Recipe("models.zoo.mnist_cnn:mnist_cnn", epochs=5, rate=0.1, until=0.99, rounds=40),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What decides how a training goes; another one needs another folder.

    Attributes:
        model: A name in `RECIPES`.
        rate: The devices' learning rate.
        devices: In the fleet.
        examples: Of each device.
        cohort: Devices of a round.
        seed: Of the first weights, the dealing of the examples, the cohorts and the orders.
    """

    model: str
    rate: float
    devices: int = 100
    examples: int = 600
    cohort: int = 10
    seed: int = 1

    @property
    def work(self) -> LocalWork:
        """What a device does in a round."""
        return LocalWork(epochs=RECIPES[self.model].epochs, batch_size=10)

    @property
    def program_name(self) -> str:
        """The name of the federated program, which ties a folder to this setting."""
        name = f"{self.model}-r{self.rate:g}-d{self.devices}x{self.examples}-c{self.cohort}-s{self.seed}"
        return name.replace(".", "_").replace("+", "")

    def process(self, bundle: Bundle) -> IterativeProcess:
        """Return federated averaging of `bundle`."""
        return build_fed_avg(
            bundle,
            ClientOptimizer(self.rate, work=self.work),
            terms=Terms(
                clip_norm=_CLIP_NORM, half_range=_HALF_RANGE, weight_cap=self.examples, bits=_BITS, lane="uint32"
            ),
            metrics={"loss": Bound(0, _LARGEST_LOSS * self.examples), "correct": Bound(0, self.examples)},
        )


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A committed round; a line of the log.

    Attributes:
        round: Counted from 1.
        cohort: Devices that were selected.
        in_sum: Devices in the sum.
        accuracy: Of the averaged model on the test pictures; None where it was not tested.
        loss: Mean over the devices' examples while they trained, in the last epoch.
        correct: Likewise the share that came right.
        seconds: From asking for the round to its sums and the new weights, without the test.
        cpu_seconds: Of this process's processor time, for everything that all devices and the coordinator do.
        bytes_up: What a device sends in the round, on average: above all its masked vector.
        bytes_down: What a device is sent that has kept what earlier rounds published.
    """

    round: int
    cohort: int
    in_sum: int
    accuracy: float | None
    loss: float
    correct: float
    seconds: float
    cpu_seconds: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Goal:
    """When a training ends, and how often it is tested.

    Attributes:
        rounds: The last one, whatever it reaches.
        until: Test accuracy at which it ends earlier.
        test_every: Rounds from test to test, at least 1; the last round is tested in any case.
    """

    rounds: int
    until: float
    test_every: int = 1

    def reached_by(self, line: Line) -> bool:
        """Say whether this line's accuracy is the one that was wished for."""
        return line.accuracy is not None and line.accuracy >= self.until

    def tests(self, number: int) -> bool:
        """Say whether the model is tested after round `number`."""
        return number % self.test_every == 0 or number == self.rounds


def first_model(folder: Path, setting: Setting) -> Bundle:
    """Return the client program with its first weights; exported and kept in `folder` at the first call.

    Raises:
        ConfigError: It cannot be exported; the text is that of `sottovoce export`.
        BadBundle: What is in the folder is no bundle.
    """
    path = folder / "model.svp"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        exported = path.with_suffix(".exported.svp")
        _export(RECIPES[setting.model].model, exported)
        drawn = redrawn(read_bundle(exported)[0], np.random.default_rng(setting.seed))
        exported.write_bytes(encode_bundle(drawn))
        exported.replace(path)
    return read_bundle(path)[0]


def train(setting: Setting, goal: Goal, *, data: DividedData, folder: Path, tell: Callable[[Line], None]) -> list[Line]:
    """Train until the goal is reached, going on where an earlier call was stopped; return a line for every round.

    Args:
        setting: What is trained, and by whom.
        goal: When it ends.
        data: The devices' examples and the test pictures.
        folder: Of this training; a new one begins it.
        tell: Called with every round's line, those of earlier calls first.

    Raises:
        ConfigError: The folder belongs to another setting, or the data or numbers do not fit.
        RoundAbandoned: A round ended without a result; called again, it is tried again.
    """
    bundle = first_model(folder, setting)
    process, program = setting.process(bundle), open_program(bundle)
    with sv.federated_program(setting.program_name, folder) as training, _Log(folder / "log.jsonl", tell) as log:
        state = training.restore(process.initialize())
        for release in training.releases():
            log.append(msgspec.convert(release.value, Line))
        if log.lines and (goal.reached_by(log.lines[-1]) or training.position >= goal.rounds):
            return log.lines
        with _fleet_of(setting, data, training.position) as devices:
            for number in training.rounds(goal.rounds):
                started, started_cpu = time.perf_counter(), time.process_time()
                state, metrics = process.next(state, sv.collection(COLLECTION))
                took = time.perf_counter() - started, time.process_time() - started_cpu
                model = decode_tensors(process.trained(state).initial) if goal.tests(number + 1) else None
                tested = None if model is None else accuracy(program, model, data.test)
                line = _line(number + 1, devices, metrics, accuracy=tested, took=took)
                training.commit(state, release=msgspec.to_builtins(line))
                log.append(line)
                if goal.reached_by(line):
                    break
        return log.lines


class _Log:
    """The log file, written anew at every start from what is committed, so that it has every round once."""

    def __init__(self, path: Path, tell: Callable[[Line], None]) -> None:
        self.lines: list[Line] = []
        self._path = path
        self._tell = tell

    def __enter__(self) -> _Log:
        self._file = open(self._path, "wb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, line: Line) -> None:
        """Write and tell of a line."""
        self.lines.append(line)
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._tell(line)


def _fleet_of(setting: Setting, data: DividedData, position: int) -> contextlib.AbstractContextManager[MemoryFleet]:
    """Return the fleet for what is left after `position` rounds: what they drew is not drawn again."""
    seed = random.Random(f"{setting.seed}/{position}").getrandbits(32)
    collections = {COLLECTION: list(data.devices.values())}
    return fleet(setting.devices, cohort=setting.cohort, collections=collections, seed=seed)


def _line(
    number: int, devices: MemoryFleet, metrics: Any, *, accuracy: float | None, took: tuple[float, float]
) -> Line:
    told = {event: fields for event, fields in devices.events if event in ("selected", "committed")}
    return Line(
        round=number,
        cohort=len(told["selected"]["cohort"]),
        in_sum=len(told["committed"]["survivors"]),
        accuracy=accuracy,
        loss=round(float(metrics.loss), 5),
        correct=round(float(metrics.correct), 5),
        seconds=round(took[0], 3),
        cpu_seconds=round(took[1], 3),
        bytes_up=told["committed"]["bytes_up_per_device"],
        bytes_down=told["committed"]["bytes_down_per_device"],
    )


def _export(model: str, out: Path) -> None:
    """Run `sottovoce export` in a process of its own, so that this one never loads TensorFlow."""
    command = [sys.executable, "-P", "-m", "sottovoce", "export", model, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"sottovoce export {model} failed: {done.stderr.strip()[-1000:]}")


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and print a line for every round; return 0 if the accuracy was reached, 1 if not, 2 for an error."""
    options = _parser().parse_args(arguments)
    recipe = RECIPES[options.model]
    try:
        setting = Setting(
            model=options.model,
            rate=recipe.rate if options.rate is None else options.rate,
            devices=options.devices,
            examples=options.examples,
            cohort=options.cohort,
            seed=options.seed,
        )
        goal = _goal(options, recipe)
        lines = _run(setting, goal, options.data, options.folder or Path("runs") / f"mnist-{options.model}")
    except SottovoceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last round above", file=sys.stderr)
        return 130
    return 0 if goal.reached_by(lines[-1]) else 1


def _parser() -> argparse.ArgumentParser:
    folder = os.environ.get(DATA_VARIABLE, ".")
    where = f"mnist.npz (default: {MNIST_FILE} in the folder that {DATA_VARIABLE} names)"
    kept = "keeps model, state and log; goes on where it was stopped (default: runs/mnist-MODEL)"
    parser = argparse.ArgumentParser(prog="scripts/train_mnist", description=main.__doc__)
    parser.add_argument("model", choices=tuple(RECIPES))
    parser.add_argument("--data", type=Path, default=Path(folder) / MNIST_FILE, metavar="FILE", help=where)
    parser.add_argument("--folder", type=Path, help=kept)
    parser.add_argument("--rounds", type=int, help="at most (default: 174 for 2nn, 40 for cnn)")
    parser.add_argument("--until", type=float, help="accuracy to stop at (default: 0.97 for 2nn, 0.99 for cnn)")
    parser.add_argument("--test-every", type=int, default=1, metavar="N", help="rounds from test to test (default: 1)")
    parser.add_argument("--rate", type=float, help="the devices' learning rate (default: 0.2 for 2nn, 0.1 for cnn)")
    parser.add_argument("--devices", type=int, default=100, help="(default: 100)")
    parser.add_argument("--examples", type=int, default=600, help="of each device (default: 600)")
    parser.add_argument("--cohort", type=int, default=10, help="devices of a round (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    return parser


def _goal(options: argparse.Namespace, recipe: Recipe) -> Goal:
    rounds = recipe.rounds if options.rounds is None else options.rounds
    if rounds < 1 or options.test_every < 1:
        raise ConfigError("--rounds and --test-every must be at least 1")
    return Goal(rounds, recipe.until if options.until is None else options.until, options.test_every)


def _run(setting: Setting, goal: Goal, path: Path, folder: Path) -> list[Line]:
    data = mnist(path, devices=setting.devices, examples=setting.examples, seed=setting.seed)
    console = Console(stderr=True)
    print(f"{setting.program_name}: until {goal.until:.2%} on {len(data.test['y'])} test pictures, in {folder}")
    print("round  cohort  in sum  accuracy    loss  seconds    CPU", flush=True)
    with console.status("the model is exported and the devices get their examples") as status:

        def tell(line: Line) -> None:
            print(_shown(line), flush=True)
            status.update(f"round {line.round + 1} of at most {goal.rounds}: {setting.cohort} devices train")

        lines = train(setting, goal, data=data, folder=folder, tell=tell)
    print(_summary(lines, goal))
    return lines


def _shown(line: Line) -> str:
    tested = "" if line.accuracy is None else f"{line.accuracy:.4f}"
    return (
        f"{line.round:5}  {line.cohort:6}  {line.in_sum:6}  {tested:>8}  {line.loss:6.4f}  "
        f"{line.seconds:7.2f}  {line.cpu_seconds:5.2f}"
    )


def _summary(lines: Sequence[Line], goal: Goal) -> str:
    best = max((line.accuracy for line in lines if line.accuracy is not None), default=0.0)
    outcome = f"{goal.until:.2%} reached in round" if goal.reached_by(lines[-1]) else f"best {best:.2%} up to round"
    seconds, cpu = (statistics.median(getattr(line, name) for line in lines) for name in ("seconds", "cpu_seconds"))
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{outcome} {lines[-1].round}; a round took {seconds:.2f} s, {cpu:.2f} s of one processor (medians); "
        f"this process at most {memory_mb:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
