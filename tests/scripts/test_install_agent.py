"""What install-agent would do, step by step: dry runs for each kind of device, which change nothing."""

from __future__ import annotations

import configparser
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALL = ROOT / "scripts" / "install-agent"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(INSTALL), *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def steps_of(*arguments: str, **environment: str) -> list[str]:
    done = run("--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("+ ") for line in done.stdout.splitlines() if line.startswith("+ ")]


def file_in(dry_run: str, path: str) -> str:
    """Return the file that `dry_run` would write to `path`."""
    lines = dry_run.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"+ write {path} "))
    body = []
    for line in lines[start + 1 :]:
        if line.startswith("+"):
            break
        body.append(line.removeprefix("    "))
    return "\n".join(body)


def unit(*arguments: str) -> dict[str, dict[str, str]]:
    text = file_in(run("--dry-run", *arguments).stdout, "/etc/systemd/system/sottovoce-agent.service")
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return {name: dict(parser[name]) for name in parser.sections()}


def test_the_service_restarts_is_bounded_and_owns_nothing_but_its_folder() -> None:
    service = unit()["Service"]
    assert service["ExecStart"] == "/opt/sottovoce/bin/edge-agent run"
    assert service["Environment"] == "SOTTOVOCE_HOME=/var/lib/sottovoce"
    assert (service["User"], service["StateDirectory"], service["StateDirectoryMode"]) == (
        "sottovoce",
        "sottovoce",
        "0700",
    )
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("always", "2")
    assert service["MemoryMax"] == "300M"
    assert (service["MemorySwapMax"], service["LimitCORE"]) == ("0", "0")
    assert (service["ProtectSystem"], service["NoNewPrivileges"]) == ("strict", "yes")
    assert "ProcSubset" not in service, "the TFLite runtime reads /proc/cpuinfo"


def test_a_device_that_is_not_enrolled_does_not_fail_but_waits() -> None:
    assert unit()["Unit"]["ConditionPathExists"] == "/var/lib/sottovoce/certificate.pem"


def test_the_memory_limit_can_be_chosen_and_nonsense_is_refused() -> None:
    assert unit("--memory-max", "1G")["Service"]["MemoryMax"] == "1G"
    refused = run("--dry-run", "--memory-max", "much")
    assert refused.returncode == 2
    assert "--memory-max needs a size" in refused.stderr


def test_the_service_is_installed_before_it_is_started() -> None:
    steps = steps_of()
    order = ["-m venv /opt/sottovoce", "-m pip install", "write /etc/systemd", "daemon-reload", "enable", "restart"]
    positions = [next(number for number, step in enumerate(steps) if part in step) for part in order]
    assert positions == sorted(positions)
    assert any(step.endswith("[agent\\]") for step in steps)


def test_without_a_service_there_is_only_the_command() -> None:
    steps = steps_of("--no-service")
    assert steps[-1] == "ln -sf /opt/sottovoce/bin/edge-agent /usr/local/bin/edge-agent"
    assert not any("systemctl" in step or "useradd" in step for step in steps)


def test_termux_gets_a_debian_and_android_s_job_scheduler() -> None:
    steps = steps_of(PREFIX="/data/data/com.termux/files/usr", HOME="/data/data/com.termux/files/home")
    assert "proot-distro install debian" in steps
    assert f"proot-distro login debian -- {INSTALL} --no-service" in steps
    assert any(step.startswith("termux-job-scheduler") and "--charging true" in step for step in steps)
    assert not any("sudo" in step or "systemctl" in step for step in steps)


@pytest.mark.parametrize(
    ("arguments", "kept", "removed"),
    [
        (["--uninstall"], "/var/lib/sottovoce", "/opt/sottovoce"),
        (["--uninstall", "--purge"], "nothing", "/var/lib/sottovoce"),
    ],
)
def test_uninstalling_keeps_the_device_s_own_unless_told_to_purge(
    arguments: list[str], kept: str, removed: str
) -> None:
    steps = steps_of(*arguments)
    assert f"rm -rf {removed}" in steps
    assert f"rm -rf {kept}" not in steps


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    prefix = tmp_path / "com.termux" / "usr"
    (prefix / "bin").mkdir(parents=True)
    steps_of(PREFIX=str(prefix), HOME=str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("**/*")) == ["bin", "com.termux", "usr"]


@pytest.mark.parametrize("arguments", [["--purge"], ["--nonsense"]])
def test_impossible_options_are_refused_with_a_reason(arguments: list[str]) -> None:
    refused = run(*arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")


def test_every_script_is_executable_and_valid_bash() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "scripts").iterdir()]
    for script in scripts:
        first = script.read_text().splitlines()[0]
        if "python" in first:
            continue
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.name.startswith("_") or os.access(script, os.X_OK), script
