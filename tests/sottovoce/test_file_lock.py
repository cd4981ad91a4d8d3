"""A lock is held by one process, and is gone with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sottovoce.errors import ConfigError
from sottovoce.file_lock import FileLock, is_held


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path), "there is no file yet"
    lock = FileLock.take(path)
    assert lock is not None
    assert is_held(path)
    assert FileLock.take(path) is None
    lock.release()
    lock.release()
    assert not is_held(path)
    with FileLock.take(path) or pytest.fail("it is free again"):
        assert is_held(path)
    assert not is_held(path)


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        "import sys, pathlib; from sottovoce.file_lock import FileLock\n"
        "lock = FileLock.take(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_held(path)
        assert FileLock.take(path) is None
        process.send_signal(signal.SIGKILL)
    assert not is_held(path)


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot open .*nowhere/lock"):
        FileLock.take(tmp_path / "nowhere" / "lock")
