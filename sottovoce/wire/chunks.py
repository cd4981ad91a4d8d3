"""Cutting what is larger than one MQTT message, and putting it together again without trusting anybody.

Two cases. A *blob* or a *masked vector* is announced by something signed, with a digest or a tag of each chunk:
`Assembly`. An *envelope* larger than one chunk is cut into equal fragments that name the digest of the whole:
`Reassembler`.
Both have bounded memory, and both take chunks in any order, repeated or not.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Generic, Protocol, TypeAlias, TypeVar

import msgspec

from sottovoce.blobs import MAX_CHUNK_BYTES, BlobRef, digest_of
from sottovoce.errors import BadBlob, LocalProtocolError, MalformedMessage
from sottovoce.wire.codec import MAX_MESSAGE_BYTES

MAX_ASSEMBLY_BYTES = 64 * 1024 * 1024
"""Largest blob or vector that is put together in memory unless a caller allows another size."""
MIN_FRAGMENT_BYTES = 1024
"""Every fragment but the last carries at least this much, so that few bytes never cost many objects."""


Chunk: TypeAlias = bytes | memoryview
"""Part of something larger; a view if it lies in the message that it came in."""


class Announced(Protocol):
    """What `Assembly` must know of the whole: its size, its chunks, and how to tell the right ones."""

    @property
    def size(self) -> int:
        """Bytes in the whole."""

    @property
    def chunk_count(self) -> int:
        """How many chunks it has."""

    def chunk_slice(self, index: int) -> slice:
        """Return where chunk `index` lies in the whole."""

    def verify_chunk(self, index: int, chunk: Chunk) -> None:
        """Raise BadBlob unless `chunk` is chunk `index`."""


A = TypeVar("A", bound=Announced)


class VectorChunk(msgspec.Struct, frozen=True):
    """One chunk of a masked vector; verified against the tags in the signed MaskedInput.

    Its payload is 40 bytes, session and index (uint64 little-endian), and then the content: so the words of the vector
    lie aligned in memory; numpy adds those that do not through a buffer.

    Attributes:
        session: Session id, 32 bytes.
        index: Which chunk.
        content: Its bytes.
    """

    session: bytes
    index: int
    content: Chunk


class _Fragment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="f"):
    """Part `index` of an envelope of `size` bytes cut every `step` bytes; equal steps leave nothing to overlap."""

    digest: bytes
    size: int
    step: int
    index: int
    content: bytes

    @property
    def in_range(self) -> bool:
        length = min(self.step, self.size - self.index * self.step)
        return (
            len(self.digest) == 32
            and MIN_FRAGMENT_BYTES <= self.step < self.size
            and self.index >= 0
            and len(self.content) == length > 0
        )


_CHUNK_HEAD = struct.Struct("<32sQ")
_FRAGMENT = msgspec.msgpack.Decoder(_Fragment)
_FRAGMENT_OVERHEAD = 64
_FRAGMENT_PREFIX = msgspec.msgpack.encode(_Fragment(b"", 0, 0, 0, b""))[:3]
_UNDECODABLE = (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError)


def encode_vector_chunk(chunk: VectorChunk) -> bytes:
    """Return the payload that carries `chunk`."""
    return b"".join((_CHUNK_HEAD.pack(chunk.session, chunk.index), chunk.content))


def decode_vector_chunk(payload: bytes) -> VectorChunk:
    """Return the vector chunk in `payload`; its content is a view of it.

    Raises:
        MalformedMessage: It is not one, or it is longer than any chunk may be.
    """
    if len(payload) > _CHUNK_HEAD.size + MAX_CHUNK_BYTES:
        raise MalformedMessage(f"{len(payload)} bytes are more than a chunk may have")
    if len(payload) < _CHUNK_HEAD.size:
        raise MalformedMessage(f"{len(payload)} bytes are too few for a chunk of a masked vector")
    session, index = _CHUNK_HEAD.unpack_from(payload)
    return VectorChunk(session, index, memoryview(payload)[_CHUNK_HEAD.size :])


class Assembly(Generic[A]):
    """A blob or vector being put together; every chunk is verified as it comes, and kept as it came.

    Attributes:
        ref: What is being assembled.
    """

    def __init__(self, ref: A, *, max_bytes: int = MAX_ASSEMBLY_BYTES) -> None:
        """Begin with every chunk missing.

        Args:
            ref: What is to be assembled, from something signed.
            max_bytes: The largest size the caller can afford.

        Raises:
            BadBlob: It is larger than `max_bytes`.
        """
        if ref.size > max_bytes:
            raise BadBlob(f"{ref.size} bytes, which is larger than the {max_bytes} allowed")
        self.ref = ref
        self._count = ref.chunk_count
        self._chunks: dict[int, Chunk] = {}
        self._bitmap = bytearray(-(-self._count // 8))

    def add(self, index: int, chunk: Chunk) -> bool:
        """Put chunk `index` in its place; return whether the whole is now complete. Repeats change nothing.

        Raises:
            BadBlob: The chunk is not chunk `index` of it.
        """
        if index not in self._chunks:
            kept = _kept(chunk)
            self.ref.verify_chunk(index, kept)
            self._chunks[index] = kept
            self._bitmap[index // 8] |= 1 << (index % 8)
        return self.complete

    @property
    def complete(self) -> bool:
        """True when no chunk is missing."""
        return self.missing_count == 0

    @property
    def missing_count(self) -> int:
        """How many chunks are missing."""
        return self._count - len(self._chunks)

    def missing(self) -> list[int]:
        """Indices not yet received, in order."""
        return [index for index in range(self._count) if index not in self._chunks]

    def bitmap(self) -> bytes:
        """Bitmap of received chunks: chunk i is bit i % 8 of byte i // 8."""
        return bytes(self._bitmap)

    def chunks(self) -> list[Chunk]:
        """Return all chunks, in order.

        Every byte has been verified against `ref`: sizes and the chunks' digests or tags leave only one content. The
        digest by which a blob is *named* has not been: see `content`.

        Raises:
            BadBlob: A chunk is missing.
        """
        if not self.complete:
            raise BadBlob(f"{self.missing_count} chunks are missing")
        return [self._chunks[index] for index in range(self._count)]

    def content(self: Assembly[BlobRef]) -> bytes:
        """Return the blob that the chunks make up, verified against the digest of the whole, too.

        Raises:
            BadBlob: A chunk is missing, or the whole does not match.
        """
        content = b"".join(self.chunks())
        self.ref.verify(content)
        return content


