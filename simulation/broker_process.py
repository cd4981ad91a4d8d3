"""A mosquitto of one's own: started on a free loopback port, paused, killed and restarted at will, gone afterwards.

What runs is a configuration file of this repository (`broker_config/demo`, or `broker_config/production` with
certificates); only paths, the port and the user to run as are filled in. Process, port and folder are gone when the
context is left or when this process dies, however it dies: see `simulation.guarded`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from simulation.embedded_broker import install_embedded_broker
from simulation.guarded import GuardedFolder
from simulation.mosquitto_binary import find_mosquitto
from sottovoce.errors import ConfigError, TransportError

HOST = "127.0.0.1"
CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "broker_config"

_START_TIMEOUT_S = 10.0
_POLL_S = 0.01
_PORT_ATTEMPTS = 5
# Adds to the file's own log types the line "mosquitto version ... running", by which a start is known to be complete.
_LOG_STARTS = "log_type information\n"


# A broker says so itself when it is ready: "mosquitto version 2.0.11 running".
_RUNNING = re.compile(r"(\w+) version (\S+) running")


class BrokerProgram(Protocol):
    """A broker that is installed: mosquitto, or the embedded one."""

    @property
    def protocol(self) -> Literal["5", "3.1.1"]:
        """The newest MQTT version that it speaks."""

    def command(self, configuration: Path, port: int) -> list[str]:
        """Return the command that starts it on `port`, with `configuration` (a mosquitto.conf) if it reads one."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables to start it with."""


def find_broker(
    mosquitto: Callable[[], BrokerProgram] = find_mosquitto,
    embedded: Callable[[], BrokerProgram] = install_embedded_broker,
) -> BrokerProgram:
    """Return mosquitto, installed in the virtual environment if need be, or else the embedded broker, with a warning.

    Args:
        mosquitto: Finds or installs the first, or raises ConfigError.
        embedded: Finds or installs the second, or raises ConfigError.

    Raises:
        ConfigError: Neither can be had; the text has the line that installs mosquitto by hand.
    """
    try:
        return mosquitto()
    except ConfigError as no_mosquitto:
        try:
            last_resort = embedded()
        except ConfigError as no_embedded:
            raise ConfigError(f"{no_mosquitto} ({no_embedded})") from no_embedded
        print(
            f"warning: {no_mosquitto}\n"
            "warning: going on with an embedded broker in Python: slower, and nothing survives its restart",
            file=sys.stderr,
        )
        return last_resort


@dataclass(frozen=True, slots=True)
class BrokerTls:
    """Files for the production configuration.

    Attributes:
        fleet_ca: The fleet CA's certificate, PEM; only clients under it are let in.
        certificate: The broker's certificate, PEM.
        key: The broker's private key, PEM, unencrypted.
        revoked: The CA's revocation list, PEM; read at start and on SIGHUP.
    """

    fleet_ca: Path
    certificate: Path
    key: Path
    revoked: Path


