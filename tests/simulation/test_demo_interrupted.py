"""The demo, interrupted in the middle of a round: no process, no folder and no port of it is left behind."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TIMEOUT_S = 60.0
COMMAND = [sys.executable, "-u", "-m", "simulation.demo", "digits", "--rounds", "2", "--devices", "10"]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        select.select([], [], [], 0.02)
    return True


def children_of(pid: int) -> set[int]:
    """Return the process ids of all descendants of process `pid`."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended meanwhile.
    found, fresh = set[int](), {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def runs(pid: int) -> bool:
    """Say whether process `pid` lives; what is dead and only waits to be collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        pytest.param(signal.SIGKILL, -signal.SIGKILL, id="SIGKILL"),
        pytest.param(signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 130, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, exit_code: int) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    output = tmp_path / "output"
    command = [*COMMAND, "--plot", str(tmp_path / "plot.png")]
    with open(output, "wb") as file:
        demo = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, "TMPDIR": str(folder)}
        )
    try:
        assert eventually(lambda: b"rendezvous" in output.read_bytes()), output.read_text()
        children = children_of(demo.pid)
        port = int(re.search(r"broker on [\d.]+:(\d+)", output.read_text())[1])  # type: ignore[index]
        assert len(children) >= 1 + 1 + 10  # The broker, the coordinator, the agents.
        assert list(folder.iterdir())
        assert listens(port)
        demo.send_signal(number)
        assert demo.wait(TIMEOUT_S) == exit_code
    finally:
        demo.kill()
        demo.wait()
    assert eventually(lambda: not any(map(runs, children)))
    assert eventually(lambda: not list(folder.iterdir()))
    assert not listens(port)
    assert "Traceback" not in output.read_text()
