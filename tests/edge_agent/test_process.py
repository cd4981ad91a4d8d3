"""The agent as a process of its own, over a real broker: start, kill, resume, stop, visits, memory."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from simulation.broker_process import BrokerProcess
from sottovoce.plan import LocalWork
from sottovoce.transport.mqtt import MqttSettings, MqttTransport
from sottovoce.wire.messages import CheckIn, Ready

PATIENCE_S = 30.0
RSS_LIMIT_MB = 100
READY_WITHIN_CPU_S = 2.0


@dataclasses.dataclass
class Stage:
    """A real broker, the scripted coordinator connected to it, and one enrolled device's process."""

    world: Any
    broker: BrokerProcess
    folder: Path
    processes: list[subprocess.Popen[str]] = dataclasses.field(default_factory=list)

    @property
    def coordinator(self) -> Any:
        return self.world.coordinator

    def launch(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `edge-agent ARGUMENTS` in a Python that has no TensorFlow."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(self.folder / "without"), os.getcwd()))}
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent", *arguments, "--home", str(self.world.homes["pi-0"].path)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        return process

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def until(self, condition: Callable[[], Any]) -> None:
        """Serve the broker until `condition` holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"it never came to that:\n{self.log()}"
            assert self.processes[-1].poll() in (None, 0, -signal.SIGKILL), f"it has failed:\n{self.log()}"
            self.world.clock.now_ms = time.time_ns() // 1_000_000
            event = self.coordinator.transport.receive(0.05)
            if getattr(event, "payload", None):
                self.coordinator._take(event.topic, event.payload)

    def said(self, kind: type) -> list[Any]:
        return list(self.coordinator.said("pi-0", kind))


@pytest.fixture
def stage(world_of_today: Any, tmp_path: Path) -> Iterator[Stage]:
    world = world_of_today
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "tensorflow.py").write_text("raise ImportError('no TensorFlow on devices')\n")
    with BrokerProcess() as broker:
        settings = MqttSettings(host="127.0.0.1", port=broker.port, client_id="coordinator")
        world.coordinator.transport = MqttTransport(settings, rng=random.Random(1))
        world.coordinator.start()
        home = world.enrol("pi-0", port=broker.port)
        settings_text = home.config.read_text()
        home.config.write_text(
            settings_text.replace("# minimum_cohort = 10", "minimum_cohort = 3")
            .replace("# minimum_honest_survivors = 5", "minimum_honest_survivors = 2")
            .replace("# checkpoint_s = 5", "checkpoint_s = 0")
        )
        certificate = world.setup("pi-0").identity.certificate
        world.coordinator.certificates[certificate.fingerprint] = certificate
        world.clock.now_ms = time.time_ns() // 1_000_000
        made = Stage(world, broker, tmp_path)
        try:
            yield made
        finally:
            for process in made.processes:
                process.kill()
                process.communicate()
            world.coordinator.transport.close()


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_mb(process: subprocess.Popen[str]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


def test_an_agent_without_tensorflow_is_ready_soon_stays_small_and_leaves_in_order(stage: Stage) -> None:
    process = stage.launch("run")
    stage.until(lambda: stage.coordinator.statuses.get("pi-0"))
    # Processor time, because this machine may be busy with other tests.
    assert cpu_seconds(process) < READY_WITHIN_CPU_S
    assert peak_rss_mb(process) < RSS_LIMIT_MB
    stage.coordinator.announce()
    stage.until(lambda: stage.said(CheckIn))
    stage.coordinator.select(["pi-0"])
    stage.until(lambda: stage.said(Ready))
    assert peak_rss_mb(process) < RSS_LIMIT_MB
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    stage.until(lambda: stage.coordinator.statuses["pi-0"] is False)
    assert "Traceback" not in stage.log()


def test_killed_in_training_it_goes_on_with_the_batch_that_was_cut_off(stage: Stage) -> None:
    plan = msgspec.structs.replace(stage.coordinator.plan, work=LocalWork(epochs=60, batch_size=2))
    stage.coordinator.plan = plan
    pending = stage.world.homes["pi-0"].pending
    first = stage.launch("run")
    stage.coordinator.announce()
    stage.until(lambda: stage.said(CheckIn))
    stage.coordinator.select(["pi-0"])
    stage.until(lambda: len(list(pending.glob("checkpoint-*"))) == 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    stage.until(lambda: stage.coordinator.statuses["pi-0"] is False)
    stage.launch("run")
    stage.until(lambda: stage.said(Ready))
    resumed = re.search(r"resumed in epoch (\d+) after (\d+) of 20 examples", stage.log())
    ran = re.search(r"ran (\d+) batches", stage.log())
    assert resumed is not None
    assert ran is not None
    before = (int(resumed[1]) - 1) * 10 + int(resumed[2]) // 2
    assert before > 0
    assert before + int(ran[1]) == 60 * 10
    assert len(stage.said(CheckIn)) == 1


def test_one_visit_prints_when_to_come_back(stage: Stage) -> None:
    stage.coordinator.announce(training_ms=3_600_000)
    process = stage.launch("once")
    stage.until(lambda: stage.said(CheckIn))
    stage.coordinator.select(["pi-0"])
    stage.until(lambda: process.poll() is not None)
    assert process.returncode == 0
    assert process.stdout is not None
    assert process.stdout.read().startswith("the work is done; the rendezvous of round 1 is at 20")
    assert stage.said(Ready) == [Ready(present=False)]


def test_a_second_agent_in_the_same_folder_is_refused(stage: Stage) -> None:
    stage.launch("run")
    stage.until(lambda: stage.coordinator.statuses.get("pi-0"))
    second = stage.launch("once")
    assert second.wait(20) == 2
    assert "an agent already runs in" in stage.log()


def test_a_broker_that_is_away_is_waited_for_with_one_line(stage: Stage) -> None:
    stage.broker.kill()
    process = stage.launch("run")
    stage.until(lambda: "no connection to the broker" in stage.log())
    stage.broker.restart()
    stage.until(lambda: stage.coordinator.statuses.get("pi-0"))
    assert process.poll() is None
    lines = [line for line in stage.log().splitlines() if "connection to the broker" in line]
    assert len(lines) == 1
