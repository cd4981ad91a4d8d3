"""The coordinator of a fleet in memory: the real service on a journal of its own, driven by turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.events import EventLog
from coordinator.journal import Journal
from coordinator.journal_rows import Answer
from coordinator.requests import check_request
from coordinator.sequence import Setup
from coordinator.service import Service
from coordinator.settings import UploadSettings
from coordinator.terms import RoundTerms, check_terms
from simulation.memory_device import FLEET, SimulatedClock
from sottovoce.blobs import DEFAULT_CHUNK_BYTES
from sottovoce.identity import Identity, TrustAnchor
from sottovoce.language.ports import RoundRequest
from sottovoce.transport.memory import COORDINATOR, MemoryBroker, MemoryTransport


class CollectedEvents(EventLog):
    """Keeps the coordinator's events in memory.

    Attributes:
        events: All so far, as (name, fields).
    """

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.events: list[tuple[str, dict[str, Any]]] = []

    def write(self, event: str, *, time_ms: int, **fields: object) -> None:
        """Keep an event."""
        self.events.append((event, {"time_ms": time_ms, **fields}))


class MemoryCoordinator:
    """The coordinator: its journal stays, its service comes and goes.

    Attributes:
        log: What it told.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: Identity,
        anchor: TrustAnchor,
        broker: MemoryBroker,
        clock: SimulatedClock,
        entropy: Callable[[int], bytes],
    ) -> None:
        """Start a coordinator with its journal in `folder`.

        Args:
            folder: Made by the caller.
            identity: Its key and certificate.
            anchor: The fleet CA's certificate.
            broker: The fleet's broker.
            clock: The fleet's time.
            entropy: Where its randomness comes from.
        """
        self.log = CollectedEvents()
        self._broker = broker
        self._clock = clock
        self._path = folder / "journal.sqlite"
        self._setup = Setup(
            identity=identity,
            anchor=anchor,
            chunk_bytes=DEFAULT_CHUNK_BYTES,
            uploads=UploadSettings(),
            entropy=entropy,
        )
        self._start()

    def ask(self, request: RoundRequest, terms: RoundTerms, *, deadline_ms: int) -> int:
        """Put `request` into the queue, as `coordinator.connect` does, and return its number.

        Raises:
            ConfigError: No coordinator could run it, or something else was asked under its key.
        """
        check_terms(terms, where="simulation.fleet")
        check_request(request, terms, fleet=FLEET, chunk_bytes=self._setup.chunk_bytes)
        return self._journal.ask(request, terms, deadline_ms=deadline_ms, now_ms=self._clock())

    def answer(self, number: int) -> Answer:
        """Return how a request stands."""
        return self._journal.answer(number)

    def give_up(self, number: int) -> None:
        """Take a request out of the queue, unless it is answered already."""
        self._journal.end_task(number, "cancelled", "cancelled: whoever asked has given up")

    def turn(self) -> None:
        """Take in one message and do what follows from it and from the time."""
        self._service.step(self._clock(), 0.0)

    def due_ms(self) -> int:
        """Return when it has something to do by the clock."""
        now_ms = self._clock()
        return now_ms + round(1000 * self._service.wait_s(now_ms))

    def crash(self) -> None:
        """End the service as SIGKILL does, and start another one on what its journal remembers."""
        self._broker.disconnect(COORDINATOR)
        self._transport.close()
        self._journal.close()
        self._start()

    def close(self) -> None:
        """End the service and close its files."""
        self._service.stop(self._clock())
        self._transport.close()
        self._journal.close()

    def _start(self) -> None:
        self._journal = Journal(self._path)
        self._transport = MemoryTransport(self._broker, COORDINATOR)
        self._service = Service(self._setup, journal=self._journal, transport=self._transport, events=self.log)
        self._service.start(self._clock())
