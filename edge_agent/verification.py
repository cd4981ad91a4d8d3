"""From bytes off the broker to a verified message of a coordinator: nothing unverified gets past this module.

Announcements and outcomes carry the coordinator's certificate; it is believed because it chains to the pinned fleet CA.
Messages to this device alone name a coordinator that has announced something. Time is an argument.
"""

from __future__ import annotations

import datetime
from collections import OrderedDict

from sottovoce.errors import BadCertificate, MalformedMessage
from sottovoce.identity import Certificate, TrustAnchor
from sottovoce.wire.chunks import Reassembler
from sottovoce.wire.codec import ALL, Envelope, Opened, open_envelope, parse, parse_body
from sottovoce.wire.messages import Announcement, Message, Outcome, Selected
from sottovoce.wire.topics import Topics

_KNOWN_LIMIT = 8


class Verifier:
    """Opens what arrives for one device."""

    def __init__(self, anchor: TrustAnchor, *, device: str, fleet: str) -> None:
        """Believe coordinators of `fleet` under `anchor`, for the device of that id."""
        self._anchor = anchor
        self._device = device
        self._fleet = fleet
        topics = Topics(fleet)
        self._published: dict[str, type[Announcement] | type[Outcome]] = {
            topics.round(): Announcement,
            topics.outcome(): Outcome,
        }
        self._down = topics.down(device)
        self._reassembler = Reassembler()
        self._known: OrderedDict[bytes, Certificate] = OrderedDict()

    def open(self, topic: str, payload: bytes, *, at: datetime.datetime) -> Opened[Message] | None:
        """Return the verified message, or None while fragments of it are missing.

        Args:
            topic: Where it arrived.
            payload: Its bytes.
            at: The time to judge certificates by.

        Raises:
            MalformedMessage: Not a message, not for this device or fleet, or not of the kind that the topic carries.
            BadCertificate: Not from a coordinator of this fleet, or from one that has announced nothing.
            BadSignature: Not signed by the coordinator it names.
        """
        whole = self._reassembler.add(payload) if topic == self._down else payload
        if whole is None:
            return None
        envelope = parse(whole)
        kind = self._published.get(topic)
        recipient = self._device if kind is None else ALL
        if (topic != self._down and kind is None) or (envelope.fleet, envelope.recipient) != (self._fleet, recipient):
            raise MalformedMessage(f"a {envelope.name} that is not for this device on {topic}")
        if kind is None:
            return self._open_direct(envelope, whole, at)
        return self._open_published(envelope, whole, kind, at)

    def _open_direct(self, envelope: Envelope, payload: bytes, at: datetime.datetime) -> Opened[Message]:
        certificate = self._known.get(envelope.fingerprint)
        if certificate is None:
            raise BadCertificate(f"{envelope.sender} has announced nothing to this device")
        self._anchor.verify(certificate.der, at=at, role="coordinator")
        if envelope.name in (Announcement.__name__, Outcome.__name__):
            raise MalformedMessage(f"a {envelope.name} is published to everybody, never to one device")
        opened = open_envelope(envelope, certificate, payload)
        if isinstance(opened.message, Selected):
            self._anchor.verify(certificate.der, at=max(at, _moment(opened.message.now_ms)), role="coordinator")
        return opened

    def _open_published(
        self, envelope: Envelope, payload: bytes, kind: type[Announcement | Outcome], at: datetime.datetime
    ) -> Opened[Message]:
        body = parse_body(envelope, kind)
        if isinstance(body, Announcement):
            _check_appointments(body)
        # The certificate must be valid now and at the very time it signs for: nobody can push this device's idea of
        # the time beyond the end of the coordinator's certificate.
        certificate = self._anchor.verify(body.certificate, at=max(at, _moment(body.now_ms)), role="coordinator")
        opened = open_envelope(envelope, certificate, payload)
        self._known[certificate.fingerprint] = certificate
        self._known.move_to_end(certificate.fingerprint)
        while len(self._known) > _KNOWN_LIMIT:
            self._known.popitem(last=False)
        return opened


def _check_appointments(announcement: Announcement) -> None:
    """Raise MalformedMessage unless the appointments are times, in order: what is kept until then is computed with."""
    appointments = (
        announcement.now_ms,
        announcement.selection_closes_ms,
        announcement.rendezvous_ms,
        announcement.rendezvous_closes_ms,
    )
    times = [_moment(unix_ms) for unix_ms in appointments]
    if times != sorted(times):
        raise MalformedMessage(f"an announcement whose appointments are out of order: {appointments}")


def _moment(unix_ms: int) -> datetime.datetime:
    try:
        return datetime.datetime.fromtimestamp(unix_ms / 1000, datetime.UTC)
    except (OverflowError, OSError, ValueError) as error:
        raise MalformedMessage(f"{unix_ms} is not a time") from error
