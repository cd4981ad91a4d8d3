"""docs/SPEC.md written a second time, slowly, without numpy and without importing anything of sottovoce.

The vectors beside this file come from here, and so does the minimal device (`spec_device.py`): both sides of every
comparison are then written by different hands. Shares and the vector have modules of their own, `shares_by_the_spec.py`
and `vector_by_the_spec.py`. The section numbers are the SPEC's. Nothing here is fast or constant time; it is for tests.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

Entropy = Callable[[int], bytes]
Fields = list[Any]
Parameters = Mapping[str, Any]


class Refused(Exception):
    """What arrived is not what the SPEC says."""


# --- 1 notation -------------------------------------------------------------------------------------------------------


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def lp(*fields: bytes) -> bytes:
    return b"".join(u32(len(field)) + field for field in fields)


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def hashed(label: str, *fields: bytes) -> bytes:
    """H of section 1."""
    return sha256(lp(label.encode(), *fields))


def derived(secret: bytes, label: str, *names: str, session: bytes, length: int) -> bytes:
    """K of section 1."""
    info = lp(label.encode(), *(name.encode() for name in names))
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=session, info=info).derive(secret)


def packed(fields: Fields | Mapping[str, Any]) -> bytes:
    """A body (list) or a document (dict) in MessagePack, shortest integers."""
    return msgspec.msgpack.encode(fields)


# --- 2 envelopes ------------------------------------------------------------------------------------------------------

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
NO_SESSION = bytes(32)


@dataclass(frozen=True)
class Signer:
    """A name, its key, and its certificate in DER."""

    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: bytes

    @property
    def fingerprint(self) -> bytes:
        return sha256(self.certificate)


@dataclass(frozen=True)
class Context:
    """What a signature is bound to beside the body."""

    sender: str
    recipient: str
    fleet: str
    round: int
    attempt: int
    session: bytes = NO_SESSION


def signed_bytes(name: str, context: Context, fingerprint: bytes, body: bytes) -> bytes:
    parties = (name.encode(), context.sender.encode(), context.recipient.encode(), context.fleet.encode())
    numbers = (u64(context.round), u32(context.attempt))
    return b"sottovoce/1/" + lp(*parties, *numbers, context.session, fingerprint, sha256(body))


def sign(key: ec.EllipticCurvePrivateKey, content: bytes, *, high_s: bool = False) -> bytes:
    """Raw r || s with low s, deterministic (RFC 6979) so that vectors can be made again."""
    r, s = decode_dss_signature(key.sign(content, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    s = max(s, ORDER - s) if high_s else min(s, ORDER - s)
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def envelope(name: str, fields: Fields, signer: Signer, context: Context) -> bytes:
    body = packed(fields)
    signature = sign(signer.key, signed_bytes(name, context, signer.fingerprint, body))
    return seal_with(name, body, signer, context, signature)


def seal_with(name: str, body: bytes, signer: Signer, context: Context, signature: bytes) -> bytes:
    parties = [context.sender, context.recipient, context.fleet, context.round, context.attempt, context.session]
    return packed([1, name, *parties, signer.fingerprint, body, signature])


@dataclass(frozen=True)
class Opened:
    name: str
    context: Context
    fields: Fields


def open_envelope(payload: bytes, certificate: bytes) -> Opened:
    """Verify an envelope against a certificate that is itself verified already."""
    version, name, *parties, fingerprint, body, signature = msgspec.msgpack.decode(payload)
    context = Context(*parties)
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if version != 1 or fingerprint != sha256(certificate) or len(signature) != 64 or s > ORDER // 2:
        raise Refused("not an envelope of this certificate's holder")
    key = x509.load_der_x509_certificate(certificate).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    try:
        content = signed_bytes(name, context, fingerprint, body)
        key.verify(encode_dss_signature(r, s), content, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise Refused("a wrong signature") from error
    return Opened(name, context, msgspec.msgpack.decode(body))


def holder(certificate: bytes, authority: bytes, *, role: str) -> str:
    """The name in a certificate, once its issuer and role are verified. (Validity and revocation are left out here.)"""
    parsed = x509.load_der_x509_certificate(certificate)
    parsed.verify_directly_issued_by(x509.load_der_x509_certificate(authority))

    def attribute(oid: x509.ObjectIdentifier) -> str:
        return str(parsed.subject.get_attributes_for_oid(oid)[0].value)

    if attribute(NameOID.ORGANIZATIONAL_UNIT_NAME) != role:
        raise Refused(f"not a {role}")
    return attribute(NameOID.COMMON_NAME)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


# --- 3 parameters and graph -------------------------------------------------------------------------------------------


def corrupt(members: int, parameters: Parameters) -> int:
    return max(1, -(-members * int(parameters["corrupt_share_bp"]) // 10_000))


def threshold(members: int, parameters: Parameters) -> int:
    c = corrupt(members, parameters)
    return (members + c) // 2 + 1 if parameters["mode"] == "active" else max(2, c + 1, -(-members // 2))


def members_needed(members: int, parameters: Parameters) -> int:
    """How many must stay until the unmasking stage."""
    one_more = int(parameters["mode"] == "active")
    return max(threshold(members, parameters) + one_more, int(parameters["minimum_survivors"]), 3)


def ring(root: bytes, members: int) -> list[int]:
    """Roster positions in their order on the ring."""
    seed = hashed("sv1/graph", root)
    numbers = words(stream("chacha20", seed, 8 * members), 8)
    return sorted(range(members), key=lambda position: (numbers[position], position))


def neighbours(root: bytes, *, n: int, k: int, position: int) -> list[int]:
    if k == n - 1:
        return [other for other in range(n) if other != position]
    order = ring(root, n)
    place = order.index(position)
    return sorted(order[(place + step) % n] for step in range(-(k // 2), k // 2 + 1) if step)


def points(root: bytes, *, n: int, k: int) -> list[int]:
    """Evaluation point of every roster position."""
    if k == n - 1:
        return [position + 1 for position in range(n)]
    order = ring(root, n)
    return [order.index(position) + 1 for position in range(n)]


# --- 4 the stages -----------------------------------------------------------------------------------------------------


def leaf(device: str, fingerprint: bytes, channel_key: bytes, mask_key: bytes, nonce: bytes) -> bytes:
    return hashed("sv1/leaf", device.encode(), fingerprint, channel_key, mask_key, nonce)


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    level = list(leaves)
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        level = [hashed("sv1/merkle", level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)] + odd
    return level[0]


@dataclass(frozen=True)
class Agreement:
    """What both sides know before the roster."""

    fleet: str
    coordinator: str
    round: int
    attempt: int
    plan: bytes
    state: bytes
    parameters: Parameters
    upload_key: bytes

    def context(self, sender: str, *, session: bytes = NO_SESSION) -> Context:
        return Context(sender, self.coordinator, self.fleet, self.round, self.attempt, session)

    @property
    def parameters_digest(self) -> bytes:
        return sha256(packed(self.parameters))


def session_id(agreement: Agreement, *, n: int, k: int, t: int, root: bytes) -> bytes:
    mode = {"active": 1, "curious": 2}[agreement.parameters["mode"]]
    return hashed(
        "sv1/session",
        u32(1) + bytes([mode]),
        agreement.fleet.encode(),
        agreement.coordinator.encode(),
        u64(agreement.round) + u32(agreement.attempt),
        agreement.plan,
        agreement.state,
        agreement.parameters_digest,
        agreement.upload_key,
        u32(n, k, t),
        root,
    )


def public_key(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def is_low_order(public: bytes) -> bool:
    """Whether everybody has the same secret with the holder of this key: all zeros."""
    try:
        agreed(bytes(range(32)), public)
    except ValueError:
        return True
    return False


def agreed(secret: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))


def share_channel_key(secret: bytes, sender: str, recipient: str, *, session: bytes) -> bytes:
    return derived(secret, "sv1/share-channel", sender, recipient, "chacha20-poly1305", session=session, length=32)


def inclusion_token(secret: bytes, sender: str, recipient: str, *, session: bytes) -> bytes:
    """By this `sender` tells `recipient` that it masked with it."""
    return derived(secret, "sv1/inclusion", sender, recipient, session=session, length=16)


TAGGING: dict[str, tuple[str, type[AESGCM | ChaCha20Poly1305]]] = {
    "aes-128-ctr": ("aes-256-gcm", AESGCM),
    "chacha20": ("chacha20-poly1305", ChaCha20Poly1305),
}


def upload_key(secret: bytes, device: str, cipher: str, *, session: bytes) -> bytes:
    """What tags the chunks of the masked vector of `device`."""
    return derived(secret, "sv1/upload", device, TAGGING[cipher][0], session=session, length=32)


def encrypt(key: bytes, shares: bytes, *, session: bytes) -> bytes:
    return ChaCha20Poly1305(key).encrypt(bytes(12), shares, session)


def decrypt(key: bytes, ciphertext: bytes, *, session: bytes) -> bytes:
    return ChaCha20Poly1305(key).decrypt(bytes(12), ciphertext, session)


CIPHERTEXT_BYTES, SHARE_BYTES = 88, 36


def pieces(joined: bytes, length: int) -> list[bytes]:
    """What lies one after another in one field."""
    if len(joined) % length:
        raise Refused("not whole pieces")
    return [joined[at : at + length] for at in range(0, len(joined), length)]


def commitment(session: bytes, position: int, seed: bytes) -> bytes:
    return hashed("sv1/b", session, u32(position), seed)


def survivors_digest(session: bytes, survivors: Sequence[int]) -> bytes:
    return hashed("sv1/survivors", session, u32(*survivors))


KEY_BYTES = {"aes-128-ctr": 16, "chacha20": 32}


def self_mask_key(seed: bytes, device: str, cipher: str, *, session: bytes) -> bytes:
    return derived(seed, "sv1/self-mask", device, cipher, session=session, length=KEY_BYTES[cipher])


def pairwise_mask_key(secret: bytes, lower: str, upper: str, cipher: str, *, session: bytes) -> bytes:
    return derived(secret, "sv1/pairwise-mask", lower, upper, cipher, session=session, length=KEY_BYTES[cipher])


def stream(cipher: str, key: bytes, length: int) -> bytes:
    if cipher == "chacha20":
        return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(length))
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(length))


def words(content: bytes, width: int) -> list[int]:
    return [int.from_bytes(content[at : at + width], "little") for at in range(0, len(content), width)]


def chunk_payload(session: bytes, index: int, content: bytes) -> bytes:
    """What carries one chunk of a masked vector."""
    return session + u64(index) + content


def tagged(vector: bytes, chunk_bytes: int, key: bytes, cipher: str) -> dict[str, Any]:
    """The document that announces a masked vector: its size, and the tags of its chunks."""
    chunks = [vector[at : at + chunk_bytes] for at in range(0, len(vector), chunk_bytes)]
    aead = TAGGING[cipher][1](key)
    tags = [aead.encrypt(u32(index, 0, 0), b"", chunk) for index, chunk in enumerate(chunks)]
    return {"size": len(vector), "chunk_bytes": chunk_bytes, "tags": b"".join(tags)}
