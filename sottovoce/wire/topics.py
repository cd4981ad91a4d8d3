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

from dataclasses import dataclass

from sottovoce.errors import MalformedMessage

_ROOT = "sv1"
NO_ROUTE = "0"
"""Route of a device that has not been given one by a signed selection."""


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one fleet."""

    fleet: str

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

        Raises:
            MalformedMessage: The topic is not one of this fleet.
        """
        root, fleet, *rest = topic.split("/")[:1] + topic.split("/")[1:2] + topic.split("/")[2:]
        if root != _ROOT or fleet != self.fleet or len(rest) < 2:
            raise MalformedMessage(f"topic {topic!r} is not one of fleet {self.fleet!r}")
        return tuple(rest)
