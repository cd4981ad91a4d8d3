"""The primitives of a session: X25519, HKDF with a label per purpose, and the encryption of shares.

Everything comes from `cryptography`; here it is only named, labelled and bound to the session and the two parties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from sottovoce.errors import BadShare, CryptoError, LowOrderPoint
from sottovoce.secagg import labels, shamir
from sottovoce.secagg.transcript import label_prefixed
from sottovoce.wire.messages import Cipher

SECRET_BYTES = 32
PUBLIC_KEY_BYTES = 32
NONCE_BYTES = 32
TAG_BYTES = 16
INCLUSION_BYTES = 16
"""Length of an inclusion token."""
CIPHERTEXT_BYTES = 2 * shamir.SHARE_BYTES + TAG_BYTES
"""Length of a ciphertext of two shares."""
_AEAD = "chacha20-poly1305"
MASK_KEY_BYTES: dict[Cipher, int] = {"aes-128-ctr": 16, "chacha20": 32}
"""Length of a mask stream's key, by cipher."""
_UPLOAD_AEADS: dict[Cipher, str] = {"aes-128-ctr": "aes-256-gcm", "chacha20": _AEAD}
_AEAD_KEY_BYTES = 32
_ONE_TIME_NONCE = bytes(12)
_SHA256 = SHA256()
_FIRST_BLOCK = b"\x01"
_FRAMED_LABELS = {label: label_prefixed(label) for label in labels.KEY_LABELS}
_REMEMBERED_NAMES = 1 << 14

PublicKey: TypeAlias = X25519PublicKey

