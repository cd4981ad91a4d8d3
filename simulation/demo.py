"""The demonstration: `./scripts/demo digits` and `./scripts/demo har`.

A real mosquitto on a free loopback port, one coordinator process, one agent process for every device. One agent is
killed with SIGKILL in the middle of a rendezvous and comes back two rounds later. What is printed at the end is
measured in this run; nothing is left behind.
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from rich.console import Console
from rich.live import Live

from coordinator.journal import Journal
from simulation import attack_demo, baselines, report, temperature_demo, words_demo
from simulation.broker_process import BrokerProcess
from simulation.datasets import DividedData, digits, people
from simulation.demo_options import read_options
from simulation.guarded import GuardedFolder
from simulation.overheard import Eavesdropper, Overheard
from simulation.process_fleet import EventReader, FleetFailed, ProcessFleet
from sottovoce.bundle import Bundle, read_bundle
from sottovoce.errors import SottovoceError
from sottovoce.plan import LocalWork
from sottovoce.runtime import Program, open_program
from sottovoce.tensors import decode_tensors
from sottovoce.wire.messages import Mode

HERE = Path(__file__).resolve().parent
TASKS = HERE / "tasks"
BUNDLES = HERE / "bundles"
_POLL_S = 0.05
_STALLED_S = 180.0
_AWAY_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Demo:
    """One kind of demonstration.

    Attributes:
        name: On the command line; also of the task file, the bundle and the collection.
        title: One line that says what is going on.
        rounds: How many, unless --rounds says otherwise.
    """

    name: str
    title: str
    rounds: int


DEMOS = {
    "digits": Demo("digits", "handwritten digits on {n} devices, unevenly divided", 15),
    "har": Demo("har", "what a phone's owner is doing, {n} people, tested on 9 others", 20),
}


@dataclass
class Run:
    """What is known so far about a running demonstration.

    Attributes:
        rounds: The committed rounds.
        abandoned: Reasons of abandoned rounds.
        states: Digest of the state after each committed round.
        now: What is going on, in words.
        victim: The device that is killed, while it is away.
    """

    rounds: list[report.RoundReport] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    states: list[bytes] = field(default_factory=list)
    now: str = "waiting for the devices"
    victim: str | None = None


class Demonstration:
    """Runs one demo: owns the fleet's processes, follows the coordinator's events, evaluates each global model."""

    def __init__(self, demo: Demo, data: DividedData, *, rounds: int, mode: Mode, kill_in_round: int | None) -> None:
        """Prepare the demonstration of `demo` on `data`; `kill_in_round` is the round in which one agent dies."""
        self.mode = mode
        self.demo = demo
        self.data = data
        self.total_rounds = rounds
        self.kill_in_round = kill_in_round
        self.run = Run()
        self.task: dict[str, Any] = tomllib.loads((TASKS / f"{demo.name}.toml").read_text())
        self.bundle: Bundle = read_bundle(BUNDLES / f"{demo.name}.svp")[0]
        self.program: Program = open_program(self.bundle)

    @property
    def devices(self) -> list[str]:
        """All device ids."""
        return list(self.data.devices)

    @property
    def shown(self) -> int:
        """Which coordinate of the update is shown first at the end: one that the middle of the input decides."""
        return self.bundle.results[0].ports[0].tensor_type.size * 9 // 16

    def prepare(self, fleet: ProcessFleet) -> None:
        """Enrol everybody, give every device its examples, submit the task."""
        fleet.enrol(self.devices)
        for device, examples in self.data.devices.items():
            fleet.give_examples(device, self.demo.name, examples)
            fleet.allow(device, modes=f'["{self.mode}"]')
        fleet.submit(self._task(fleet.folder))

    def follow(self, fleet: ProcessFleet, eavesdropper: Eavesdropper, console: Console) -> None:
        """Start the processes and follow the rounds until the task is finished.

        Raises:
            FleetFailed: A process ended by itself, or nothing happened for a long time.
        """
        reader = EventReader(fleet.events)
        fleet.start_coordinator()
        fleet.start_agents(self.devices, absent=eavesdropper.absent)
        last_event = time.monotonic()
        with Live(self._display(), console=console, refresh_per_second=4) as live:
            while fleet.watch() is None:
                for event in reader.new():
                    last_event = time.monotonic()
                    before = self.run.now
                    self._on_event(fleet, event)
                    live.update(self._display())
                    if not console.is_terminal and self.run.now != before:
                        console.print(self.run.now, markup=False)
                eavesdropper.listen()
                if time.monotonic() - last_event > _STALLED_S:
                    raise FleetFailed(f"nothing happened for {_STALLED_S:.0f} s; {fleet.log('coordinator')}")
                time.sleep(_POLL_S)
            for event in reader.new():
                self._on_event(fleet, event)
            self.run.now = ""
            live.update(self._display())
        if not console.is_terminal:
            console.print()

    def compare(self, console: Console) -> tuple[float, float]:
        """Return the accuracy of each device alone (mean) and of all data pooled, after as many local epochs."""
        work = self.task["work"]
        whole = LocalWork(epochs=work["epochs"] * self.total_rounds, batch_size=work["batch_size"])
        learning_rate = np.array([self.task["optimizer"]["learning_rate"]], np.float32)
        start = {**decode_tensors(self.bundle.initial), "learning_rate": learning_rate}
        parts = {**self.data.devices, "everybody": self.data.pooled()}
        scores = {}
        with console.status("") as status:
            for number, (name, examples) in enumerate(parts.items(), 1):
                status.update(f"for comparison: training on the data of {name} alone ({number} of {len(parts)})")
                broadcast = baselines.standardised(self.bundle, start, examples)
                trained = baselines.train_alone(
                    self.program, self.bundle, whole, broadcast=broadcast, examples=examples
                )
                scores[name] = baselines.accuracy(self.program, trained, self.data.test)
        pooled = scores.pop("everybody")
        return sum(scores.values()) / len(scores), pooled

    def _task(self, folder: Path) -> Path:
        """Write this run's task file: the one in the repository with this run's devices and rounds."""
        count = len(self.devices)
        task = copy.deepcopy(self.task)
        task["rounds"] = self.total_rounds
        task["secagg"] = {"mode": self.mode}
        task["cohort"] |= {"goal": count, "minimum": min(count, max(10, round(0.6 * count)))}
        for table in (task, task.get("standardise", {})):
            if "bundle" in table:
                table["bundle"] = str((TASKS / table["bundle"]).resolve())
        path = folder / f"{self.demo.name}.toml"
        path.write_text(tomli_w.dumps(task))
        return path

    def _on_event(self, fleet: ProcessFleet, event: dict[str, Any]) -> None:
        training = event.get("plan") == self.demo.name
        match event["event"]:
            case "announced":
                self.run.now = (
                    f"round {event['round'] + 1}: devices check in" if training else "measuring the inputs' scale"
                )
            case "selected":
                self.run.now = f"round {event['round'] + 1}: {len(event['cohort'])} devices train on their own data"
            case "stage":
                self.run.now = f"round {event['round'] + 1}: rendezvous, {event['stage'].replace('_', ' ')}"
                if training and event["stage"] == "share_keys" and event["round"] == self.kill_in_round:
                    self._kill_one(fleet, event["expected"])
            case "abandoned":
                self.run.abandoned.append(event["reason"])
                self.run.now = f"round {event['round'] + 1} abandoned: {event['reason']}; trying again"
            case "committed" if training:
                self._on_committed(fleet, event)

    def _kill_one(self, fleet: ProcessFleet, present: Sequence[str]) -> None:
        self.run.victim = sorted(present)[-1]
        self.kill_in_round = None
        fleet.kill_agent(self.run.victim)

    def _on_committed(self, fleet: ProcessFleet, event: dict[str, Any]) -> None:
        digest = bytes.fromhex(event["state"])
        with Journal.open_read_only(fleet.coordinator_home / "journal.sqlite") as journal:
            state = journal.state(digest)
        if state is None:
            raise FleetFailed(f"the journal does not hold the committed state {event['state'][:12]}")
        self.run.states.append(state)
        self.run.rounds.append(
            report.RoundReport(
                round=event["round"],
                cohort=len(event["cohort"]),
                survivors=len(event["survivors"]),
                dropped=event["dropped"],
                accuracy=baselines.accuracy(self.program, decode_tensors(state), self.data.test),
                bytes_up_per_device=event["bytes_up_per_device"],
                bytes_down_per_device=event["bytes_down_per_device"],
                seconds=event["seconds"],
            )
        )
        victim = self.run.victim
        if victim is not None and event["round"] >= self._round_of_death() + _AWAY_ROUNDS:
            fleet.start_agent(victim)
            self.run.victim = None

    def _round_of_death(self) -> int:
        return next(r.round for r in self.run.rounds if any(self.run.victim in ids for ids in r.dropped.values()))

    def _display(self) -> Any:
        return report.rounds_table(self.run.rounds, running=self.run.now)


_KINDS: Mapping[str, Callable[[argparse.Namespace, Console], object]] = {
    "attack": attack_demo.main,
    "temperature": temperature_demo.main,
    "words": words_demo.main,
}
"""The demonstrations that do not train a model over several rounds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo named on the command line; return the exit code."""
    options = read_options(arguments)
    console = Console()
    # A closed terminal or `kill` ends the demo as Ctrl-C does: through every `with` block, leaving nothing behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        _KINDS.get(options.kind, demonstrate)(options, console)
    except KeyboardInterrupt:
        console.print("\nstopped; nothing was left behind")
        return 130
    except (SottovoceError, TimeoutError) as error:
        Console(stderr=True).print(f"demo: {error}", markup=False, highlight=False)
        return 1
    return 0


def demonstrate(options: argparse.Namespace, console: Console) -> report.DemoReport:
    """Run one whole demonstration and print what it found.

    Raises:
        SottovoceError: No broker, a process that failed, data that is not there.
    """
    started = time.monotonic()
    demo = DEMOS[options.kind]
    data = _data(options)
    rounds = options.rounds or demo.rounds
    console.print(f"[bold]{demo.title.format(n=len(data.devices))}[/bold]")
    kill_in_round = None if options.no_kill else min(2, rounds - 1)
    demonstration = Demonstration(demo, data, rounds=rounds, mode=options.mode, kill_in_round=kill_in_round)
    with BrokerProcess() as broker, GuardedFolder("sottovoce-demo-") as guarded:
        fleet = ProcessFleet(guarded, broker)
        with console.status("a broker, a coordinator and the devices are made; everybody gets a key and a certificate"):
            demonstration.prepare(fleet)
        version = broker.description
        console.print(f"broker on {broker.host}:{broker.port} ({version}), {len(data.devices)} agent processes\n")
        with Eavesdropper(broker, offset=demonstration.shown) as eavesdropper:
            demonstration.follow(fleet, eavesdropper, console)
        fleet.stop()
    alone, pooled = demonstration.compare(console)
    run = demonstration.run
    result = report.DemoReport(
        broker=version,
        rounds=run.rounds,
        abandoned=run.abandoned,
        accuracy_alone_mean=alone,
        accuracy_together=run.rounds[-1].accuracy,
        accuracy_pooled=pooled,
        agent_rss_mb_max=max(fleet.peak_rss_mb.values()),
        agent_ready_seconds_max=max(eavesdropper.online_after(fleet.started_s).values()),
        seconds_total=time.monotonic() - started,
    )
    _print_end(console, demonstration, result, eavesdropper.last)
    plot = options.plot or Path(f"demo-{demo.name}.png")
    report.plot_accuracy(result, plot, title=demo.title.format(n=len(data.devices)))
    console.print(f"plot: {plot}")
    if options.report:
        report.write_report(result, options.report)
        console.print(f"report: {options.report}")
    return result


def _print_end(
    console: Console, demonstration: Demonstration, result: report.DemoReport, overheard: Overheard | None
) -> None:
    console.print()
    console.print(report.comparison_table(result))
    if overheard is not None and len(demonstration.run.states) > 1:
        before, after = (decode_tensors(state) for state in demonstration.run.states[-2:])
        first = demonstration.bundle.results[0].updates[0]
        learned = (after[first] - before[first]).reshape(-1)[demonstration.shown :][: len(overheard.words)]
        console.print()
        console.print(report.overheard_table(overheard.device, overheard.words, [float(v) for v in learned]))
    console.print(
        f"\nlargest agent {result.agent_rss_mb_max:.0f} MB, slowest start {result.agent_ready_seconds_max:.1f} s, "
        f"{result.seconds_total:.0f} s in all"
    )


def _data(options: argparse.Namespace) -> DividedData:
    if options.kind == "digits":
        return digits(devices=options.devices or 12, seed=options.seed)
    data = people(options.data_file)
    chosen = list(data.devices)[: options.devices or None]
    return DividedData({name: data.devices[name] for name in chosen}, data.test)


if __name__ == "__main__":
    sys.exit(main())
