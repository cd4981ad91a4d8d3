"""A mosquitto of one's own: started on a free loopback port, paused, killed and restarted at will, gone afterwards.

What runs is a configuration file of this repository (`broker_config/demo`, or `broker_config/production` with
certificates); only paths, the port and the user to run as are filled in.

Nothing is left behind, whatever happens. A guard process holds the reading end of a pipe: when this process closes it,
or dies in any way at all, the guard kills the broker and removes the folder. It runs in a session of its own, so
neither Ctrl-C nor a signal to the whole process group reaches it first.
"""

from __future__ import annotations

import getpass
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from simulation.mosquitto_binary import Mosquitto, find_mosquitto
from sottovoce.errors import TransportError

__all__ = ["HOST", "BrokerProcess", "BrokerTls", "Mosquitto", "find_mosquitto"]

HOST = "127.0.0.1"
CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "broker_config"

_START_TIMEOUT_S = 10.0
_POLL_S = 0.01
_PORT_ATTEMPTS = 5
# Adds to the file's own log types the line "mosquitto version ... running", by which a start is known to be complete.
_LOG_STARTS = "log_type information\n"
# $1 is the folder. The pid file is written by the very process that then becomes the broker, so it is never late.
_GUARD = 'cat > /dev/null; [ -s "$1/pid" ] && kill -9 "$(cat "$1/pid")" 2> /dev/null; rm -rf -- "$1"'
# $0 is the folder: where it is gone (the guard was here), the broker does not start.
_LAUNCH = 'echo "$$" > "$0/pid" && exec "$@"'


@dataclass(frozen=True, slots=True)
class BrokerTls:
    """Files for the production configuration.

    Attributes:
        fleet_ca: The fleet CA's certificate, PEM; only clients under it are let in.
        certificate: The broker's certificate, PEM.
        key: The broker's private key, PEM, unencrypted.
        revoked: The CA's revocation list, PEM, or None.
    """

    fleet_ca: Path
    certificate: Path
    key: Path
    revoked: Path | None = None


class BrokerProcess:
    """A running broker, as a context manager.

    Attributes:
        host: The loopback address it listens on.
        port: The port it listens on; the same after every restart.
        folder: Where its configuration, log and persistence live; removed on exit.
    """

    host = HOST

    def __init__(
        self,
        *,
        tls: BrokerTls | None = None,
        settings: Mapping[str, str] | None = None,
        mosquitto: Mosquitto | None = None,
    ) -> None:
        """Prepare a broker; it starts on entering the context.

        Args:
            tls: None runs `broker_config/demo`; files run `broker_config/production` with them.
            settings: Further directives of mosquitto.conf that replace those of the file, for example
                `{"autosave_interval": "1"}`.
            mosquitto: The program; None finds it, or installs it.
        """
        self._tls = tls
        self._settings = dict(settings or {})
        self._mosquitto = mosquitto
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        """Start the broker and return when it accepts connections.

        Raises:
            ConfigError: No broker is installed and none can be.
            TransportError: The broker does not start; the text ends with its log.
        """
        self._mosquitto = self._mosquitto or find_mosquitto()
        with ExitStack() as on_failure:
            self.folder = Path(tempfile.mkdtemp(prefix="sottovoce-broker-"))
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "guard", str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
            )
            on_failure.callback(self._clean_up)
            self._start_on_free_port()
            on_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the broker and remove its folder."""
        self._clean_up()

    @property
    def pid(self) -> int:
        """The process id of the running broker.

        Raises:
            TransportError: It is not running.
        """
        return self._running().pid

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
        self._reap(process)

    def pause(self) -> None:
        """Freeze the broker with SIGSTOP: connections stay open and nothing moves, like a network that went away."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused broker go on."""
        self._running().send_signal(signal.SIGCONT)

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
        process.wait()
        # Without the file the guard kills nobody: the number may soon be another process's.
        (self.folder / "pid").unlink(missing_ok=True)
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
        assert self._mosquitto is not None, "found on entering"
        configuration = self.folder / "mosquitto.conf"
        configuration.write_text(self._configuration())
        command = [str(self._mosquitto.executable), "-c", str(configuration)]
        with open(self.folder / "log", "ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(
                ["/bin/sh", "-c", _LAUNCH, str(self.folder), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._mosquitto.environment(),
                start_new_session=True,
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
            if " running" in log and _accepts(self.port):
                return
            if process.poll() is not None or time.monotonic() > deadline:
                state = "does not answer" if process.poll() is None else f"ended with code {process.returncode}"
                raise TransportError(f"mosquitto {state} on port {self.port}; its log:\n{log.strip()}")
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
                "acl_file": str(CONFIG_FOLDER / "production" / "acl"),
            }
            settings |= {"crlfile": str(self._tls.revoked)} if self._tls.revoked is not None else {}
        # Started as root, mosquitto would become a user who may not read this folder.
        settings["user"] = getpass.getuser()
        base = (CONFIG_FOLDER / name).read_text()
        return render_configuration(base, {**settings, **self._settings}) + _LOG_STARTS

    def _clean_up(self) -> None:
        """Kill the broker if it runs, then let the guard remove the folder."""
        if self._process is not None:
            self.kill()
        pipe: IO[bytes] | None = self._guard.stdin
        assert pipe is not None, "opened with PIPE"
        pipe.close()
        self._guard.wait()


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
