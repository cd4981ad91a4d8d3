"""The device's settings: agent.toml becomes one frozen document, or a ConfigError with the path of the key."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from edge_agent.policy import Policy
from edge_agent.source_settings import SourceConfig
from sottovoce.errors import ConfigError
from sottovoce.identity import NAME

RuntimeName: TypeAlias = Literal["auto", "litert", "tflite"]
TLS_PORT = 8883
PLAIN_PORT = 1883
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")
_PLACE = re.compile(r"(?P<text>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """Where the fleet's broker is.

    Attributes:
        host: Host name or address.
        port: TCP port; 0 means 8883 with TLS and 1883 without.
        protocol: MQTT version.
        tls: Mutual TLS under the fleet's CA. Without it only a broker on this very machine is accepted.
        ca_file: CA of the broker's certificate, relative to the device's folder.
        certificate_file: This device's certificate, likewise.
        key_file: Its private key, likewise.
        keepalive_s: Seconds of silence after which the link is tested.
    """

    host: str
    port: int = 0
    protocol: Literal["5", "3.1.1"] = "5"
    tls: bool = True
    ca_file: str = "fleet-ca.pem"
    certificate_file: str = "certificate.pem"
    key_file: str = "key.pem"
    keepalive_s: int = 60

    def __post_init__(self) -> None:
        """Raise ConfigError, with the key's path, where a setting or a pair of settings is impossible."""
        if not self.host.strip():
            raise ConfigError("broker.host is empty; write the broker's host name or address")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"broker.port is {self.port}; it must be 1 to 65535, or 0 for the usual one")
        if not 1 <= self.keepalive_s <= 65535:
            raise ConfigError(f"broker.keepalive_s is {self.keepalive_s}; it must be 1 to 65535")
        if not self.tls and not _LOOPBACK.fullmatch(self.host):
            raise ConfigError(
                f"broker.tls is false and broker.host is {self.host!r}: without TLS anybody on the way can cut this "
                "device off, so it is allowed on this machine only (127.0.0.1); set broker.tls = true"
            )
        if not self.tls and (self.ca_file, self.certificate_file, self.key_file) != _TLS_FILES:
            raise ConfigError("broker.tls is false, but a TLS file is set; remove one of the two")

    @property
    def actual_port(self) -> int:
        """The port to connect to."""
        return self.port or (TLS_PORT if self.tls else PLAIN_PORT)


