"""Gets blobs for the agent: from the cache on disk, else from the broker; every byte is verified against its digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from edge_agent.blobs import BlobCache
from sottovoce.blobs import BlobRef
from sottovoce.errors import BadBlob, ConfigError, ProgramError
from sottovoce.transport.base import Transport
from sottovoce.transport.blobs import BlobFetcher, Failed, Fetched, FetchEffect, Subscribe, Unsubscribe
from sottovoce.wire.topics import Topics

Arrived: TypeAlias = Callable[[bytes], None]
_RETRY_MS = 30_000


@dataclass(frozen=True, slots=True)
class _Request:
    arrived: Arrived
    lasting: bool


class Library:
    """Blobs by digest, with what is to happen when one arrives."""

    def __init__(self, folder: Path, transport: Transport, topics: Topics) -> None:
        """Use the cache in `folder`, and `transport` for what is not in it."""
        self._cache = BlobCache(folder)
        self._transport = transport
        self._topics = topics
        self._fetcher = BlobFetcher(topics)
        self._callbacks: dict[bytes, list[_Request]] = {}
        self._progress_ms = 0

    @property
    def waiting(self) -> bool:
        """True while a blob is on its way."""
        return bool(self._callbacks)

    @property
    def refused(self) -> int:
        """How many chunks were dropped because they did not match their digests."""
        return self._fetcher.refused.total()

    def request(self, ref: BlobRef, arrived: Arrived, *, now_ms: int, lasting: bool = False) -> None:
        """Have `arrived` called with the content of `ref`: at once if it is here, else when it has come.

        Args:
            ref: The blob.
            arrived: Called once.
            now_ms: The time, for `retry`.
            lasting: The request outlives `forget_requests`, until the next lasting one takes its place.

        Raises:
            BadBlob: It can never be fetched: too large, or nowhere this release can fetch from.
        """
        if lasting:
            self._forget(lambda request: request.lasting)
        content = self._cache.get(ref.digest)
        if content is not None:
            arrived(content)
            return
        effects = self._fetcher.want(ref)
        self._callbacks.setdefault(ref.digest, []).append(_Request(arrived, lasting))
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
        """Stop waiting for everything that is not lasting: another round has other needs."""
        self._forget(lambda request: not request.lasting)

    def _forget(self, unwanted: Callable[[_Request], bool]) -> None:
        for digest, requests in list(self._callbacks.items()):
            wanted = [request for request in requests if not unwanted(request)]
            if wanted:
                self._callbacks[digest] = wanted
            else:
                del self._callbacks[digest]
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
        for request in self._callbacks.pop(ref.digest, []):
            request.arrived(content)
