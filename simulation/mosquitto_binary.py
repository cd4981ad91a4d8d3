"""Finds a mosquitto broker on this machine, or unpacks Debian's package into the virtual environment, without root.

Debian puts the broker into an sbin folder that is not on a user's PATH, and installing its package starts a system
broker on port 1883. So the sbin folders are searched too, and where there is no broker at all the package and the
libraries it lacks are downloaded with apt-get and unpacked with dpkg, which touches nothing outside one folder.

    python -m simulation.mosquitto_binary      prints the path of the broker, installing it if need be
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sottovoce.errors import ConfigError

SBIN_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin", "/opt/homebrew/sbin", "/usr/local/opt/mosquitto/sbin")
"""Where packages put the broker and a user's PATH does not look."""
INSTALL_FOLDER = Path(sys.prefix) / "mosquitto"
"""Where the unpacked package goes: inside the virtual environment, deleted together with it."""

_APT_TIMEOUT_S = 300
_BY_HAND = "no mosquitto broker was found and none could be installed ({reason}); install one by hand: {command}"


@dataclass(frozen=True, slots=True)
class Mosquitto:
    """A broker that can be started.

    Attributes:
        executable: The program.
        library_folders: Folders with shared libraries that the system lacks; empty for an installed broker.
        protocol: The newest MQTT version that it speaks.
    """

    executable: Path
    library_folders: tuple[Path, ...] = ()
    protocol: Literal["5", "3.1.1"] = "5"

    def command(self, configuration: Path, port: int) -> list[str]:
        """Return the command that runs `configuration`, a mosquitto.conf, which has the port in it."""
        return [str(self.executable), "-c", str(configuration)]

    def environment(self) -> dict[str, str]:
        """Return the environment variables to start the program with: this process's, plus its libraries."""
        if not self.library_folders:
            return dict(os.environ)
        inherited = os.environ.get("LD_LIBRARY_PATH", "")
        folders = [str(folder) for folder in self.library_folders] + ([inherited] if inherited else [])
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)}


def find_mosquitto(
    *, install_folder: Path = INSTALL_FOLDER, search_path: str | None = None, sbin_folders: Sequence[str] = SBIN_FOLDERS
) -> Mosquitto:
    """Return a broker: on PATH, in an sbin folder, unpacked earlier, or else unpacked now (about 5 s).

    Args:
        install_folder: Where Debian's package is, or will be, unpacked.
        search_path: Folders in the form of PATH; None means this process's PATH.
        sbin_folders: Searched after PATH.

    Raises:
        ConfigError: There is none and none can be unpacked; the text has the line that installs it by hand.
    """
    inherited = os.environ.get("PATH", "") if search_path is None else search_path
    found = shutil.which("mosquitto", path=os.pathsep.join([inherited, *sbin_folders]))
    if found is not None:
        return Mosquitto(Path(found))
    return _unpacked(install_folder) or _install(install_folder)


def _unpacked(folder: Path) -> Mosquitto | None:
    executable = folder / "usr" / "sbin" / "mosquitto"
    if not executable.is_file():
        return None
    return Mosquitto(executable, tuple(sorted({library.parent for library in folder.glob("**/*.so.*")})))


def _install(folder: Path) -> Mosquitto:
    """Download and unpack Debian's package into `folder`, whole or not at all."""
    for tool in ("apt-get", "apt-cache", "dpkg", "dpkg-query"):
        if shutil.which(tool) is None:
            raise _not_installable(f"this system has no {tool}")
    print(f"Installing the mosquitto broker into {folder} ...", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unpacked = Path(scratch) / "root"
        _download_and_unpack(Path(scratch), unpacked)
        broker = _unpacked(unpacked)
        if broker is None:
            raise _not_installable("Debian's package holds no broker")
        _check_libraries(broker)
        if folder.exists():
            shutil.rmtree(folder)
        unpacked.rename(folder)
    installed = _unpacked(folder)
    assert installed is not None, "the folder was renamed with the broker in it"
    return installed


def _download_and_unpack(scratch: Path, root: Path) -> None:
    """Fetch mosquitto and the libraries that this system lacks, and unpack them all into `root`."""
    archives = scratch / "archives"
    archives.mkdir()
    # Root's apt would drop to a user who cannot write into a private folder, and warn about it.
    options = ("-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ()
    try:
        _download(archives, options)
    except ConfigError:
        # A fresh container has no package lists, an old machine has stale ones, and only root may write the system's:
        # fetch current lists into our own folder.
        options = (*options, *_private_lists(scratch))
        _run(["apt-get", *options, "-qq", "update"])
        _download(archives, options)
    for archive in sorted(archives.glob("*.deb")):
        _run(["dpkg", "-x", str(archive), str(root)])


def _download(archives: Path, options: Sequence[str]) -> None:
    _run(["apt-get", *options, "-qq", "download", "mosquitto", *_missing_libraries(options)], folder=archives)


def _private_lists(scratch: Path) -> tuple[str, ...]:
    """Return apt options that keep package lists and caches under `scratch`; the system's sources stay in use."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    return (
        "-o",
        f"Dir::State={scratch / 'state'}",
        "-o",
        f"Dir::Cache={scratch / 'cache'}",
        "-o",
        "Debug::NoLocking=1",
    )


def _missing_libraries(options: Sequence[str]) -> list[str]:
    """Return the libraries among mosquitto's dependencies, direct and indirect, that are not installed here."""
    relations = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    listed = _run(
        ["apt-cache", *options, "depends", "--recurse", *(f"--no-{relation}" for relation in relations), "mosquitto"]
    )
    # Names stand at the left margin, each followed by its indented relations; <virtual packages> are in brackets.
    wanted = {name for name in listed.splitlines() if name.startswith("lib")}
    present = _run(["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package}\n"])
    return sorted(wanted - {line.split()[1] for line in present.splitlines() if line.startswith("installed ")})


def _check_libraries(broker: Mosquitto) -> None:
    """Raise ConfigError unless the dynamic linker finds every library of `broker`."""
    linked = _run(["ldd", str(broker.executable)], environment=broker.environment())
    missing = [line.split()[0] for line in linked.splitlines() if "not found" in line]
    if missing:
        raise _not_installable(f"missing libraries: {', '.join(missing)}")


def _run(
    command: Sequence[str],
    *,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Return what `command` printed, or raise ConfigError with its last words."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_APT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise _not_installable(f"{' '.join(command[:2])} took more than {_APT_TIMEOUT_S} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise _not_installable(f"{command[0]} failed: {last}")
    return done.stdout


def _not_installable(reason: str) -> ConfigError:
    by_tool = {"apt-get": "apt-get install", "dnf": "dnf install", "pacman": "pacman -S", "apk": "apk add"}
    command = "brew install mosquitto"
    if sys.platform != "darwin":
        install = next((install for tool, install in by_tool.items() if shutil.which(tool)), "apt-get install")
        command = f"sudo {install} mosquitto"
    return ConfigError(_BY_HAND.format(reason=reason, command=command))


def main() -> int:
    """Print the broker's path; return 2 and say why where there is none."""
    try:
        print(find_mosquitto().executable)
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