class BrokerProcess:
    """A running broker, as a context manager.

    Attributes:
        host: The loopback address it listens on.
        port: The port it listens on; the same after every restart.
        folder: Where its configuration, log and persistence live; removed on exit.
        description: Name and version of the broker, such as `mosquitto 2.0.11`.
    """

    host = HOST

    def __init__(
        self,
        *,
        tls: BrokerTls | None = None,
        settings: Mapping[str, str] | None = None,
        program: BrokerProgram | None = None,
    ) -> None:
        """Prepare a broker; it starts on entering the context.

        Args:
            tls: None runs `broker_config/demo`; files run `broker_config/production` with them.
            settings: Further directives of mosquitto.conf that replace those of the file, for example
                `{"autosave_interval": "1"}`.
            program: What to run; None finds mosquitto or installs it, and without `tls` falls back to the embedded
                broker, which reads neither file nor settings.
        """
        self._tls = tls
        self._settings = dict(settings or {})
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        """Start the broker and return when it accepts connections.

        Raises:
            ConfigError: No broker is installed and none can be; the text has the line that installs one.
            TransportError: The broker does not start; the text ends with its log.
        """
        if self._program is None:
            self._program = find_broker() if self._tls is None else find_mosquitto()
        with ExitStack() as on_failure:
            self._guarded = on_failure.enter_context(GuardedFolder("sottovoce-broker-"))
            self.folder = self._guarded.path
            self._start_on_free_port()
            self._undo = on_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the broker and remove its folder."""
        self._process = None
        self._undo.close()

    @property
    def pid(self) -> int:
        """The process id of the running broker.

        Raises:
            TransportError: It is not running.
        """
        return self._running().pid

    @property
    def protocol(self) -> Literal["5", "3.1.1"]:
        """The newest MQTT version that the broker speaks.

        Raises:
            TransportError: No broker was chosen yet: enter the context first.
        """
        if self._program is None:
            raise TransportError("the broker is not chosen before it is started")
        return self._program.protocol

    def log(self) -> str:
        """Return what the broker has logged so far, all starts together."""
        return (self.folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        """Kill the broker with SIGKILL: what it has not saved is lost, its port is free, connections are reset."""
        process = self._running()
        process.kill()
        self._reap(process)

    def stop(self) -> None:
        """Stop the broker with SIGTERM: it saves its state first."""
        process = self._running()
        process.terminate()
        process.send_signal(signal.SIGCONT)  # a paused process hears nothing else
        self._reap(process)

    def pause(self) -> None:
        """Freeze the broker with SIGSTOP: connections stay open and nothing moves, like a network that went away."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused broker go on."""
        self._running().send_signal(signal.SIGCONT)

    def save(self) -> None:
        """Have mosquitto write down now what it would keep over a restart; return when it has.

        Raises:
            TransportError: It does not.
        """
        file = self.folder / "mosquitto.db"
        before = file.stat().st_mtime_ns if file.exists() else 0
        self._running().send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not file.exists() or file.stat().st_mtime_ns == before:
            if time.monotonic() > deadline:
                raise TransportError(f"the broker does not write {file}; its log:\n{self.log().strip()}")
            time.sleep(_POLL_S)

    def restart(self) -> None:
        """Start the broker again on the same port with what it had saved; stop it first if it runs.

        Raises:
            TransportError: It does not start; the text ends with its log.
        """
        if self._process is not None:
            self.stop()
        self._start()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise TransportError("the broker is not running: it was stopped, killed or never started")
        return self._process

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        self._guarded.reap(process)
        self._process = None

    def _start_on_free_port(self) -> None:
        """Start on a port that was free a moment ago; try another where somebody was quicker."""
        for attempt in range(_PORT_ATTEMPTS):
            self.port = _free_port()
            try:
                return self._start()
            except TransportError as problem:
                if "Address already in use" not in str(problem) or attempt == _PORT_ATTEMPTS - 1:
                    raise

    def _start(self) -> None:
        assert self._program is not None, "found on entering"
        configuration = self.folder / "mosquitto.conf"
        configuration.write_text(self._configuration())
        log = self.folder / "log"
        log_start = log.stat().st_size if log.exists() else 0
        process = self._guarded.spawn(
            self._program.command(configuration, self.port), log=log, environment=self._program.environment()
        )
        self._process = process
        try:
            self._wait_until_it_accepts(process, log_start)
        except BaseException:
            process.kill()
            self._reap(process)
            raise

    def _wait_until_it_accepts(self, process: subprocess.Popen[bytes], log_start: int) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            log = (self.folder / "log").read_bytes()[log_start:].decode(errors="replace")
            # The log line tells this broker from a stranger on the same port; the connection, that it listens.
            ready = _RUNNING.search(log)
            if ready and _accepts(self.port):
                self.description = " ".join(ready.groups())
                return
            if process.poll() is not None or time.monotonic() > deadline:
                state = "does not answer" if process.poll() is None else f"ended with code {process.returncode}"
                raise TransportError(f"the broker {state} on port {self.port}; its log:\n{log.strip()}")
            time.sleep(_POLL_S)

    def _configuration(self) -> str:
        settings = {"listener": f"{self.port} {HOST}", "persistence_location": f"{self.folder}/"}
        name = "demo/mosquitto.conf"
        if self._tls is not None:
            name = "production/mosquitto.conf"
            settings |= {
                "cafile": str(self._tls.fleet_ca),
                "certfile": str(self._tls.certificate),
                "keyfile": str(self._tls.key),
                "crlfile": str(self._tls.revoked),
                "acl_file": str(CONFIG_FOLDER / "production" / "acl"),
            }
        if os.geteuid() == 0:
            # Started as root, mosquitto would become a user who may not read this folder.
            settings["user"] = "root"
        base = (CONFIG_FOLDER / name).read_text()
        return render_configuration(base, {**settings, **self._settings}) + _LOG_STARTS


def render_configuration(base: str, settings: Mapping[str, str]) -> str:
    """Return the mosquitto.conf `base` with the directives of `settings` in place of its own, new ones at the end."""
    lines = []
    rest = dict(settings)
    for line in base.splitlines():
        directive = line.split(" ", 1)[0]
        lines.append(f"{directive} {rest.pop(directive)}" if directive in rest else line)
    return "\n".join([*lines, *(f"{directive} {value}" for directive, value in rest.items()), ""])


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True
