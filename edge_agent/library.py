"""Gets blobs for the agent: from the cache on disk, else from the broker; every byte is verified against its digest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from edge_agent.blobs import BlobCache
from sottovoce.errors import BadBlob, ConfigError, ProgramError
from sottovoce.plan import BlobRef
from sottovoce.transport.base import Transport
from sottovoce.transport.blobs import BlobFetcher, Failed, Fetched, FetchEffect, Subscribe, Unsubscribe
from sottovoce.wire.topics import Topics

Arrived: TypeAlias = Callable[[bytes], None]
_RETRY_MS = 30_000


class Library:
    """Blobs by digest, with what is to happen when one arrives."""

    def __init__(self, folder: Path, transport: Transport, topics: Topics) -> None:
        """Use the cache in `folder`, and `transport` for what is not in it."""
        self._cache = BlobCache(folder)
        self._transport = transport
        self._topics = topics
        self._fetcher = BlobFetcher(topics)
        self._callbacks: dict[bytes, list[Arrived]] = {}
        self._progress_ms = 0

    @property
    def waiting(self) -> bool:
        """True while a blob is on its way."""
        return bool(self._callbacks)

    @property
    def refused(self) -> int:
        """How many chunks were dropped because they did not match their digests."""
        return self._fetcher.refused.total()

    def request(self, ref: BlobRef, arrived: Arrived, *, now_ms: int) -> None:
        """Have `arrived` called with the content of `ref`: at once if it is here, else when it has come.

        Raises:
            BadBlob: It can never be fetched: too large, or nowhere this release can fetch from.
        """
        content = self._cache.get(ref.digest)
        if content is not None:
            arrived(content)
            return
        effects = self._fetcher.want(ref)
        self._callbacks.setdefault(ref.digest, []).append(arrived)
        self._progress_ms = now_ms
        self._perform(effects)

    def owns(self, topic: str) -> bool:
        """Say whether `topic` carries chunks of blobs."""
        return topic.startswith(self._topics.all_blobs_filter().partition("+")[0])

    def receive(self, topic: str, payload: bytes, *, now_ms: int) -> None:
        """Take a chunk; what waited for the blob that it completes is called.

        Raises:
            MalformedMessage: Not the topic of a chunk.
            BadBlob: The blob is complete and can never match its digest.
        """
        self._progress_ms = now_ms
        self._perform(self._fetcher.receive(topic, payload))

    def retry(self, now_ms: int) -> None:
        """Ask the broker again for what has stopped coming: it may have dropped chunks on a full queue."""
        if not self._callbacks or now_ms - self._progress_ms < _RETRY_MS:
            return
        self._progress_ms = now_ms
        for digest in self._fetcher.wanted:
            self._transport.subscribe(self._topics.blob_filter(digest))

    def read(self, digest: bytes) -> bytes:
        """Return a blob that has arrived.

        Raises:
            ProgramError: It is gone from the cache.
        """
        content = self._cache.get(digest)
        if content is None:
            raise ProgramError(f"blob {digest.hex()[:12]} is gone from this device's cache; is the disk full?")
        return content

    def forget_requests(self) -> None:
        """Stop waiting for everything: another round has other needs."""
        waiting, self._callbacks = self._callbacks, {}
        for digest in waiting:
            self._perform(self._fetcher.cancel(digest))

    def _perform(self, effects: list[FetchEffect]) -> None:
        # What arrives comes last: it may ask for the next blob, or fail.
        for effect in sorted(effects, key=lambda each: isinstance(each, Fetched | Failed)):
            match effect:
                case Subscribe(topic_filter=topic_filter):
                    self._transport.subscribe(topic_filter)
                case Unsubscribe(topic_filter=topic_filter):
                    self._transport.unsubscribe(topic_filter)
                case Fetched(ref=ref, content=content):
                    self._finish(ref, content)
                case Failed(ref=ref, reason=reason):
                    self._callbacks.pop(ref.digest, None)
                    raise BadBlob(reason)

    def _finish(self, ref: BlobRef, content: bytes) -> None:
        try:
            self._cache.put(ref.digest, content)
        except OSError as error:
            raise ConfigError(f"cannot keep a blob ({error.strerror}); is the disk full?") from error
        for arrived in self._callbacks.pop(ref.digest, []):
            arrived(content)
