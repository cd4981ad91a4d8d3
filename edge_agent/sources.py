"""Fills collections from their sources: asked by the agent's loop, it carries what is new into the example store.

A source that fails is asked again at its next time; what is wrong is logged once, and again when it has changed, or has
been well in between, at most every ten minutes: a topic where every other message is no number must not fill the log.
Lines of a file and the position behind them are stored in one transaction, so that none is lost or counted twice by a
crash.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from edge_agent.examples import ExampleStore
from edge_agent.source_readers import Batch, Reader, open_reader
from edge_agent.source_settings import SourceConfig
from sottovoce.errors import BadExamples
from sottovoce.transport.base import Transport

_RETAIN_EVERY_MS = 60_000
_SAY_EVERY_MS = 600_000

log = logging.getLogger("edge-agent")


class Sources:
    """All sources of one device.

    Attributes:
        added: Collection -> examples added since the start.
        dropped: Collection -> readings and lines that were no examples.
    """

    def __init__(
        self,
        configs: Mapping[str, SourceConfig],
        store: ExampleStore,
        *,
        connect: Callable[[str, SourceConfig], Transport],
        retain: Callable[[str], None],
    ) -> None:
        """Open every source.

        Args:
            configs: Collection -> its source.
            store: The device's examples.
            connect: Makes the link to the broker that the source of a collection names.
            retain: Forgets what the owner does not want to keep of a collection.
        """
        self._store = store
        self._retain = retain
        self._readers: dict[str, Reader] = {
            collection: open_reader(
                config,
                position=store.position(collection),
                connect=functools.partial(connect, collection),
            )
            for collection, config in configs.items()
        }
        self._said: dict[str, tuple[str, int]] = {}
        self._well: set[str] = set()
        self._retained_ms: dict[str, int] = {}
        self.added: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def poll(self, *, now_ms: int, now_s: float) -> None:
        """Carry what is new into the store.

        Args:
            now_ms: The agent's clock.
            now_s: The latest time the device knows, Unix seconds: what the examples count as added at.

        Raises:
            ConfigError: The store cannot be written.
        """
        for collection, reader in self._readers.items():
            try:
                batch = reader.read(now_ms)
            except BadExamples as error:
                self._say(collection, str(error), now_ms)
                continue
            if batch.rows or batch.errors or batch.position is not None:
                self._keep(collection, batch, now_ms=now_ms, now_s=now_s)
            if now_ms - self._retained_ms.get(collection, 0) >= _RETAIN_EVERY_MS:
                self._retained_ms[collection] = now_ms
                self._retain(collection)

    def close(self) -> None:
        """Let go of everything."""
        for reader in self._readers.values():
            reader.close()

    def _keep(self, collection: str, batch: Batch, *, now_ms: int, now_s: float) -> None:
        appended = self._store.append(collection, batch.rows, now_s=now_s, position=batch.position)
        errors = [*batch.errors, *appended.errors]
        self.added[collection] += appended.added
        self.dropped[collection] += len(errors)
        if errors:
            self._say(collection, errors[0], now_ms)
        elif appended.added:
            self._well.add(collection)

    def _say(self, collection: str, text: str, now_ms: int) -> None:
        before, said_ms = self._said.get(collection, ("", now_ms - _SAY_EVERY_MS))
        if now_ms - said_ms >= _SAY_EVERY_MS and (text != before or collection in self._well):
            self._said[collection] = text, now_ms
            self._well.discard(collection)
            log.warning("source of %s: %s", collection, text)
