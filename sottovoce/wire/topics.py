"""The only topic strings: at most six slashes, so that every broker and cloud carries them.

sv1/{fleet}/all/round            retained announcement of the current round
sv1/{fleet}/all/outcome          retained outcome of the last round
sv1/{fleet}/all/blob/{digest}/{i}   retained chunk i of a blob
sv1/{fleet}/st/{device}          retained status and last will of a device, written by it
sv1/{fleet}/up/{device}/{route}/m   messages of a device
sv1/{fleet}/up/{device}/{route}/c   chunks of its masked vector
sv1/{fleet}/dn/{device}/m        messages to a device
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sottovoce.errors import ConfigError, LocalProtocolError, MalformedMessage
from sottovoce.identity import NAME

_ROOT = "sv1"
_NAME = NAME.pattern
_BELOW_FLEET = re.compile(
    rf"all/round|all/outcome|all/blob/[0-9a-f]{{64}}/(?:0|[1-9][0-9]{{0,6}})"
    rf"|st/{_NAME}|up/{_NAME}/{_NAME}/[mc]|dn/{_NAME}/m"
)
NO_ROUTE = "0"
"""Route of a device that has not been given one by a signed selection."""


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one fleet.

    Raises:
        ConfigError: The fleet's name cannot stand in a topic.
    """

    fleet: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.fleet):
            raise ConfigError(f"the fleet name {self.fleet!r} must be 1 to 64 characters of A-Z a-z 0-9 _ -")

    def round(self) -> str:
        """Where the current announcement is retained."""
        return f"{_ROOT}/{self.fleet}/all/round"

    def outcome(self) -> str:
        """Where the last outcome is retained."""
        return f"{_ROOT}/{self.fleet}/all/outcome"

    def blob_chunk(self, digest: bytes, index: int) -> str:
        """Where chunk `index` of the blob is retained."""
        return f"{_ROOT}/{self.fleet}/all/blob/{digest.hex()}/{index}"

    def blob_filter(self, digest: bytes) -> str:
        """Filter for all chunks of one blob."""
        return f"{_ROOT}/{self.fleet}/all/blob/{digest.hex()}/+"

    def all_blobs_filter(self) -> str:
        """Filter for every retained chunk: how a restarted coordinator finds superseded ones."""
        return f"{_ROOT}/{self.fleet}/all/blob/+/+"

    def status(self, device: str) -> str:
        """Where a device's status and last will are retained."""
        return f"{_ROOT}/{self.fleet}/st/{device}"

    def status_filter(self) -> str:
        """Filter for every device's status."""
        return self.status("+")

    def up_message(self, device: str, route: str = NO_ROUTE) -> str:
        """Where a device publishes messages."""
        return f"{_ROOT}/{self.fleet}/up/{device}/{route}/m"

    def up_chunk(self, device: str, route: str) -> str:
        """Where a device publishes chunks of its masked vector."""
        return f"{_ROOT}/{self.fleet}/up/{device}/{route}/c"

    def up_filters(self) -> tuple[str, str]:
        """Filters for everything devices send."""
        return self.up_message("+", "+"), self.up_chunk("+", "+")

    def down(self, device: str) -> str:
        """Where the coordinator publishes to one device."""
        return f"{_ROOT}/{self.fleet}/dn/{device}/m"

    def split(self, topic: str) -> tuple[str, ...]:
        """Return the levels of `topic` after the fleet, for example `("up", "pi-7", "0", "m")`.

        Every level is what the table above says it is: a known kind, a device id, a route, a digest, an index.

        Raises:
            MalformedMessage: The topic is not one of this fleet.
        """
        prefix = f"{_ROOT}/{self.fleet}/"
        below = topic[len(prefix) :]
        if not topic.startswith(prefix) or not _BELOW_FLEET.fullmatch(below):
            raise MalformedMessage(f"topic {topic[:200]!r} is not one of fleet {self.fleet!r}")
        return tuple(below.split("/"))

    def split_blob_chunk(self, topic: str) -> tuple[bytes, int]:
        """Return the digest and the index that the topic of a blob chunk names.

        Raises:
            MalformedMessage: The topic is not that of a blob chunk of this fleet.
        """
        match self.split(topic):
            case ("all", "blob", digest, index):
                return bytes.fromhex(digest), int(index)
        raise MalformedMessage(f"topic {topic!r} is not that of a blob chunk")


def matches(topic_filter: str, topic: str) -> bool:
    """Say whether `topic` is one that a subscription to `topic_filter` receives (MQTT 5, section 4.7)."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    if wanted[-1] == "#":
        wanted.pop()
        levels = levels[: len(wanted)]
    return len(wanted) == len(levels) and all(want in ("+", have) for want, have in zip(wanted, levels, strict=True))


def check_topic(topic: str) -> None:
    """Raise LocalProtocolError unless `topic` is one that may be published to."""
    if not 0 < len(topic.encode()) <= 65_535 or any(sign in topic for sign in "+#\0"):
        raise LocalProtocolError(f"{topic[:200]!r} is not a topic: it is empty, too long, or has a wildcard")


def check_filter(topic_filter: str) -> None:
    """Raise LocalProtocolError unless `topic_filter` is one that may be subscribed to."""
    levels = topic_filter.split("/")
    misplaced = any(
        ("+" in level and level != "+") or ("#" in level and (level != "#" or index < len(levels) - 1))
        for index, level in enumerate(levels)
    )
    if misplaced or "\0" in topic_filter or not 0 < len(topic_filter.encode()) <= 65_535:
        raise LocalProtocolError(f"{topic_filter[:200]!r} is not a topic filter")
