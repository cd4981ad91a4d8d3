"""The only parser of untrusted bytes: bytes become a typed message, or MalformedMessage.

A payload is an Envelope in MessagePack; the same bytes travel over MQTT 5 and 3.1.1. The order is always: length,
structure, certificate, signature, body. Nothing unverified ever reaches a state machine.
"""

from __future__ import annotations

import hashlib
from typing import Generic, TypeVar, cast

import msgspec

from sottovoce.errors import LocalProtocolError, MalformedMessage, SottovoceError
from sottovoce.identity import NAME, SIGNATURE_BYTES, Certificate, Identity, SignedContext, signed_bytes
from sottovoce.wire.messages import COORDINATOR_MESSAGES, DEVICE_MESSAGES, Message

VERSION = 1
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Longest envelope, reassembled; the roster of the largest cohort fits."""
ALL = "all"

_BODIES: dict[str, type[Message]] = {kind.__name__: kind for kind in (*DEVICE_MESSAGES, *COORDINATOR_MESSAGES)}
M = TypeVar("M", bound=Message)


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message on its way, not yet verified.

    Attributes:
        version: VERSION.
        name: Name of the message type in `body`.
        sender, recipient, fleet, round, attempt, session: See SignedContext.
        fingerprint: SHA-256 of the sender's certificate.
        body: The MessagePack body, as signed.
        signature: Raw r||s, 64 bytes.
    """

    version: int
    name: str
    sender: str
    recipient: str
    fleet: str
    round: int
    attempt: int
    session: bytes
    fingerprint: bytes
    body: bytes
    signature: bytes

    @property
    def context(self) -> SignedContext:
        """What the signature is bound to."""
        return SignedContext(self.sender, self.recipient, self.fleet, self.round, self.attempt, self.session)


class Opened(msgspec.Struct, Generic[M], frozen=True):
    """A verified message.

    Attributes:
        message: What it says.
        certificate: Of its sender.
        context: What it is bound to.
        body_digest: SHA-256 of its body as it came, 32 bytes: the very same message again has the same.
        payload: The bytes it came in, for forwarding as evidence.
    """

    message: M
    certificate: Certificate
    context: SignedContext
    body_digest: bytes
    payload: bytes


_ENVELOPE = msgspec.msgpack.Decoder(Envelope)
_BODY_DECODERS = {name: msgspec.msgpack.Decoder(kind) for name, kind in _BODIES.items()}


def seal(message: Message, identity: Identity, context: SignedContext) -> bytes:
    """Return the signed envelope of `message`.

    Raises:
        LocalProtocolError: The context's sender is not this identity.
    """
    certificate = identity.certificate
    if (context.sender, context.fleet) != (certificate.name, certificate.fleet):
        raise LocalProtocolError(
            f"{certificate.name} of {certificate.fleet} cannot sign as {context.sender} of {context.fleet}"
        )
    body = msgspec.msgpack.encode(message)
    name = type(message).__name__
    content = signed_bytes(name, context, certificate.fingerprint, hashlib.sha256(body).digest())
    envelope = Envelope(
        version=VERSION,
        name=name,
        sender=context.sender,
        recipient=context.recipient,
        fleet=context.fleet,
        round=context.round,
        attempt=context.attempt,
        session=context.session,
        fingerprint=certificate.fingerprint,
        body=body,
        signature=identity.sign(content),
    )
    return msgspec.msgpack.encode(envelope)


def parse(payload: bytes | memoryview, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Envelope:
    """Return the envelope in `payload`, its fields checked but nothing verified.

    Raises:
        MalformedMessage: Too long, truncated, unknown version, name or field, a field out of range.
    """
    if len(payload) > max_bytes:
        raise MalformedMessage(f"{len(payload)} bytes are more than {max_bytes}")
    try:
        envelope = _ENVELOPE.decode(payload)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"not an envelope: {error}") from error
    names_fit = all(map(NAME.fullmatch, (envelope.sender, envelope.recipient, envelope.fleet)))
    numbers_fit = 0 <= envelope.round < 2**63 and 0 <= envelope.attempt < 2**31
    lengths_fit = (len(envelope.session), len(envelope.fingerprint), len(envelope.signature)) == (
        32,
        32,
        SIGNATURE_BYTES,
    )
    if envelope.version != VERSION or envelope.name not in _BODIES or not (names_fit and numbers_fit and lengths_fit):
        raise MalformedMessage("an envelope with an unknown version or name, or a field out of range")
    return envelope


def parse_body(envelope: Envelope, kind: type[M]) -> M:
    """Return the body of `envelope`, NOT verified: only to find the certificate that it carries itself.

    Raises:
        MalformedMessage: The body is not a `kind`.
    """
    if envelope.name != kind.__name__:
        raise MalformedMessage(f"a {envelope.name} where a {kind.__name__} is expected")
    try:
        return cast(M, _BODY_DECODERS[envelope.name].decode(envelope.body))
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, SottovoceError) as error:
        raise MalformedMessage(f"not a {envelope.name}: {error}") from error


def open_envelope(envelope: Envelope, certificate: Certificate, payload: bytes = b"") -> Opened[Message]:
    """Return the verified message in `envelope`.

    Args:
        envelope: As parsed.
        certificate: The sender's certificate, already verified against the fleet CA.
        payload: The bytes it came in, kept as evidence.

    Raises:
        BadSignature: The signature is not the certificate's.
        MalformedMessage: Sender, fleet or fingerprint are not the certificate's, the role may not send such a message,
            or the body does not parse.
    """
    context, body_digest, content = signed_content(envelope, certificate)
    certificate.verify(envelope.signature, content)
    return Opened(parse_body(envelope, _BODIES[envelope.name]), certificate, context, body_digest, payload)


def signed_content(envelope: Envelope, certificate: Certificate) -> tuple[SignedContext, bytes, bytes]:
    """Return what the signature of `envelope` must be bound to, the body's SHA-256, and what it must be over.

    The signature is NOT verified.

    For a body that had to be parsed first, to find the certificate that it carries itself.

    Args:
        envelope: As parsed.
        certificate: The sender's certificate, already verified against the fleet CA.

    Raises:
        MalformedMessage: Sender, fleet or fingerprint are not the certificate's, or the role may not send such a
            message.
    """
    if (envelope.sender, envelope.fleet, envelope.fingerprint) != (
        certificate.name,
        certificate.fleet,
        certificate.fingerprint,
    ):
        raise MalformedMessage(f"an envelope from {envelope.sender} does not fit the certificate of {certificate.name}")
    kind = _BODIES[envelope.name]
    if kind not in (DEVICE_MESSAGES if certificate.role == "device" else COORDINATOR_MESSAGES):
        raise MalformedMessage(f"a {certificate.role} may not send {envelope.name}")
    body_digest = hashlib.sha256(envelope.body).digest()
    context = envelope.context
    return context, body_digest, signed_bytes(envelope.name, context, envelope.fingerprint, body_digest)
