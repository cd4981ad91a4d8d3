"""What a coordinator tells people and programs while it works: the events file and the count of refusals.

The events file has one JSON object per line, flushed per line, in the stable format that `docs/coordinator.md`
describes. Both are written by the shell only.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import TextIO

LOG = logging.getLogger("coordinator")
_QUIET_MS = 10_000


class EventLog:
    """Writes one JSON object per line; without a file it writes nothing."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def write(self, event: str, *, time_ms: int, **fields: object) -> None:
        """Append an event.

        Args:
            event: Its name.
            time_ms: The coordinator's time, Unix milliseconds.
            fields: Whatever JSON can hold; sets become sorted lists.
        """
        if self._file is None:
            return
        line = json.dumps({"event": event, "time_ms": time_ms, **fields}, default=sorted)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            self._file.close()


class Refusals:
    """Counts refused messages by reason, with at most one log line per reason every ten seconds."""

    def __init__(self) -> None:
        self._new: Counter[str] = Counter()
        self._logged_ms: dict[str, int] = {}
        self._unsaid: Counter[str] = Counter()

    def count(self, reason: str, detail: str, *, now_ms: int) -> bool:
        """Count one refused message and return whether it was logged; `reason` is a short code of sottovoce.errors."""
        self._new[reason] += 1
        self._unsaid[reason] += 1
        if now_ms - self._logged_ms.get(reason, now_ms - _QUIET_MS) < _QUIET_MS:
            return False
        LOG.warning("refused %d x %s: %s", self._unsaid.pop(reason), reason, detail[:200])
        self._logged_ms[reason] = now_ms
        return True

    def take(self) -> dict[str, int]:
        """Return what was counted since the last call."""
        taken, self._new = dict(self._new), Counter()
        return taken
