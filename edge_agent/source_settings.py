"""Where a collection gets its examples by itself: the tables `[source.COLLECTION]` of agent.toml, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sottovoce.errors import ConfigError, LocalProtocolError
from sottovoce.wire.topics import check_filter

SourceKind: TypeAlias = Literal["thermal", "termux-battery", "command", "file", "mqtt"]
_THERMAL_ZONE = "/sys/class/thermal/thermal_zone0/temp"
_FILE_ENDINGS = (".csv", ".jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One source; what it reads becomes examples of its collection, in the column `value` unless a file names others.

    Attributes:
        kind: `thermal`: the processor's temperature in degrees Celsius (Linux). `termux-battery`: the battery's
            temperature on a phone with Termux:API. `command`: what a program prints. `file`: the lines that are added
            to a .csv or .jsonl file. `mqtt`: what is published on a broker nearby.
        every_s: Seconds between two readings; for `mqtt` the least time between two of one topic, 0 takes all.
        path: For `file`, and for `thermal` another zone than the first.
        command: For `command`: program and arguments; no shell is involved.
        timeout_s: For commands: after so many seconds they are killed.
        field: For `command` and `mqtt`: the member of a JSON object that is read, such as `temperature`, or `a.b`.
        scale: Readings are multiplied by this.
        host: For `mqtt`: the broker.
        port: Its port.
        topic: Topic filter, such as `home/+/temperature`.
        username: Where that broker wants one.
        password_file: File with the password, its first line.
    """

    kind: SourceKind
    every_s: float = 60.0
    path: str = ""
    command: tuple[str, ...] = ()
    timeout_s: float = 30.0
    field: str = ""
    scale: float = 1.0
    host: str = "127.0.0.1"
    port: int = 1883
    topic: str = ""
    username: str = ""
    password_file: str = ""

    def __post_init__(self) -> None:
        """Raise ConfigError where a key is missing, does not belong to this kind, or has an impossible value."""
        needed = _NEEDED[self.kind]
        if needed and not getattr(self, needed):
            raise ConfigError(f'source: kind = "{self.kind}" needs the key {needed}')
        for key, kinds in _ONLY_FOR.items():
            if getattr(self, key) and self.kind not in kinds:
                raise ConfigError(f'source: the key {key} has no meaning for kind = "{self.kind}"; remove it')
        if self.topic:
            _check_topic(self.topic)
        for holds, text in (
            (0 <= self.every_s < float("inf"), "every_s must be 0 or more seconds"),
            (self.every_s > 0 or self.kind in ("mqtt", "file"), f'every_s must be above 0 for kind = "{self.kind}"'),
            (0 < self.timeout_s < float("inf"), "timeout_s must be above 0"),
            (0 < abs(self.scale) < float("inf"), "scale must not be 0"),
            (1 <= self.port <= 65535, "port must be 1 to 65535"),
            (self.kind != "file" or self.path.endswith(_FILE_ENDINGS), "path must end in .csv or .jsonl"),
        ):
            if not holds:
                raise ConfigError(f"source: {text}")

    @property
    def program(self) -> tuple[str, ...]:
        """Program and arguments of a source that runs one."""
        return ("termux-battery-status",) if self.kind == "termux-battery" else self.command

    @property
    def member(self) -> str:
        """The member of a JSON object that is read; empty where a reading is a bare number."""
        return "temperature" if self.kind == "termux-battery" else self.field

    @property
    def number_file(self) -> tuple[str, float]:
        """The file that holds one number, and what the number is multiplied by (the kernel counts millidegrees)."""
        return self.path or _THERMAL_ZONE, 0.001 * self.scale


def _check_topic(topic: str) -> None:
    try:
        check_filter(topic)
    except LocalProtocolError as error:
        raise ConfigError(
            f"source: topic = {topic!r} is no topic filter: + stands for one whole level, # for the whole rest"
        ) from error


_NEEDED: Mapping[SourceKind, str] = {
    "thermal": "",
    "termux-battery": "",
    "command": "command",
    "file": "path",
    "mqtt": "topic",
}
_ONLY_FOR: Mapping[str, tuple[SourceKind, ...]] = {
    "path": ("file", "thermal"),
    "command": ("command",),
    "field": ("command", "mqtt"),
    "topic": ("mqtt",),
    "username": ("mqtt",),
    "password_file": ("mqtt",),
}
