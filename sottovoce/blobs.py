"""What is stored or sent, as data: documents with one encoding, and blobs, named by their SHA-256 and cut into chunks.

Plans, bundles and states are blobs: fetched once, verified, cached. Nothing here does I/O.
"""

from __future__ import annotations

import hashlib

import msgspec

from sottovoce.errors import BadBlob

DEFAULT_CHUNK_BYTES = 256 * 1024
"""Nothing larger travels in one MQTT message; 120 KiB fits AWS IoT, 60 KiB Azure."""
MAX_BLOB_BYTES = 512 * 1024 * 1024
MAX_CHUNK_BYTES = 2**24


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that is stored or sent: immutable, unknown fields refused."""


def digest_of(content: bytes | bytearray | memoryview) -> bytes:
    """Return the SHA-256 of `content`, 32 bytes: the name of a blob."""
    return hashlib.sha256(content).digest()


def canonical(document: msgspec.Struct) -> bytes:
    """Return the one MessagePack encoding of `document`: fields in declaration order, shortest integers."""
    return msgspec.msgpack.encode(document)


class Cut:
    """Something that travels in chunks of one size, the last of them shorter; empty, it has one empty chunk.

    Attributes:
        size: Bytes in the whole, at most MAX_BLOB_BYTES.
        chunk_bytes: Bytes in every chunk but the last, at most MAX_CHUNK_BYTES.
    """

    __slots__ = ()
    size: int
    chunk_bytes: int

    @property
    def is_possible(self) -> bool:
        """Whether both numbers are in range."""
        return 0 <= self.size <= MAX_BLOB_BYTES and 1 <= self.chunk_bytes <= MAX_CHUNK_BYTES

    @property
    def chunk_count(self) -> int:
        """How many chunks it has."""
        return max(1, -(-self.size // self.chunk_bytes))

    def chunk_slice(self, index: int) -> slice:
        """Return where chunk `index` lies in the whole."""
        return slice(index * self.chunk_bytes, min(self.size, (index + 1) * self.chunk_bytes))

    def fits(self, index: int, chunk: bytes | bytearray | memoryview) -> bool:
        """Say whether there is a chunk `index`, and `chunk` has its length."""
        return 0 <= index < self.chunk_count and len(chunk) == min(
            self.chunk_bytes, self.size - index * self.chunk_bytes
        )


class BlobRef(Cut, Document, frozen=True):
    """Names a blob: its SHA-256, its size, and the SHA-256 of every chunk of it.

    Attributes:
        digest: SHA-256 of the whole, 32 bytes.
        size: Bytes in the whole, at most MAX_BLOB_BYTES.
        chunk_bytes: Bytes in every chunk but the last.
        chunk_digests: The chunks' SHA-256 one after another, 32 bytes each.
        sources: Where to fetch it; `mqtt:` is the retained chunks on the fleet's own broker.
    """

    digest: bytes
    size: int
    chunk_bytes: int
    chunk_digests: bytes
    sources: tuple[str, ...] = ("mqtt:",)

    def __post_init__(self) -> None:
        if len(self.digest) != 32 or not self.is_possible:
            raise BadBlob("a blob reference has an impossible digest length, size or chunk size")
        if len(self.chunk_digests) != 32 * self.chunk_count:
            raise BadBlob(
                f"a blob of {self.size} bytes has {self.chunk_count} chunks, not {len(self.chunk_digests) / 32:g}"
            )

    def verify_chunk(self, index: int, chunk: bytes | bytearray | memoryview) -> None:
        """Raise BadBlob unless `chunk` is chunk `index` of this blob."""
        if not self.fits(index, chunk) or digest_of(chunk) != self.chunk_digests[32 * index : 32 * index + 32]:
            raise BadBlob(f"chunk {index} of blob {self.digest.hex()[:12]} does not match its digest")

    def verify(self, content: bytes | bytearray | memoryview) -> None:
        """Raise BadBlob unless `content` is this blob."""
        if len(content) != self.size or digest_of(content) != self.digest:
            raise BadBlob(f"blob {self.digest.hex()[:12]} does not match its digest")


def blob_ref(content: bytes | bytearray | memoryview, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> BlobRef:
    """Return the reference of `content` cut into chunks of `chunk_bytes`."""
    view = memoryview(content)
    starts = range(0, max(len(view), 1), chunk_bytes)
    chunk_digests = b"".join(digest_of(view[at : at + chunk_bytes]) for at in starts)
    return BlobRef(digest=digest_of(view), size=len(view), chunk_bytes=chunk_bytes, chunk_digests=chunk_digests)
