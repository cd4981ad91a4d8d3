"""The set-up that every script shares, with a Python that only writes down what it was asked to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ("bash", "cat", "chmod", "cksum", "cp", "cut", "dirname", "grep", "mkdir", "rm", "sleep", "tail")

PYTHON = r"""#!/usr/bin/env bash
case "$*" in
*"import venv, ensurepip"*) [ -z "${NO_VENV:-}" ] ;;
*version_info*) [ -z "${TOO_OLD:-}" ] ;;
*"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" && chmod +x "${@: -1}/bin/python" ;;
*"-m pip install"*)
    echo "${@: -1}" >> "$CALLS"
    [ -z "${STUCK:-}" ] || { echo $$ > "$STUCK"; exec sleep 60; }
    [ -z "${BROKEN:-}" ] || { echo "ERROR: no network"; exit 1; }
    ;;
*"import pip"*) ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with nothing but a script that needs the environment, and a machine with nothing but a few tools."""
    clone, tools = tmp_path / "clone", tmp_path / "tools"
    (clone / "scripts").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(ROOT / "scripts" / "_environment", clone / "scripts")
    script = clone / "scripts" / "needs"
    script.write_text('set -euo pipefail\nsource "$(dirname "$0")/_environment"\nneed_environment "$1"\necho ready\n')
    (clone / "pyproject.toml").write_text("[project]\n")
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path is not None, tool
        (tools / tool).symlink_to(path)
    (tools / "python3.11").write_text(PYTHON)
    (tools / "python3.11").chmod(0o755)
    (tools / "env").symlink_to("/usr/bin/env")
    return clone


def command(clone: Path, extra: str) -> list[str]:
    return ["bash", str(clone / "scripts" / "needs"), extra]


def environment(clone: Path, **changes: str) -> dict[str, str]:
    return {"PATH": str(clone.parent / "tools"), "CALLS": str(clone.parent / "calls"), **changes}


def need(clone: Path, extra: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(clone, extra), env=environment(clone, **changes), capture_output=True, text=True, check=False
    )


def installed(clone: Path) -> list[str]:
    calls = clone.parent / "calls"
    return [line.removeprefix(str(clone)) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_the_first_call_installs_and_the_second_does_nothing(clone: Path) -> None:
    first, second = need(clone, "demo"), need(clone, "demo")
    assert (first.returncode, first.stdout) == (0, "ready\n"), first.stderr
    assert "Installing" in first.stderr
    assert (second.returncode, second.stdout, second.stderr) == (0, "ready\n", "")
    assert installed(clone) == ["[demo]"]


def test_what_the_tests_need_is_enough_for_the_demo_and_not_the_other_way_round(clone: Path) -> None:
    for extra in ("demo", "test", "demo", "test"):
        assert need(clone, extra).returncode == 0
    assert installed(clone) == ["[demo]", "[test]"]


def test_changed_dependencies_and_a_moved_clone_are_installed_again(clone: Path) -> None:
    need(clone, "test")
    (clone / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    need(clone, "demo")
    moved = clone.rename(clone.with_name("elsewhere"))
    need(moved, "demo")
    assert len(installed(moved)) == 3


def test_a_failed_installation_shows_the_end_of_its_log_and_is_tried_again(clone: Path) -> None:
    failed = need(clone, "demo", BROKEN="yes")
    assert failed.returncode == 2
    assert "ERROR: no network" in failed.stderr
    assert need(clone, "demo").stdout == "ready\n"
    assert installed(clone) == ["[demo]", "[demo]"]


def test_an_interrupted_installation_ends_pip_and_is_tried_again(clone: Path) -> None:
    stuck = clone.parent / "stuck"
    os.mkfifo(stuck)
    with subprocess.Popen(
        command(clone, "demo"), env=environment(clone, STUCK=str(stuck)), stderr=subprocess.PIPE, text=True
    ) as running:
        pip = int(stuck.read_text())
        running.send_signal(signal.SIGINT)
        assert running.stderr is not None
        assert "Interrupted" in running.stderr.read()
    assert running.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(pip, 0)
    stuck.unlink()
    assert need(clone, "demo").stdout == "ready\n"


def test_a_missing_venv_module_gives_the_one_line_that_installs_it(clone: Path) -> None:
    refused = need(clone, "demo", NO_VENV="yes")
    assert refused.returncode == 2
    assert "sudo apt install python3.11-venv" in refused.stderr
    (clone.parent / "tools" / "python3.11").rename(clone.parent / "tools" / "python3")
    assert "sudo apt install python3-venv" in need(clone, "demo", NO_VENV="yes").stderr


def test_without_a_supported_python_the_versions_are_named(clone: Path) -> None:
    refused = need(clone, "demo", TOO_OLD="yes")
    assert refused.returncode == 2
    assert "Python 3.11, 3.12 or 3.13 is needed" in refused.stderr
    assert not (clone / ".venv").exists()
