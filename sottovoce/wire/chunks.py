"""Cutting what is larger than one MQTT message, and putting it together again without trusting anybody.

Two cases. A *blob* or a *masked vector* has a BlobRef (in something signed) that names every chunk's digest: `Assembly`.
An *envelope* larger than one chunk is cut into fragments that name the digest of the whole: `Reassembler`.
Both have bounded memory, and both take chunks in any order, repeated or not.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from sottovoce.errors import BadBlob, MalformedMessage
from sottovoce.plan import BlobRef, digest_of
from sottovoce.wire.codec import MAX_MESSAGE_BYTES


class VectorChunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One chunk of a masked vector; verified against the digests in the signed MaskedInput.

    Attributes:
        session: Session id, 32 bytes.
        index: Which chunk.
        content: Its bytes.
    """

    session: bytes
    index: int
    content: bytes


class _Fragment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="f"):
    digest: bytes
    size: int
    start: int
    content: bytes


_VECTOR_CHUNK = msgspec.msgpack.Decoder(VectorChunk)
_FRAGMENT = msgspec.msgpack.Decoder(_Fragment)
_FRAGMENT_OVERHEAD = 64
_FRAGMENT_PREFIX = msgspec.msgpack.encode(_Fragment(b"", 0, 0, b""))[:3]


def encode_vector_chunk(chunk: VectorChunk) -> bytes:
    """Return the payload that carries `chunk`."""
    return msgspec.msgpack.encode(chunk)


def decode_vector_chunk(payload: bytes) -> VectorChunk:
    """Return the vector chunk in `payload`.

    Raises:
        MalformedMessage: It is not one.
    """
    try:
        return _VECTOR_CHUNK.decode(payload)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise MalformedMessage(f"not a chunk of a masked vector: {error}") from error


class Assembly:
    """A blob or vector being put together in one buffer of its exact size; every chunk is verified as it comes.

    Attributes:
        ref: What is being assembled.
    """

    def __init__(self, ref: BlobRef) -> None:
        self.ref = ref
        self._buffer = bytearray(ref.size)
        self._missing = set(range(ref.chunk_count))

    def add(self, index: int, chunk: bytes) -> bool:
        """Put chunk `index` in its place; return whether the whole is now complete. Repeats change nothing.

        Raises:
            BadBlob: The chunk is not chunk `index` of this blob.
        """
        if index in self._missing or not 0 <= index < self.ref.chunk_count:
            self.ref.verify_chunk(index, chunk)
            self._buffer[self.ref.chunk_slice(index)] = chunk
            self._missing.discard(index)
        return self.complete

    @property
    def complete(self) -> bool:
        """True when no chunk is missing."""
        return not self._missing

    def missing(self) -> list[int]:
        """Indices not yet received, in order."""
        return sorted(self._missing)

    def bitmap(self) -> bytes:
        """Bitmap of received chunks: chunk i is bit i % 8 of byte i // 8."""
        bits = bytearray(-(-self.ref.chunk_count // 8))
        for index in range(self.ref.chunk_count):
            if index not in self._missing:
                bits[index // 8] |= 1 << (index % 8)
        return bytes(bits)

    def content(self) -> bytearray:
        """Return the complete content, verified against the digest of the whole; the buffer itself, not a copy.

        Raises:
            BadBlob: A chunk is missing, or the whole does not match.
        """
        if not self.complete:
            raise BadBlob(f"{len(self._missing)} chunks are missing")
        self.ref.verify(self._buffer)
        return self._buffer


def missing_in_bitmap(bitmap: bytes, chunk_count: int) -> list[int]:
    """Return the chunk indices whose bit is not set.

    Raises:
        MalformedMessage: The bitmap does not have ceil(chunk_count / 8) bytes.
    """
    if len(bitmap) != -(-chunk_count // 8):
        raise MalformedMessage(f"a bitmap of {len(bitmap)} bytes for {chunk_count} chunks")
    return [i for i in range(chunk_count) if not bitmap[i // 8] >> (i % 8) & 1]


def fragments(envelope: bytes, *, chunk_bytes: int) -> list[bytes]:
    """Return the payloads that carry `envelope`: itself if it fits into one message, else its fragments."""
    if len(envelope) <= chunk_bytes:
        return [envelope]
    step = chunk_bytes - _FRAGMENT_OVERHEAD
    digest = digest_of(envelope)
    starts = range(0, len(envelope), step)
    return [msgspec.msgpack.encode(_Fragment(digest, len(envelope), at, envelope[at : at + step])) for at in starts]


class Reassembler:
    """Puts fragments of envelopes together, for one sender; remembers at most `open_limit` unfinished ones."""

    def __init__(self, *, max_bytes: int = MAX_MESSAGE_BYTES, open_limit: int = 2) -> None:
        self._max_bytes = max_bytes
        self._open_limit = open_limit
        self._open: OrderedDict[bytes, dict[int, bytes]] = OrderedDict()

    def add(self, payload: bytes) -> bytes | None:
        """Return the envelope that `payload` completes (often `payload` itself), or None while parts are missing.

        Raises:
            MalformedMessage: A fragment that is not one, or a whole that does not match its digest.
        """
        if not payload.startswith(_FRAGMENT_PREFIX):
            return payload
        try:
            part = _FRAGMENT.decode(payload)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise MalformedMessage(f"not a fragment: {error}") from error
        end = part.start + len(part.content)
        if not 0 < part.size <= self._max_bytes or part.start < 0 or end > part.size or not part.content:
            raise MalformedMessage("a fragment out of range")
        parts = self._open.setdefault(part.digest, {})
        parts[part.start] = part.content
        if sum(map(len, parts.values())) < part.size:
            while len(self._open) > self._open_limit:
                self._open.popitem(last=False)
            return None
        del self._open[part.digest]
        whole = b"".join(parts[start] for start in sorted(parts))
        if len(whole) != part.size or digest_of(whole) != part.digest:
            raise MalformedMessage("fragments that do not make up the envelope they name")
        return whole
