"""Blobs over MQTT: every chunk retained under its own topic, so that a device fetches them whenever it comes.

`BlobPublisher` (the coordinator's side) drives a Transport, a few chunks at a time, and clears what is superseded, also
what an earlier run left behind when it crashed. `BlobFetcher` (the device's side) is sans-IO: its methods return what
to do. Who publishes a chunk is of no consequence: a chunk that does not match its digest is dropped and awaited again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import TypeAlias

from sottovoce.blobs import BlobRef
from sottovoce.errors import BadBlob
from sottovoce.transport.base import Transport
from sottovoce.wire.chunks import MAX_ASSEMBLY_BYTES, Assembly
from sottovoce.wire.topics import Topics

MQTT_SOURCE = "mqtt:"


class BlobPublisher:
    """Keeps the wanted blobs, and only those, retained at the broker.

    Every published blob stays in memory until it is retired, because a broker may lose what it retained. Call `advance`
    after each `receive` of the transport.
    """

    def __init__(self, transport: Transport, topics: Topics, *, window: int = 4) -> None:
        """Start with nothing published.

        Args:
            transport: The coordinator's link.
            topics: Of its fleet.
            window: Hand over no chunk while so many publishes of the link are not acknowledged.
        """
        self._transport = transport
        self._topics = topics
        self._window = window
        self._blobs: dict[bytes, tuple[BlobRef, memoryview]] = {}
        self._queue: deque[tuple[bytes, int]] = deque()

    @property
    def wanted(self) -> frozenset[bytes]:
        """Digests of the blobs that are, or soon will be, retained at the broker."""
        return frozenset(self._blobs)

    def publish(self, ref: BlobRef, content: bytes) -> None:
        """Have `content` retained at the broker; nothing happens if it is already.

        Raises:
            BadBlob: `content` is not what `ref` says, or a chunk is larger than the link carries.
        """
        if ref.digest in self._blobs:
            return
        ref.verify(content)
        if min(ref.chunk_bytes, ref.size) > self._transport.max_payload_bytes:
            raise BadBlob(
                f"chunks of {ref.chunk_bytes} bytes do not fit into the {self._transport.max_payload_bytes} bytes that "
                "the link to the broker carries: make smaller chunks"
            )
        self._blobs[ref.digest] = (ref, memoryview(content))
        self._queue_chunks(ref)

    def retire(self, digest: bytes) -> None:
        """Have the broker forget the blob; nothing happens if it was never published."""
        if digest in self._blobs:
            ref, _ = self._blobs.pop(digest)
            self._queue_chunks(ref)

    def restore(self) -> None:
        """Publish everything again: the broker did not resume the session, so it may have lost retained chunks."""
        for ref, _ in self._blobs.values():
            self._queue_chunks(ref)

    def adopt(self, topic: str, payload: bytes) -> None:
        """Look at a chunk that a subscription to `topics.all_blobs_filter` has brought up; clear it unless wanted.

        Publish what is wanted first, then subscribe: what an earlier run has published and this one does not is
        superseded. The subscription also brings this publisher's own messages; they change nothing.

        Raises:
            MalformedMessage: Not the topic of a blob chunk.
        """
        digest, index = self._topics.split_blob_chunk(topic)
        if payload and not self._is_wanted(digest, index):
            self._queue.append((digest, index))

    def advance(self) -> bool:
        """Hand over as many chunks as the window allows; return True when none is left.

        Raises:
            TransportError: The link is closed.
        """
        while self._queue and self._transport.pending() < self._window:
            digest, index = self._queue[0]
            self._transport.publish(self._topics.blob_chunk(digest, index), self._chunk(digest, index), retain=True)
            self._queue.popleft()
        return not self._queue

    def _queue_chunks(self, ref: BlobRef) -> None:
        """Queue every chunk, to be published or cleared: what it is is looked up when its turn comes."""
        self._queue.extend((ref.digest, index) for index in range(ref.chunk_count))

    def _chunk(self, digest: bytes, index: int) -> bytes:
        """Return what must be retained: the chunk, or nothing if it is not wanted any more."""
        if not self._is_wanted(digest, index):
            return b""
        ref, content = self._blobs[digest]
        return bytes(content[ref.chunk_slice(index)])

    def _is_wanted(self, digest: bytes, index: int) -> bool:
        return digest in self._blobs and index < self._blobs[digest][0].chunk_count


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Effect: subscribe to this filter."""

    topic_filter: str


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Effect: unsubscribe from this filter."""

    topic_filter: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """Effect: the blob is here, verified."""

    ref: BlobRef
    content: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """Effect: no content can ever fit this reference: its chunks are right and the whole is not."""

    ref: BlobRef
    reason: str


FetchEffect: TypeAlias = Subscribe | Unsubscribe | Fetched | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """Bounds on what a fetcher holds in memory.

    Attributes:
        blob_bytes: Largest blob.
        open_blobs: Fetched at the same time; the others wait their turn.
        open_bytes: Likewise, in bytes; one blob alone may always be fetched.
        waiting_blobs: Waiting for their turn.
    """

    blob_bytes: int = MAX_ASSEMBLY_BYTES
    open_blobs: int = 4
    open_bytes: int = MAX_ASSEMBLY_BYTES
    waiting_blobs: int = 64


class BlobFetcher:
    """Fetches blobs from their retained chunks, several at once, in bounded memory. Does no I/O.

    Attributes:
        refused: How many chunks were dropped, by reason.
    """

    def __init__(self, topics: Topics, *, limits: FetchLimits | None = None) -> None:
        self._topics = topics
        self._limits = limits or FetchLimits()
        self._open: dict[bytes, Assembly[BlobRef]] = {}
        self._waiting: OrderedDict[bytes, BlobRef] = OrderedDict()
        self.refused: Counter[str] = Counter()

    @property
    def wanted(self) -> frozenset[bytes]:
        """Digests of the blobs that are being fetched or wait for their turn."""
        return frozenset(self._open) | frozenset(self._waiting)

    def want(self, ref: BlobRef) -> list[FetchEffect]:
        """Begin to fetch `ref`, or queue it; nothing happens if it is wanted already.

        Raises:
            BadBlob: It is too large, it is nowhere this release can fetch from, or too many others are wanted.
        """
        if ref.digest in self.wanted:
            return []
        if ref.size > self._limits.blob_bytes:
            raise BadBlob(f"a blob of {ref.size} bytes; this device fetches at most {self._limits.blob_bytes}")
        if MQTT_SOURCE not in ref.sources:
            raise BadBlob(
                f"the blob is only at {', '.join(ref.sources) or 'no source'}; this release needs {MQTT_SOURCE}"
            )
        if len(self._waiting) >= self._limits.waiting_blobs:
            raise BadBlob(f"{len(self._waiting)} blobs are already waiting to be fetched")
        if ref.size == 0:  # An empty retained message is none: there is nothing to wait for.
            ref.verify(b"")
            return [Fetched(ref, b"")]
        self._waiting[ref.digest] = ref
        return self._open_waiting()

    def receive(self, topic: str, payload: bytes) -> list[FetchEffect]:
        """Take a chunk; one that does not fit is counted and dropped, one of a blob not wanted is ignored.

        Raises:
            MalformedMessage: Not the topic of a blob chunk.
        """
        digest, index = self._topics.split_blob_chunk(topic)
        assembly = self._open.get(digest)
        if assembly is None or not payload:  # Nothing retained any more: the coordinator has cleared the chunk.
            return []
        try:
            complete = assembly.add(index, payload)
        except BadBlob as error:
            self.refused[error.reason] += 1
            return []
        return self._finish(assembly) if complete else []

    def cancel(self, digest: bytes) -> list[FetchEffect]:
        """Stop fetching the blob and forget its chunks; nothing happens if it is not wanted."""
        self._waiting.pop(digest, None)
        return self._close(digest)

    def missing(self, digest: bytes) -> int | None:
        """Return how many chunks are still missing, or None for a blob that is not being fetched."""
        assembly = self._open.get(digest)
        return None if assembly is None else len(assembly.missing())

    def _finish(self, assembly: Assembly[BlobRef]) -> list[FetchEffect]:
        result: Fetched | Failed
        try:
            result = Fetched(assembly.ref, assembly.content())
        except BadBlob as error:
            result = Failed(assembly.ref, str(error))
        return [result, *self._close(assembly.ref.digest)]

    def _close(self, digest: bytes) -> list[FetchEffect]:
        if self._open.pop(digest, None) is None:
            return []
        return [Unsubscribe(self._topics.blob_filter(digest)), *self._open_waiting()]

    def _open_waiting(self) -> list[FetchEffect]:
        effects: list[FetchEffect] = []
        while self._waiting:
            ref = next(iter(self._waiting.values()))
            held_bytes = sum(assembly.ref.size for assembly in self._open.values())
            too_much = held_bytes + ref.size > self._limits.open_bytes
            if self._open and (too_much or len(self._open) >= self._limits.open_blobs):
                break
            del self._waiting[ref.digest]
            self._open[ref.digest] = Assembly(ref, max_bytes=self._limits.blob_bytes)
            effects.append(Subscribe(self._topics.blob_filter(ref.digest)))
        return effects