_TLS_FILES = ("fleet-ca.pem", "certificate.pem", "key.pem")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long the examples of one collection are kept.

    Attributes:
        max_age_s: Older examples are forgotten, seconds; 0 keeps every age.
        max_count: Only the newest so many are kept; 0 keeps all.
    """

    max_age_s: float = 0.0
    max_count: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError where a number is below 0."""
        if not (0 <= self.max_age_s < float("inf") and self.max_count >= 0):
            raise ConfigError("retention: max_age_s and max_count must be 0 (no limit) or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Everything that agent.toml says.

    Attributes:
        device: This device's id.
        fleet: The fleet it belongs to.
        broker: Where to find it.
        runtime: Which TFLite runtime runs the programs.
        checkpoint_s: Least seconds between two checkpoints of a training that goes on; a kill loses no more work.
        policy: What the owner allows.
        retention: Collection -> how long its examples are kept; a collection that is not named is kept whole.
        source: Collection -> where its examples come from by themselves, while the agent runs.
    """

    device: str
    fleet: str
    broker: BrokerConfig
    runtime: RuntimeName = "auto"
    checkpoint_s: float = 5.0
    policy: Policy = field(default_factory=Policy)
    retention: Mapping[str, Retention] = field(default_factory=dict)
    source: Mapping[str, SourceConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ConfigError where a name is impossible."""
        for key, text in (("device", self.device), ("fleet", self.fleet)):
            if not NAME.fullmatch(text):
                raise ConfigError(f"{key} is {text!r}; it must be 1 to 64 characters of A-Z a-z 0-9 _ -")
        if not 0 <= self.checkpoint_s <= 3600:
            raise ConfigError(f"checkpoint_s is {self.checkpoint_s:g}; it must be 0 to 3600 seconds")


def parse_config(text: str, *, path: Path) -> AgentConfig:
    """Return what the settings in `text` say.

    Args:
        text: TOML.
        path: Where the text comes from, for messages.

    Raises:
        ConfigError: Not TOML; an unknown key, a wrong type, an impossible value or pair; with the key's path.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        if unknown := _unknown_key(AgentConfig, tables):
            raise ConfigError(unknown)
        return _convert(tables, AgentConfig)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def default_config(*, device: str, fleet: str, broker: BrokerConfig) -> str:
    """Return a commented agent.toml in which everything but the four given things has its default."""
    return _TEMPLATE.format(
        device=device,
        fleet=fleet,
        host=broker.host,
        port=broker.actual_port,
        tls="true" if broker.tls else "false",
        protocol=broker.protocol,
    )


def _convert(tables: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(tables, type=kind)
    except msgspec.ValidationError as error:
        match = _PLACE.fullmatch(str(error))
        text, where = (match["text"], match["path"]) if match else (str(error), None)
        raise ConfigError(f"{where}: {text}" if where else text) from error


def _unknown_key(kind: type, table: Mapping[str, object], prefix: str = "") -> str:
    """Return what is wrong with the first key of `table` that the dataclass `kind` does not have, or nothing."""
    fields = {f.name: _TABLES.get((kind, f.name)) for f in dataclasses.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            return f"{prefix}{key}: unknown key; known here are {', '.join(fields)}"
        inner = fields[key]
        if inner is None or not isinstance(value, dict):
            continue
        named = value if key in _BY_COLLECTION else {"": value}
        for name, rows in named.items():
            path = f"{prefix}{key}.{name}." if name else f"{prefix}{key}."
            if isinstance(rows, dict) and (found := _unknown_key(inner, rows, path)):
                return found
    return ""


_TABLES: dict[tuple[type, str], type] = {
    (AgentConfig, "broker"): BrokerConfig,
    (AgentConfig, "policy"): Policy,
    (AgentConfig, "retention"): Retention,
    (AgentConfig, "source"): SourceConfig,
}
_BY_COLLECTION = ("retention", "source")

_TEMPLATE = """\
# Settings of this device. Every key is explained; what is commented out shows its default.

# The device's id and fleet, as in its certificate.
device = "{device}"
fleet = "{fleet}"

# Which TFLite runtime runs the programs: "auto" (the first one installed), "litert" or "tflite".
# runtime = "auto"

# A training that goes on is written down at most so often, in seconds: less wear for the SD card, but a kill loses as
# much work. 0 writes after every batch.
# checkpoint_s = 5

[broker]
host = "{host}"
port = {port}
# MQTT version: "5" or "3.1.1".
protocol = "{protocol}"
# Mutual TLS under the fleet's CA. false is allowed only for a broker on this very machine (127.0.0.1).
tls = {tls}
# Files for TLS, relative to this folder.
# ca_file = "fleet-ca.pem"
# certificate_file = "certificate.pem"
# key_file = "key.pem"
# Seconds of silence after which the link is tested; must outlast one chunk on a slow link.
# keepalive_s = 60

# What you allow. A plan that asks for more is refused before anything of it runs.
[policy]
# true: take part in nothing.
# paused = false
# Collections of examples that plans may read: "all", or a list such as ["steps", "digits"].
# collections = "all"
# Plans that may run, by name: "all" or a list; and plans that never may.
# plans = "all"
# refused_plans = []
# Fewest devices in a sum (at least 3), and fewest honest ones that must remain when the corrupt are taken away.
# minimum_cohort = 10
# minimum_honest_survivors = 5
# The coordinator must assume at least this share of the fleet to be corrupt, in hundredths of a per cent (500 is 5 %).
# minimum_corrupt_share_bp = 500
# "active" withstands a coordinator that lies to devices; "curious" only one that listens.
# modes = ["active"]
# How often an update computed from one and the same state, and from examples that were used before, may leave.
# max_releases_per_state = 2
# A plan may count at most so many examples of this device; 0 is no limit.
# max_weight = 0
# Real-valued results must be clipped to at most this norm; 0 is no limit.
# max_clip_norm = 0.0
# Counts: at most so many entries of this device that are not 0, each at most so large; 0 is no limit.
# max_entries = 0
# max_count = 0
# Sums that are given to every device must leave out what fewer devices than this have contributed; 0 asks for nothing.
# minimum_threshold = 3
# Fewest words in a vocabulary that messages are read by; 1 allows to ask for a single word.
# minimum_vocabulary = 2
# true: plans may also ask for words that they do not list. Then the coordinator reads words that nobody has thought of.
# discovery = false
# What programs may keep on this device from one round to the next, in bytes, all slots together; 0 refuses it.
# max_client_state_bytes = 1048576
# Processor threads that a program may use.
# threads = 1

# How long examples are kept, by collection; a collection that is not named is kept whole.
# [retention.steps]
# max_age_s = 2592000   # 30 days; 0 keeps every age
# max_count = 5000      # the newest so many; 0 keeps all

# Where a collection gets examples by itself while the agent runs (docs/agent.md has every key).
# [source.temperature]
# kind = "thermal"              # the processor's own sensor; on a phone: "termux-battery"
# every_s = 60
# [source.living_room]
# kind = "mqtt"                 # what is published on a broker nearby: Home Assistant, zigbee2mqtt, ESPHome
# topic = "home/+/temperature"  # host = "127.0.0.1", port = 1883; field = "temperature" where it is a JSON object
# [source.power]
# kind = "file"                 # the lines that are added to a .csv or .jsonl file
# path = "/var/log/power.csv"
# [source.load]
# kind = "command"              # a program that prints one number, or a JSON object (field = "...")
# command = ["cut", "-d ", "-f1", "/proc/loadavg"]
"""