_FIELD_PRIME = 2**255 - 19
_TOP_BIT = 2**255
_LOW_ORDER_U = (
    0,
    1,
    _FIELD_PRIME - 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
_LOW_ORDER_KEYS = frozenset(
    (u + shift + top).to_bytes(32, "little")
    for u in _LOW_ORDER_U
    for shift in (0, _FIELD_PRIME)
    for top in (0, _TOP_BIT)
    if u + shift < _TOP_BIT
)
"""Every encoding of them: reduced or not, with and without the top bit, which X25519 ignores."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A fresh X25519 key pair of one session.

    Attributes:
        public: Public key, 32 bytes.
        secret: Private key as it is shared, 32 bytes.
    """

    public: bytes
    secret: bytes = field(repr=False)
    _private: X25519PrivateKey = field(repr=False, compare=False)

    def agree(self, public_key: bytes) -> bytes:
        """Return the X25519 secret with the holder of `public_key`, 32 bytes.

        Raises:
            LowOrderPoint: The key gives an all-zero secret, or is no key at all.
        """
        return self.exchange(parsed(public_key))

    def exchange(self, peer: PublicKey) -> bytes:
        """Return the X25519 secret with the holder of `peer`, for a key that is used many times.

        Raises:
            LowOrderPoint: The key gives an all-zero secret.
        """
        try:
            return self._private.exchange(peer)
        except ValueError as error:
            raise LowOrderPoint("the peer's X25519 key gives an all-zero secret") from error


@dataclass(frozen=True, slots=True)
class Channel:
    """What all keys between two neighbours follow from: HKDF's extraction of their channel secret, made once."""

    _extraction: bytes = field(repr=False)


def key_pair(secret: bytes) -> KeyPair:
    """Return the X25519 key pair whose private key is `secret`, 32 bytes of entropy."""
    private = X25519PrivateKey.from_private_bytes(secret)
    return KeyPair(private.public_key().public_bytes_raw(), secret, private)


def parsed(public_key: bytes) -> PublicKey:
    """Return the X25519 public key that `public_key` encodes.

    Raises:
        LowOrderPoint: It is no key at all.
    """
    try:
        return X25519PublicKey.from_public_bytes(public_key)
    except ValueError as error:
        raise LowOrderPoint(f"an X25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}") from error


def channel(secret: bytes, *, session: bytes) -> Channel:
    """Return the channel of two neighbours; `secret` is what their channel keys agree on."""
    return Channel(_extracted(secret, session))


def refuse_low_order(public_key: bytes) -> None:
    """Refuse the points of small order on the curve and its twist, in every encoding.

    Raises:
        LowOrderPoint: It is one of them.
        CryptoError: It does not have 32 bytes.
    """
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise CryptoError(f"an X25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    if public_key in _LOW_ORDER_KEYS:
        raise LowOrderPoint("an X25519 public key of low order gives everybody the same secret")


def self_mask_key(self_seed: bytes, *, session: bytes, device: str, cipher: Cipher) -> bytes:
    """Return the key of the self mask's stream of `device`."""
    return _derive(self_seed, session, MASK_KEY_BYTES[cipher], labels.SELF_MASK, device, cipher)


def pairwise_mask_key(secret: bytes, *, session: bytes, lower: str, upper: str, cipher: Cipher) -> bytes:
    """Return the key of the pairwise mask's stream of two devices, the one with the lower roster position first."""
    return _derive(secret, session, MASK_KEY_BYTES[cipher], labels.PAIRWISE_MASK, lower, upper, cipher)


def share_channel_key(between: Channel, *, sender: str, recipient: str) -> bytes:
    """Return the key that encrypts the shares from `sender` to `recipient`; the other direction has another."""
    names = (sender, recipient, _AEAD)
    return _expanded(between._extraction, _AEAD_KEY_BYTES, labels.SHARE_CHANNEL, names)


def inclusion_token(between: Channel, *, sender: str, recipient: str) -> bytes:
    """Return the 16 bytes by which `sender` tells `recipient` "I masked with you"; nobody else can make them."""
    return _expanded(between._extraction, INCLUSION_BYTES, labels.INCLUSION, (sender, recipient))


def upload_key(secret: bytes, *, session: bytes, device: str, cipher: Cipher) -> bytes:
    """Return the key that tags the chunks of the one masked vector of `device`; the coordinator has it, too."""
    return _derive(secret, session, _AEAD_KEY_BYTES, labels.UPLOAD, device, _UPLOAD_AEADS[cipher])


def encrypt_shares(key: bytes, shares: bytes, *, session: bytes) -> bytes:
    """Return the ciphertext of `shares`. The key is used for this one message, so the nonce is constant."""
    return ChaCha20Poly1305(key).encrypt(_ONE_TIME_NONCE, shares, session)


def decrypt_shares(key: bytes, ciphertext: bytes, *, session: bytes) -> bytes:
    """Return the shares in `ciphertext`.

    Raises:
        BadShare: It was not encrypted under this key in this session.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_ONE_TIME_NONCE, ciphertext, session)
    except InvalidTag as error:
        raise BadShare("a neighbour's shares do not decrypt: swapped, redirected or changed on the way") from error


def _derive(secret: bytes, session: bytes, length: int, label: bytes, *names: str) -> bytes:
    """Return the one key that follows from `secret`: HKDF-SHA256 (RFC 5869)."""
    return _expanded(_extracted(secret, session), length, label, names)


def _extracted(secret: bytes, session: bytes) -> bytes:
    extraction = _keyed_by(session).copy()
    extraction.update(secret)
    return extraction.finalize()


def _expanded(extraction: bytes, length: int, label: bytes, names: Sequence[str]) -> bytes:
    """Return the expansion of `extraction` to at most 32 bytes, which is a single block."""
    expansion = HMAC(extraction, _SHA256)
    expansion.update(_FRAMED_LABELS[label] + b"".join(map(_framed, names)) + _FIRST_BLOCK)
    return expansion.finalize()[:length]


@lru_cache(maxsize=_REMEMBERED_NAMES)
def _framed(name: str) -> bytes:
    """Return `name` as it stands in what a key is bound to; a device's comes back in every key of its channel."""
    return label_prefixed(name.encode())


@lru_cache(maxsize=4)
def _keyed_by(session: bytes) -> HMAC:
    """Return the start of every extraction of one session, which holds nothing secret; never finished, only copied."""
    return HMAC(session, _SHA256)
