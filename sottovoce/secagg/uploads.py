"""What keeps a masked vector whole on its way: every chunk has a tag that only its device and the coordinator can make.

A tag is an AEAD's over no text, with the chunk as associated data and its index as the nonce: AES-256-GCM where the
session's masks are AES's, which every processor of the session is fast at then, else ChaCha20-Poly1305 (RFC 8439). It
replaces a digest because either is faster than SHA-256, and the server checks thousands of vectors. A key
is for one vector: it comes from a channel key and a session id that are fresh, and a device masks once a session.

Reference: `docs/SPEC.md`, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from sottovoce.blobs import Cut
from sottovoce.errors import BadBlob
from sottovoce.wire.messages import CHUNK_TAG_BYTES, Cipher, TaggedVector

Aead: TypeAlias = AESGCM | ChaCha20Poly1305
_AEADS: dict[Cipher, type[Aead]] = {"aes-128-ctr": AESGCM, "chacha20": ChaCha20Poly1305}
_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class ExpectedVector(Cut):
    """A masked vector that a device has announced, and what tells its chunks from others.

    Attributes:
        size: Bytes in the whole.
        chunk_bytes: Bytes in every chunk but the last.
        tags: The chunks' tags one after another.
    """

    size: int
    chunk_bytes: int
    tags: bytes
    _aead: Aead = field(repr=False, compare=False)

    def verify_chunk(self, index: int, chunk: bytes | bytearray | memoryview) -> None:
        """Raise BadBlob unless the device has tagged `chunk` as chunk `index` of its vector."""
        if not self.fits(index, chunk):
            raise BadBlob(f"{len(chunk)} bytes are not chunk {index} of the masked vector that was announced")
        tag = self.tags[CHUNK_TAG_BYTES * index : CHUNK_TAG_BYTES * (index + 1)]
        try:
            self._aead.decrypt(_nonce(index), tag, chunk)
        except InvalidTag as error:
            raise BadBlob(f"chunk {index} of a masked vector does not match its tag") from error


def expect(announced: TaggedVector, key: bytes, cipher: Cipher) -> ExpectedVector:
    """Return what the coordinator expects of a device that has `announced` a vector under the upload key `key`."""
    return ExpectedVector(announced.size, announced.chunk_bytes, announced.tags, _AEADS[cipher](key))


def tag_vector(vector: bytes | bytearray, key: bytes, cipher: Cipher, *, chunk_bytes: int) -> TaggedVector:
    """Return the announcement of a masked `vector` that will be uploaded in chunks of `chunk_bytes`.

    Args:
        vector: As it goes over the wire.
        key: The upload key, 32 bytes; for this vector and no other.
        cipher: The session's.
        chunk_bytes: Bytes in every chunk but the last.
    """
    aead, view = _AEADS[cipher](key), memoryview(vector)
    starts = range(0, len(view), chunk_bytes)
    tags = [aead.encrypt(_nonce(i), b"", view[at : at + chunk_bytes]) for i, at in enumerate(starts)]
    return TaggedVector(size=len(view), chunk_bytes=chunk_bytes, tags=b"".join(tags))


def _nonce(index: int) -> bytes:
    return index.to_bytes(_NONCE_BYTES, "little")