def _kept(chunk: Chunk) -> Chunk:
    """Return `chunk` itself, unless it could change later, or is so short that the message around it outweighs it."""
    lasting = isinstance(chunk, memoryview) and isinstance(chunk.obj, bytes) and chunk.nbytes >= MIN_FRAGMENT_BYTES
    return chunk if lasting else bytes(chunk)  # The very same object, if it is bytes.


def assemble(ref: A, content: bytes | bytearray | memoryview) -> Assembly[A]:
    """Return the complete assembly of a `content` that is at hand already.

    Raises:
        BadBlob: It has another length than `ref` says, or a chunk of it is not that of `ref`.
    """
    if len(content) != ref.size:
        raise BadBlob(f"{len(content)} bytes where {ref.size} were announced")
    assembly, view = Assembly(ref, max_bytes=ref.size), memoryview(content)
    for index in range(ref.chunk_count):
        assembly.add(index, view[ref.chunk_slice(index)])
    return assembly


def missing_in_bitmap(bitmap: bytes, chunk_count: int) -> list[int]:
    """Return the chunk indices whose bit is not set.

    Raises:
        MalformedMessage: The bitmap does not have ceil(chunk_count / 8) bytes.
    """
    if len(bitmap) != -(-chunk_count // 8):
        raise MalformedMessage(f"a bitmap of {len(bitmap)} bytes for {chunk_count} chunks")
    return [i for i in range(chunk_count) if not bitmap[i // 8] >> (i % 8) & 1]


def fragments(envelope: bytes, *, chunk_bytes: int) -> list[bytes]:
    """Return the payloads that carry `envelope`: itself if it fits into one message, else its fragments.

    Args:
        envelope: The signed bytes.
        chunk_bytes: Largest payload of one message.

    Raises:
        LocalProtocolError: `chunk_bytes` is too small for a fragment.
    """
    if len(envelope) <= chunk_bytes:
        return [envelope]
    step = chunk_bytes - _FRAGMENT_OVERHEAD
    if step < MIN_FRAGMENT_BYTES:
        raise LocalProtocolError(f"messages of {chunk_bytes} bytes are too small to carry fragments")
    digest = digest_of(envelope)
    parts = (envelope[at : at + step] for at in range(0, len(envelope), step))
    return [
        msgspec.msgpack.encode(_Fragment(digest, len(envelope), step, index, part)) for index, part in enumerate(parts)
    ]


class Reassembler:
    """Puts fragments of one sender's envelopes together.

    It holds at most `open_limit` unfinished envelopes, each at most `max_bytes` long and in at most
    `max_bytes / MIN_FRAGMENT_BYTES` parts; only bytes that were really sent are kept. The one that was heard of longest
    ago makes room for a new one: a sender can only crowd out itself.
    """

    def __init__(self, *, max_bytes: int = MAX_MESSAGE_BYTES, open_limit: int = 2) -> None:
        self._max_bytes = max_bytes
        self._open_limit = open_limit
        self._open: OrderedDict[tuple[bytes, int, int], dict[int, bytes]] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Bytes of unfinished envelopes now in memory."""
        return sum(len(content) for parts in self._open.values() for content in parts.values())

    def add(self, payload: bytes) -> bytes | None:
        """Return the envelope that `payload` completes (often `payload` itself), or None while parts are missing.

        Raises:
            MalformedMessage: A fragment that is not one, or a whole that does not match its digest.
        """
        if not payload.startswith(_FRAGMENT_PREFIX):
            return payload
        if len(payload) > self._max_bytes + _FRAGMENT_OVERHEAD:
            raise MalformedMessage(f"a fragment of {len(payload)} bytes, where a whole may have {self._max_bytes}")
        try:
            part = _FRAGMENT.decode(payload)
        except _UNDECODABLE as error:
            raise MalformedMessage(f"not a fragment: {error}") from error
        if part.size > self._max_bytes or not part.in_range:
            raise MalformedMessage("a fragment out of range")
        return self._keep(part)

    def _keep(self, part: _Fragment) -> bytes | None:
        transfer = (part.digest, part.size, part.step)
        parts = self._open.setdefault(transfer, {})
        parts[part.index] = part.content
        if len(parts) < -(-part.size // part.step):
            self._open.move_to_end(transfer)
            while len(self._open) > self._open_limit:
                self._open.popitem(last=False)
            return None
        del self._open[transfer]
        whole = b"".join(parts[index] for index in range(len(parts)))
        if digest_of(whole) != part.digest:
            raise MalformedMessage("fragments that do not make up the envelope they name")
        return whole
