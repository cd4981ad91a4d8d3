"""Who is said to be connected, and since when not: status hints that shorten waiting and decide nothing else."""

from __future__ import annotations

from collections.abc import Iterable


class Presence:
    """The last status hint of each device, with the time since which it is gone.

    Args:
        online: Devices that are connected now.
        offline: Devices that are not.
        now_ms: Coordinator's time.
        grace_ms: A device counts as gone only after so long: short outages are common.
    """

    def __init__(self, *, online: Iterable[str], offline: Iterable[str], now_ms: int, grace_ms: int) -> None:
        self.online = set(online)
        self._offline_since = dict.fromkeys(offline, now_ms - grace_ms)
        self._grace_ms = grace_ms

    def note(self, device: str, *, online: bool, now_ms: int) -> None:
        """Take a status hint in."""
        if online:
            self.online.add(device)
            self._offline_since.pop(device, None)
        else:
            self.online.discard(device)
            self._offline_since.setdefault(device, now_ms)

    def offline(self, device: str) -> bool:
        """Say whether the last hint of `device` says not connected."""
        return device in self._offline_since

    def gone(self, device: str, now_ms: int) -> bool:
        """Say whether `device` has been disconnected for longer than the grace time."""
        since = self._offline_since.get(device)
        return since is not None and now_ms - since >= self._grace_ms

    def gone_at_ms(self) -> list[int]:
        """Return the times at which the disconnected devices count as gone."""
        return [since + self._grace_ms for since in self._offline_since.values()]
