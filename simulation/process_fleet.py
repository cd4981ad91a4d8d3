"""A whole fleet as real processes on this machine: a broker, one coordinator, many agents.

The fleet's CA lives in the folder only until everybody is enrolled; then its private key is deleted, so nothing that
runs afterwards could issue an identity.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_agent.config import BrokerConfig
from edge_agent.examples import ExampleStore
from edge_agent.home import Home, init_home
from simulation.broker_process import BrokerProcess
from simulation.datasets import Examples
from simulation.guarded import GuardedFolder
from sottovoce.authority import Authority, create_authority, sign_request
from sottovoce.errors import SottovoceError

FLEET = "demo"
_GRACE_S = 10.0
_STARTING_TOGETHER = 2
_ONLINE_S = 180.0


class FleetFailed(SottovoceError):
    """A process of the fleet ended although nobody asked it to; the text ends with its log."""


class ProcessFleet:
    """The processes of one fleet and their folders.

    Attributes:
        broker: The running broker.
        folder: Where everything lives; removed together with `guarded`.
        peak_rss_mb: Device id -> largest resident memory seen so far, MB.
        started_s: Device id -> when its agent was first started, on the monotonic clock.
    """

    def __init__(self, guarded: GuardedFolder, broker: BrokerProcess) -> None:
        """Use the (entered) `guarded` folder and the (running) `broker`."""
        self._guarded = guarded
        self.broker = broker
        self.folder = guarded.path
        self.peak_rss_mb: dict[str, float] = {}
        self.started_s: dict[str, float] = {}
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._coordinator: subprocess.Popen[bytes] | None = None

    @property
    def coordinator_home(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "coordinator"

    @property
    def config(self) -> Path:
        """The coordinator's settings."""
        return self.coordinator_home / "coordinator.toml"

    @property
    def events(self) -> Path:
        """Where the coordinator writes what happens, one JSON object a line."""
        return self.folder / "events.jsonl"

    def home(self, device: str) -> Home:
        """The folder of one device."""
        return Home(self.folder / "devices" / device)

    def enrol(self, devices: Sequence[str]) -> None:
        """Make the coordinator and `devices` with their keys, sign their certificates, then delete the CA's key."""
        now = datetime.datetime.now(datetime.UTC)
        authority = create_authority(self.folder / "ca", fleet=FLEET, at=now)
        self._enrol_coordinator(authority, now)
        for device in devices:
            home = init_home(
                self.home(device).path,
                device=device,
                fleet=FLEET,
                broker=BrokerConfig(
                    host=self.broker.host, port=self.broker.port, protocol=self.broker.protocol, tls=False
                ),
            )
            home.certificate.write_bytes(sign_request(authority, home.request.read_bytes(), at=now).pem)
            home.fleet_ca.write_bytes(authority.certificate_file.read_bytes())
        authority.key_file.unlink()

    def _enrol_coordinator(self, authority: Authority, now: datetime.datetime) -> None:
        broker = f"{self.broker.host}:{self.broker.port}"
        home = str(self.coordinator_home)
        self.run_command("coordinator", "init", "--home", home, "--fleet", FLEET, "--broker", broker)
        request = (self.coordinator_home / "request.csr").read_bytes()
        issued = sign_request(authority, request, at=now, role="coordinator")
        (self.coordinator_home / "certificate.pem").write_bytes(issued.pem)
        (self.coordinator_home / "fleet-ca.pem").write_bytes(authority.certificate_file.read_bytes())
        settings = self.config.read_text().replace('protocol = "5"', f'protocol = "{self.broker.protocol}"')
        self.config.write_text(settings)

    def allow(self, device: str, **policy: object) -> None:
        """Write settings into the agent.toml of `device`, in place of the defaults."""
        settings = self.home(device).config
        text = settings.read_text()
        for rule, value in policy.items():
            text, found = re.subn(rf"(?m)^(# )?{rule} = .*$", f"{rule} = {value}", text)
            assert found == 1, f"agent.toml has one line for {rule}"
        settings.write_text(text)

    def give_examples(self, device: str, collection: str, examples: Examples) -> None:
        """Import `examples` on `device`, through the same file import that its owner would use."""
        file = self.folder / f"{device}.npz"
        np.savez(file, **examples)  # type: ignore[arg-type]
        with ExampleStore(self.home(device).examples) as store:
            store.import_file(collection, file, now_s=time.time())
        file.unlink()

    def submit(self, task: Path) -> None:
        """Hand the task file to the coordinator."""
        self.run_command("coordinator", "submit", str(task), "--config", str(self.config))

    def run_command(self, module: str, *arguments: str) -> str:
        """Run one command of ours to its end and return what it printed.

        Raises:
            FleetFailed: It did not exit with 0.
        """
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise FleetFailed(f"`{module} {' '.join(arguments)}` ended with {done.returncode}:\n{done.stderr.strip()}")
        return done.stdout

    def start_coordinator(self, *, until_done: bool = True) -> None:
        """Start the coordinator; with `until_done` it ends when its queue is empty."""
        arguments = ["run", "--config", str(self.config), "--events", str(self.events)]
        self._coordinator = self._spawn("coordinator", *arguments, *(["--once"] if until_done else []))

    def start_agent(self, device: str) -> None:
        """Start the resident agent of `device`."""
        self.started_s.setdefault(device, time.monotonic())
        self._agents[device] = self._spawn("edge_agent", "run", "--home", str(self.home(device).path), log=device)

    def start_agents(self, devices: Sequence[str], *, absent: Callable[[Iterable[str]], int]) -> None:
        """Start the agents of `devices` and return when all are online; a few at a time, for they share one machine.

        Args:
            devices: Whose.
            absent: Returns how many of some devices are not online yet.

        Raises:
            FleetFailed: A process ended.
            TimeoutError: An agent does not come online.
        """

        def at_most_absent(count: int) -> bool:
            self.watch()
            return absent(self.started_s) <= count

        for device in devices:
            wait_until(lambda: at_most_absent(_STARTING_TOGETHER - 1), deadline_s=_ONLINE_S)
            self.start_agent(device)
        wait_until(lambda: at_most_absent(0), deadline_s=_ONLINE_S)

    def agent_pid(self, device: str) -> int:
        """Return the process id of the running agent of `device`."""
        return self._agents[device].pid

    def kill_agent(self, device: str) -> None:
        """Kill the agent of `device` with SIGKILL, as a phone does."""
        process = self._agents.pop(device)
        process.send_signal(signal.SIGKILL)
        self._guarded.reap(process)

    def kill_coordinator(self) -> None:
        """Kill the coordinator with SIGKILL."""
        assert self._coordinator is not None, "it was started"
        self._coordinator.kill()
        self._guarded.reap(self._coordinator)
        self._coordinator = None

    def watch(self) -> int | None:
        """Look after the processes: note the agents' memory; return the coordinator's exit code once it has ended.

        Raises:
            FleetFailed: An agent ended, or the coordinator ended with an error.
        """
        for device, process in self._agents.items():
            if process.poll() is not None:
                raise FleetFailed(f"the agent {device} ended with {process.returncode}:\n{self.log(device)}")
            self.peak_rss_mb[device] = max(self.peak_rss_mb.get(device, 0.0), peak_rss_mb(process.pid))
        if self._coordinator is None or self._coordinator.poll() is None:
            return None
        if self._coordinator.returncode != 0:
            raise FleetFailed(f"the coordinator ended with {self._coordinator.returncode}:\n{self.log('coordinator')}")
        return 0

    def stop(self) -> None:
        """Ask every process to end in order, agents first; kill what does not."""
        processes = [*self._agents.values(), *([self._coordinator] if self._coordinator else [])]
        self._guarded.end(processes, grace_s=_GRACE_S)
        self._agents.clear()
        self._coordinator = None

    def log(self, name: str, *, lines: int = 20) -> str:
        """Return the last `lines` lines of a process's log."""
        return "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])

    def _spawn(self, module: str, *arguments: str, log: str | None = None) -> subprocess.Popen[bytes]:
        # One BLAS thread each: a fleet of processes shares this machine.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, *arguments]
        return self._guarded.spawn(command, log=self.folder / f"{log or module}.log", environment=environment)


class EventReader:
    """Follows the coordinator's events file from another process."""

    def __init__(self, path: Path) -> None:
        """Read `path` from its start; it need not exist yet."""
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, object]]:
        """Yield the events written since the last call; a line not yet complete waits for the next one."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


def peak_rss_mb(pid: int) -> float:
    """Return the largest resident memory that process `pid` ever had, in MB; 0 once it is gone (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def wait_until(condition: Callable[[], bool], *, deadline_s: float, poll_s: float = 0.02) -> None:
    """Return once `condition()` is true.

    Raises:
        TimeoutError: It is not within `deadline_s` seconds.
    """
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"what was waited for did not happen within {deadline_s:.0f} s")
        time.sleep(poll_s)
