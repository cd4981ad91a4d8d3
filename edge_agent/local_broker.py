"""The link to a broker nearby that a source of agent.toml names: the home's own, which knows nothing of the fleet."""

from __future__ import annotations

import random
from pathlib import Path

from edge_agent.source_readers import LARGEST_READING
from edge_agent.source_settings import SourceConfig
from sottovoce.errors import ConfigError
from sottovoce.transport.mqtt import MqttSettings, MqttTransport


def connect(config: SourceConfig, *, client_id: str) -> MqttTransport:
    """Return a link to the broker of `config`; it is built, and built again, in the background.

    Raises:
        ConfigError: The password file cannot be read, or a setting is impossible.
    """
    settings = MqttSettings(
        host=config.host,
        port=config.port,
        client_id=client_id,
        username=config.username or None,
        password=_password(config.password_file),
        protocol="3.1.1",  # Every broker in a home speaks it.
        clean_start=True,
        session_expiry_s=0,
        max_payload_bytes=LARGEST_READING,
    )
    return MqttTransport(settings, rng=random.Random())


def _password(file: str) -> str | None:
    if not file:
        return None
    try:
        return (Path(file).expanduser().read_text().splitlines() or [""])[0]
    except OSError as error:
        raise ConfigError(f"source: cannot read password_file {file}: {error.strerror}") from error
