"""From a delivery to something verified: the order is always length, structure, certificate, signature, addressee.

Nothing that comes out of here is unverified but two things that need no belief: a chunk of a masked vector (the round
holds it against the tags its device signed), and hints of devices that have never checked in, whose certificate is
not known yet: that they are connected, or that they will not take part. Hints only shorten or lengthen the waiting.
"""

from __future__ import annotations

import datetime
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeAlias

from coordinator.fleet import Fleet
from sottovoce.errors import MalformedMessage, RemoteProtocolError
from sottovoce.wire.chunks import Reassembler, VectorChunk, decode_vector_chunk
from sottovoce.wire.codec import ALL, Envelope, Opened, open_envelope, parse, parse_body
from sottovoce.wire.messages import CheckIn, Status, Withdraw
from sottovoce.wire.topics import Topics

_MAX_DEVICE_MESSAGE_BYTES = 1024 * 1024
_MAX_FIRST_MESSAGE_BYTES = 16 * 1024
"""Who is not known yet has nothing to say but CheckIn and Withdraw: a certificate and little else."""
_OPEN_SENDERS = 64
"""Devices whose fragments are being put together at the same time; most envelopes fit into one message."""


class WrongAddress(RemoteProtocolError):
    """A message that arrived on another device's topic, or is meant for somebody else."""

    reason = "wrong_address"


@dataclass(frozen=True, slots=True)
class StatusHint:
    """A device says that it is, or its last will that it is not, connected."""

    device: str
    online: bool


@dataclass(frozen=True, slots=True)
class DeviceChunk:
    """A chunk of a masked vector, not yet held against its tag."""

    device: str
    chunk: VectorChunk


Incoming: TypeAlias = "Opened[Any] | StatusHint | DeviceChunk"


class Admission:
    """Opens what devices send, in bounded memory.

    Args:
        topics: Of the fleet.
        coordinator: This coordinator's name; messages are addressed to it.
        fleet: The roster.
    """

    def __init__(self, topics: Topics, *, coordinator: str, fleet: Fleet) -> None:
        self._topics = topics
        self._coordinator = coordinator
        self._fleet = fleet
        self._known: OrderedDict[str, Reassembler] = OrderedDict()
        self._strangers: OrderedDict[str, Reassembler] = OrderedDict()

    def open(self, topic: str, payload: bytes, *, at: datetime.datetime) -> Incoming | None:
        """Return what a delivery says, or None for a fragment whose rest is missing and for a cleared topic.

        Args:
            topic: Where it arrived.
            payload: Its bytes, untrusted.
            at: Time to judge certificates by.

        Raises:
            RemoteProtocolError: Not a message, from nobody known, or not for us.
            CryptoError: A certificate or signature does not verify.
        """
        match self._topics.split(topic):
            case ("up", device, _, "c"):
                return DeviceChunk(device, decode_vector_chunk(payload))
            case ("up", device, _, "m"):
                whole = self._reassemble(device, payload)
                return None if whole is None else self._message(device, whole, at)
            case ("st", device):
                return self._status(device, payload, at) if payload else None
            case _:
                raise MalformedMessage(f"nothing is expected on topic {topic[:200]!r}")

    def _reassemble(self, device: str, payload: bytes) -> bytes | None:
        """Return the envelope that `payload` completes; strangers, who cost nothing to invent, crowd out no device."""
        known = self._fleet.knows(device)
        open_senders = self._known if known else self._strangers
        reassembler = open_senders.pop(device, None)
        if reassembler is None:
            longest = _MAX_DEVICE_MESSAGE_BYTES if known else _MAX_FIRST_MESSAGE_BYTES
            reassembler = Reassembler(max_bytes=longest, open_limit=1)
        whole = reassembler.add(payload)
        if reassembler.held_bytes:
            open_senders[device] = reassembler
            if len(open_senders) > _OPEN_SENDERS:
                open_senders.popitem(last=False)
        return whole

    def _message(self, device: str, payload: bytes, at: datetime.datetime) -> Opened[Any] | StatusHint:
        envelope = parse(payload, max_bytes=_MAX_DEVICE_MESSAGE_BYTES)
        self._check_address(envelope, device, recipient=self._coordinator)
        shown = _certificate_in(envelope)
        if shown is not None:
            certificate = self._fleet.verify(shown, at=at)
        elif envelope.name == Withdraw.__name__ and not self._fleet.knows(device):
            return StatusHint(device, online=False)
        else:
            certificate = self._fleet.certificate(device, fingerprint=envelope.fingerprint, at=at)
        opened = open_envelope(envelope, certificate, payload)
        self._fleet.admit(certificate)
        return opened

    def _status(self, device: str, payload: bytes, at: datetime.datetime) -> StatusHint:
        envelope = parse(payload, max_bytes=_MAX_DEVICE_MESSAGE_BYTES)
        self._check_address(envelope, device, recipient=ALL)
        if self._fleet.knows(device):
            certificate = self._fleet.certificate(device, fingerprint=envelope.fingerprint, at=at)
            return StatusHint(device, _online(open_envelope(envelope, certificate, payload).message))
        return StatusHint(device, parse_body(envelope, Status).online)

    def _check_address(self, envelope: Envelope, device: str, *, recipient: str) -> None:
        if envelope.sender != device or envelope.recipient != recipient:
            raise WrongAddress(f"a message of {envelope.sender} to {envelope.recipient} on the topic of {device}")


def _certificate_in(envelope: Envelope) -> bytes | None:
    """Return the certificate (DER) in a message that shows its sender's, else None."""
    match envelope.name:
        case CheckIn.__name__:
            return parse_body(envelope, CheckIn).certificate
        case Withdraw.__name__:
            return parse_body(envelope, Withdraw).certificate or None
        case _:
            return None


def _online(message: object) -> bool:
    if not isinstance(message, Status):
        raise MalformedMessage(f"a {type(message).__name__} on a status topic")
    return message.online
