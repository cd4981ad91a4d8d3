"""The last resort where no mosquitto can be had: amqtt, a broker in Python, from pip, for a demonstration only.

It speaks MQTT 3.1.1, keeps nothing over a restart, forgets what arrives for a client that is away, and publishes a last
will after an orderly goodbye too. It goes into a folder of its own, so that its dependencies never meet the project's.

    python simulation/embedded_broker.py PORT      serves on loopback until SIGTERM; amqtt must be importable
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sottovoce.errors import ConfigError

REQUIREMENT = "amqtt==0.12.1"
INSTALL_FOLDER = Path(sys.prefix) / "embedded-broker"

_PIP_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class EmbeddedBroker:
    """An installed embedded broker that can be started.

    Attributes:
        folder: Where amqtt and its dependencies lie.
        protocol: The MQTT version that it speaks.
    """

    folder: Path
    protocol: Literal["5", "3.1.1"] = "3.1.1"

    def command(self, configuration: Path, port: int) -> list[str]:
        """Return the command that serves on `port`; a mosquitto.conf means nothing to this broker."""
        return [sys.executable, "-P", str(Path(__file__).resolve()), str(port)]

    def environment(self) -> dict[str, str]:
        """Return the environment variables to start it with."""
        return {**os.environ, "PYTHONPATH": str(self.folder)}


def install_embedded_broker(folder: Path = INSTALL_FOLDER) -> EmbeddedBroker:
    """Return the embedded broker in `folder`, installed by pip on the first call.

    Raises:
        ConfigError: pip fails; the text has its last words.
    """
    if (folder / "amqtt" / "broker.py").is_file():
        return EmbeddedBroker(folder)
    print(f"Installing the embedded broker {REQUIREMENT} into {folder} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--upgrade", REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"pip took more than {_PIP_TIMEOUT_S} s to install {REQUIREMENT}; try again") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"pip cannot install the embedded broker {REQUIREMENT}: {last}")
    return EmbeddedBroker(folder)


async def serve(port: int) -> None:
    """Serve on the loopback `port` until SIGTERM, everybody welcome."""
    from amqtt.broker import Broker

    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    told_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    await broker.start()
    print(f"amqtt version {importlib.metadata.version('amqtt')} running", flush=True)
    await told_to_end.wait()
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
