"""The command `scripts/bench_learning`: how well the methods of `sottovoce.language` learn, as tables.

`har` compares the server optimizers on real people's movements: 21 people train, 9 whom nobody has trained on are the
test. `digits` compares SCAFFOLD with federated averaging where every device holds two of ten classes. `tune` shows what
the settings of `har` were chosen from: half of the training people train, the other half judge, the test people are not
looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from simulation.datasets import DividedData, digits_by_label, people
from simulation.learning_runs import BUNDLES, Method, accuracies, with_moments
from simulation.learning_settings import HAR_CHOSEN, HAR_TRIED, HarSetting, digits_methods
from sottovoce.bundle import Bundle, read_bundle
from sottovoce.errors import ConfigError, SottovoceError

_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table.

    Attributes:
        method: The method with its settings.
        accuracies: Of every seed, round by round.
        seconds: What all of it took.
    """

    method: str
    accuracies: tuple[tuple[float, ...], ...]
    seconds: float

    def after(self, rounds: int) -> list[float]:
        """Return every seed's accuracy after so many rounds."""
        return [run[rounds - 1] for run in self.accuracies]


def har_lines(path: Path, settings: Iterable[HarSetting], *, rounds: int, seeds: Sequence[int]) -> Iterable[Line]:
    """Yield a line for every setting, tested on the people who were held out."""
    data = people(path)
    bundle = with_moments(read_bundle(BUNDLES / "har.svp")[0], data.devices)
    return (_line(setting.method, bundle, lambda _: data, rounds=rounds, seeds=seeds) for setting in settings)


def tuning_lines(path: Path, settings: Iterable[HarSetting], *, rounds: int, seeds: Sequence[int]) -> Iterable[Line]:
    """Yield a line for every setting, judged by half of the training people; the test people are not looked at."""
    data = _halved(people(path))
    bundle = with_moments(read_bundle(BUNDLES / "har.svp")[0], data.devices)
    return (_line(setting.method, bundle, lambda _: data, rounds=rounds, seeds=seeds) for setting in settings)


def digits_lines(*, devices: int, rounds: int, seeds: Sequence[int]) -> Iterable[Line]:
    """Yield a line for every method and rate; every seed divides the digits anew."""
    for bundle_name, method in digits_methods(devices):
        bundle = read_bundle(BUNDLES / bundle_name)[0]
        yield _line(
            method, bundle, lambda seed: digits_by_label(devices=devices, seed=seed), rounds=rounds, seeds=seeds
        )


def _halved(data: DividedData) -> DividedData:
    names = sorted(data.devices)
    judges = DividedData({name: data.devices[name] for name in names[::2]}, data.test).pooled()
    return DividedData({name: data.devices[name] for name in names[1::2]}, judges)


def _line(
    method: Method, bundle: Bundle, divided: Callable[[int], DividedData], *, rounds: int, seeds: Sequence[int]
) -> Line:
    started = time.perf_counter()
    runs = tuple(tuple(accuracies(method, bundle, divided(seed), rounds=rounds, seed=seed)) for seed in seeds)
    return Line(method.name, runs, time.perf_counter() - started)


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a comparison, print its table, and return the exit code."""
    options = _parser().parse_args(arguments)
    console = Console(width=_WIDTH)
    try:
        lines = _lines(options)
        shown = [_shown(line, options.rounds, console) for line in lines]
    except SottovoceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(_table(shown, options.rounds))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in shown], indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench_learning", description=__doc__)
    parser.add_argument("what", choices=("har", "digits", "tune"))
    parser.add_argument("--data", type=Path, metavar="FILE", help="har.npz, for har and tune")
    parser.add_argument("--rounds", type=int, default=20, help="(default: 20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--devices", type=int, default=10, help="of digits (default: 10)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only settings with this in their names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every accuracy there")
    return parser


def _lines(options: argparse.Namespace) -> Iterable[Line]:
    if options.rounds < 1:
        raise ConfigError("--rounds must be at least 1")
    if options.what == "digits":
        return digits_lines(devices=options.devices, rounds=options.rounds, seeds=options.seeds)
    if options.data is None:
        raise ConfigError(f"{options.what} needs --data FILE, a har.npz as simulation.datasets.people reads")
    settings = HAR_CHOSEN if options.what == "har" else HAR_TRIED
    wanted = [setting for setting in settings if options.only in setting.method.name]
    run = har_lines if options.what == "har" else tuning_lines
    return run(options.data, wanted, rounds=options.rounds, seeds=options.seeds)


def _shown(line: Line, rounds: int, console: Console) -> Line:
    """Tell of a line as soon as it is there: a whole table takes an hour."""
    found = " ".join(f"{value:.4f}" for value in line.after(rounds))
    console.print(f"{line.method}: {found} ({line.seconds:.0f} s)")
    return line


def _table(lines: Sequence[Line], rounds: int) -> Table:
    marks = sorted({mark for mark in (5, 10, 15, 20, 50, rounds) if mark <= rounds})
    table = Table(title=f"accuracy: median over the seeds after each number of rounds, and every seed after {rounds}")
    table.add_column("method")
    for mark in marks:
        table.add_column(str(mark), justify="right")
    table.add_column("every seed")
    for line in lines:
        medians = [f"{median(line.after(mark)):.3f}" for mark in marks]
        table.add_row(line.method, *medians, " ".join(f"{value:.3f}" for value in sorted(line.after(rounds))))
    return table


if __name__ == "__main__":
    sys.exit(main())
