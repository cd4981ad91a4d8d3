"""Child processes and a temporary folder that never outlive this process, however it ends.

A guard process holds the reading end of a pipe. When this process closes it, or dies in any way at all, the guard
kills every child that is still registered and removes the folder. The guard runs in a session of its own, so neither
Ctrl-C nor a signal to the whole process group reaches it first.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

# $1 is the folder; a child registers itself by writing its own process id before it becomes the program it runs,
# so the registration is never late, and starts nothing where the folder is gone already.
_GUARD = 'cat > /dev/null; for pid in "$1"/pids/*; do kill -9 "${pid##*/}" 2> /dev/null; done; rm -rf -- "$1"'
_LAUNCH = ': > "$0/pids/$$" && exec "$@"'


class GuardedFolder:
    """A temporary folder and the child processes that belong to it, as a context manager.

    Attributes:
        path: The folder; removed on exit.
    """

    def __init__(self, prefix: str, *, within: Path | None = None) -> None:
        """Prepare a folder whose name starts with `prefix`, `within` another or the system's own; entering makes it."""
        self._prefix = prefix
        self._within = within
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        """Make the folder and start its guard."""
        self.path = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self._within))
        (self.path / "pids").mkdir()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(self.path)], stdin=subprocess.PIPE, start_new_session=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what still runs and remove the folder."""
        for process in list(self._children.values()):
            process.kill()
            self.reap(process)
        assert self._guard.stdin is not None, "opened with PIPE"
        self._guard.stdin.close()
        self._guard.wait()

    def spawn(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `command` in a session of its own, its output appended to `log`.

        Args:
            command: Program and arguments.
            log: File for both output streams.
            environment: All environment variables; None passes this process's on.
        """
        with open(log, "ab") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _LAUNCH, str(self.path), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(os.environ if environment is None else environment),
                start_new_session=True,
            )
        self._children[process.pid] = process
        return process

    def reap(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for `process`, which was told to end, and return its exit code."""
        code = process.wait()
        # Without the file the guard kills nobody: the number may soon be another process's.
        (self.path / "pids" / str(process.pid)).unlink(missing_ok=True)
        self._children.pop(process.pid, None)
        return code

    def end(self, processes: Sequence[subprocess.Popen[bytes]], *, grace_s: float) -> None:
        """Ask `processes` to end (SIGTERM); kill those that have not after `grace_s` seconds."""
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + grace_s
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
            self.reap(process)
