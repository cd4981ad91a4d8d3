"""The demonstration `./scripts/demo temperature`: two questions to twenty thermometers; none tells its reading.

A real mosquitto, one coordinator process, one agent process for every device, each with a thermometer of its own: a
CSV that grows, which its agent reads by itself ([source.temperature] in its agent.toml). The questions are the two
computations of `examples/temperature.py`, lowered and saved, then what `sottovoce ask` asks. Nothing here needs
TensorFlow; the answers are compared with what the demo alone knows: all readings.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from coordinator import connect
from simulation.broker_process import BrokerProcess
from simulation.guarded import GuardedFolder
from simulation.overheard import Eavesdropper
from simulation.process_fleet import ProcessFleet
from simulation.report import write_report
from sottovoce.ask import ask_saved
from sottovoce.errors import ConfigError
from sottovoce.language.saved import load_lowered
from sottovoce.wire.messages import Mode

COLLECTION = "temperature"
DEFAULT_DEVICES = 20
THRESHOLD = 21.0
_BUNDLES = Path(__file__).resolve().parent / "bundles"
_SHOWN_DEVICES = 3


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One question and what came of it.

    Attributes:
        question: In words.
        fleet: The answer of the fleet.
        plain: The answer computed from all readings, which only the demo knows.
        seconds: From question to answer.
    """

    question: str
    fleet: float
    plain: float
    seconds: float


class TemperatureReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run; `--report FILE` writes it as JSON.

    Attributes:
        broker: Program and version that carried the messages.
        devices: How many agent processes.
        answers: To the two computations, through `coordinator.connect`.
        asked: What `sottovoce ask` printed, by its arguments.
        ask_seconds: How long each of them took, start of the process included.
        agent_rss_mb_max: Largest resident memory of any agent at any time, MB.
        seconds_total: From start to report, without installation.
    """

    broker: str
    devices: int
    answers: list[Answer]
    asked: dict[str, str]
    ask_seconds: dict[str, float]
    agent_rss_mb_max: float
    seconds_total: float


def main(options: argparse.Namespace, console: Console) -> TemperatureReport:
    """Run the demonstration and print what it found.

    Raises:
        SottovoceError: No broker, a process that failed, a data file that is none.
    """
    started = time.monotonic()
    readings = _readings(options)
    console.print(f"[bold]the temperature at {len(readings)} devices, which none of them tells[/bold]")
    with BrokerProcess() as broker, GuardedFolder("sottovoce-demo-") as guarded:
        fleet = ProcessFleet(guarded, broker)
        with console.status("a broker, a coordinator and the devices are made; everybody gets a key and a certificate"):
            _prepare(fleet, readings, mode=options.mode)
        console.print(
            f"broker on {broker.host}:{broker.port} ({broker.description}), {len(readings)} agent processes\n"
        )
        with Eavesdropper(broker, offset=0, count=4) as eavesdropper:
            with console.status("the agents start and read their thermometers"):
                fleet.start_coordinator(until_done=False)
                fleet.start_agents(list(readings), absent=eavesdropper.absent)
            answers = _ask_programs(fleet, list(readings.values()), console, mode=options.mode)
            eavesdropper.listen()
            overheard = eavesdropper.last
        asked, seconds = _ask_commands(fleet, console, mode=options.mode)
        fleet.watch()
        fleet.stop()
    result = TemperatureReport(
        broker=broker.description,
        devices=len(readings),
        answers=answers,
        asked=asked,
        ask_seconds=seconds,
        agent_rss_mb_max=max(fleet.peak_rss_mb.values()),
        seconds_total=time.monotonic() - started,
    )
    console.print(_table(answers))
    if overheard is not None:
        numbers = " ".join(str(word) for word in overheard.words)
        console.print(
            f"\nWhat the server saw of {overheard.device}, whose thermometer shows {readings[overheard.device]:.2f}: "
            f"{numbers}\nThat is noise until all masks cancel, and they cancel only in the sum."
        )
    console.print(f"\nlargest agent {result.agent_rss_mb_max:.0f} MB, {result.seconds_total:.0f} s in all")
    if options.report:
        write_report(result, options.report)
        console.print(f"report: {options.report}")
    return result


def _readings(options: argparse.Namespace) -> dict[str, float]:
    """Return a reading for every device: from the last line of a CSV with one column a device, or drawn at random."""
    if options.data_file is None:
        count = options.devices or DEFAULT_DEVICES
        drawn = np.random.default_rng(options.seed).normal(20.5, 2.0, count)
        return {f"pi-{number:02}": round(float(value), 2) for number, value in enumerate(drawn, 1)}
    try:
        with open(options.data_file, newline="", encoding="utf-8") as file:
            *_, last = csv.DictReader(file)
        found = {name: float(value) for name, value in last.items()}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--data-file {options.data_file}: write a CSV with one column of numbers a device, their names in its "
            f"first line: {error}"
        ) from error
    return dict(list(found.items())[: options.devices or None])


def _prepare(fleet: ProcessFleet, readings: Mapping[str, float], *, mode: Mode) -> None:
    fleet.enrol(list(readings))
    for device, reading in readings.items():
        thermometer = fleet.home(device).path / "thermometer.csv"
        thermometer.write_text(f"celsius\n{reading - 1}\n{reading}\n")
        fleet.allow(device, modes=f'["{mode}"]')
        with fleet.home(device).config.open("a") as settings:
            settings.write(f'\n[source.{COLLECTION}]\nkind = "file"\npath = "{thermometer}"\nevery_s = 1\n')


def _ask_programs(fleet: ProcessFleet, readings: list[float], console: Console, *, mode: Mode) -> list[Answer]:
    threshold = np.float32(THRESHOLD)
    plain = np.array(readings, np.float32)
    questions: list[tuple[str, str, dict[str, object], float]] = [
        ("mean temperature", "get_mean_temperature", {}, float(plain.mean(dtype=np.float64))),
        (
            f"fraction of devices above {THRESHOLD:g}",
            "get_fraction_over_threshold",
            {"threshold": threshold},
            float((plain > threshold).mean()),
        ),
    ]
    answers = []
    minimum = min(len(readings), 10)
    with connect(fleet.config, goal=len(readings), minimum=minimum, mode=mode) as rounds:
        for words, name, given, expected in questions:
            with console.status(words):
                lowered = load_lowered(_BUNDLES / f"{name}.svc")
                before = time.monotonic()
                found = float(ask_saved(rounds, lowered, COLLECTION, given))
                answers.append(Answer(question=words, fleet=found, plain=expected, seconds=time.monotonic() - before))
            fleet.watch()
    return answers


def _ask_commands(fleet: ProcessFleet, console: Console, *, mode: Mode) -> tuple[dict[str, str], dict[str, float]]:
    asked, seconds = {}, {}
    for words in (
        f"mean {COLLECTION}",
        f"fraction {COLLECTION} --above {THRESHOLD:g}",
        f"histogram {COLLECTION} --low 15 --high 26 --bins 11",
        f"quantile {COLLECTION} --q 0.5 --low 0 --high 50",
    ):
        before = time.monotonic()
        console.print(f"$ sottovoce ask {words}", highlight=False)
        printed = fleet.run_command("sottovoce", "ask", *words.split(), "--config", str(fleet.config), "--mode", mode)
        seconds[words] = time.monotonic() - before
        asked[words] = printed
        console.print(f"{printed}[dim]{seconds[words]:.1f} s[/dim]\n", highlight=False)
    return asked, seconds


def _table(answers: list[Answer]) -> Table:
    table = Table("question", "the fleet's answer", "from all readings", "seconds")
    for answer in answers:
        table.add_row(answer.question, f"{answer.fleet:.6f}", f"{answer.plain:.6f}", f"{answer.seconds:.1f}")
    return table
