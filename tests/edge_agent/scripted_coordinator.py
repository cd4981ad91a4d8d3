"""A coordinator that does what the test tells it to.

It is a script around the real `ServerSession`, the real codec and the real chunks; it makes no decision of its own, so
a test can stop, repeat or falsify anything.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sottovoce.blobs import BlobRef, blob_ref, canonical, digest_of
from sottovoce.identity import Certificate, Identity, SignedContext, TrustAnchor
from sottovoce.plan import Plan
from sottovoce.secagg.encoding import Aggregate, decode
from sottovoce.secagg.lanes import layout_of
from sottovoce.secagg.server import STAGE_NAMES, Reply, ServerSession
from sottovoce.secagg.uploads import ExpectedVector
from sottovoce.transport.base import Delivery
from sottovoce.transport.memory import MemoryTransport
from sottovoce.wire.chunks import Assembly, Reassembler, decode_vector_chunk, fragments
from sottovoce.wire.codec import ALL, Opened, open_envelope, parse, parse_body, seal
from sottovoce.wire.messages import (
    Announcement,
    CheckIn,
    MaskedInput,
    Message,
    Outcome,
    Ready,
    SecAggParameters,
    Selected,
    Status,
    UploadSlot,
    Withdraw,
)
from sottovoce.wire.topics import Topics

ROUTE = "r7"


@dataclass
class Coordinator:
    """The scripted coordinator.

    Attributes:
        heard: Every verified message of every device, in order.
        uploads: Accept chunks of masked vectors; off, slots are granted and nothing is taken.
    """

    identity: Identity
    anchor: TrustAnchor
    transport: MemoryTransport
    clock: Callable[[], int]
    bundle_bytes: bytes
    state_bytes: bytes
    plan: Plan
    at: datetime.datetime
    heard: dict[str, list[Message]] = field(default_factory=dict)
    statuses: dict[str, bool] = field(default_factory=dict)
    announcement: Opened[Message] | None = None
    session: ServerSession | None = None
    uploads: bool = True
    chunk_bytes: int = 4096
    round: int = 1
    attempt: int = 0
    assemblies: dict[str, Assembly[ExpectedVector]] = field(default_factory=dict)
    certificates: dict[bytes, Certificate] = field(default_factory=dict)
    reassemblers: dict[str, Reassembler] = field(default_factory=dict)
    chunks_taken: int = 0
    selected: set[str] = field(default_factory=set)
    announced: bytes = bytes(32)

    @property
    def name(self) -> str:
        return self.identity.certificate.name

    @property
    def topics(self) -> Topics:
        return Topics(self.identity.certificate.fleet)

    def start(self) -> None:
        for topic in (*self.topics.up_filters(), self.topics.status_filter()):
            self.transport.subscribe(topic)

    def ref(self, content: bytes) -> BlobRef:
        return blob_ref(content, chunk_bytes=self.chunk_bytes)

    def publish_blob(self, content: bytes) -> BlobRef:
        ref = self.ref(content)
        for index in range(ref.chunk_count):
            self.transport.publish(
                self.topics.blob_chunk(ref.digest, index), content[ref.chunk_slice(index)], retain=True
            )
        return ref

    def seal(self, message: Message, recipient: str, *, session: bytes = bytes(32)) -> bytes:
        fleet = self.identity.certificate.fleet
        context = SignedContext(self.name, recipient, fleet, self.round, self.attempt, session)
        return seal(message, self.identity, context)

    def announcement_message(self, *, training_ms: int = 60_000) -> Announcement:
        now = self.clock()
        return Announcement(
            certificate=self.identity.certificate.der,
            previous=self.announced,
            plan=self.ref(canonical(self.plan)),
            state=self.ref(self.state_bytes),
            now_ms=now,
            selection_closes_ms=now + 10_000,
            rendezvous_ms=now + training_ms,
            rendezvous_closes_ms=now + training_ms + 60_000,
        )

    def announce(self, round_: int = 1, attempt: int = 0, *, training_ms: int = 60_000, blobs: bool = True) -> bytes:
        """Announce a round; return the envelope."""
        self.round, self.attempt, self.session = round_, attempt, None
        self.assemblies.clear()
        self.selected.clear()
        for content in (canonical(self.plan), self.bundle_bytes, self.state_bytes) if blobs else ():
            self.publish_blob(content)
        envelope = self.seal(self.announcement_message(training_ms=training_ms), ALL)
        self.transport.publish(self.topics.round(), envelope, retain=True)
        self.announced = digest_of(envelope)
        return envelope

    def outcome(self, *, committed: bool, survivors: Iterable[str] = (), state: bytes = b"", reason: str = "") -> bytes:
        """Publish how the round ended; return the envelope."""
        ref = self.publish_blob(state or self.state_bytes)
        message = Outcome(
            certificate=self.identity.certificate.der,
            announcement=self.announced,
            committed=committed,
            reason=reason,
            survivors=tuple(sorted(survivors)),
            state=ref,
            now_ms=self.clock(),
        )
        envelope = self.seal(message, ALL)
        self.transport.publish(self.topics.outcome(), envelope, retain=True)
        return envelope

    def send(self, device: str, message: Message, *, session: bytes = bytes(32)) -> None:
        envelope = self.seal(message, device, session=session)
        for payload in fragments(envelope, chunk_bytes=self.transport.max_payload_bytes):
            self.transport.publish(self.topics.down(device), payload)

    def select(self, devices: Iterable[str]) -> None:
        for device in devices:
            self.selected.add(device)
            self.send(device, Selected(route=ROUTE, now_ms=self.clock()))

    def parameters(self, **changes: Any) -> SecAggParameters:
        maximum = changes.pop("maximum_clients", 10)
        layout = layout_of(self.plan, maximum_clients=maximum)
        chosen: dict[str, Any] = {
            "mode": "active",
            "cipher": "aes-128-ctr",
            "minimum_survivors": 3,
            "maximum_clients": maximum,
            "corrupt_share_bp": 500,
            "dropout_share_bp": 500,
            "vector_bytes": layout.vector_bytes,
            "wide_bytes": layout.wide_bytes,
            "packed": layout.packed,
        }
        return SecAggParameters(**{**chosen, **changes})

    def open_rendezvous(self, devices: Iterable[str], **changes: Any) -> None:
        context = SignedContext(self.name, ALL, self.identity.certificate.fleet, self.round, self.attempt)
        self.session = ServerSession(
            context=context,
            plan=self.plan.digest,
            state=digest_of(self.state_bytes),
            parameters=self.parameters(**changes),
            expected=devices,
            entropy=os.urandom,
        )
        self.deliver(self.session.outstanding())

    def close_stage(self) -> None:
        assert self.session is not None
        self.deliver(self.session.close_stage())

    def deliver(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            self.send(reply.device, reply.message, session=reply.session)

    @property
    def stage(self) -> str:
        return STAGE_NAMES.get(type(self.session.stage), "over") if self.session else "none"

    def aggregate(self) -> Aggregate:
        assert self.session is not None
        layout = layout_of(self.plan, maximum_clients=10)
        return decode(layout, self.session.result, survivors=len(self.session.survivors))

    def last(self, device: str) -> Message:
        return self.heard[device][-1]

    def said(self, device: str, kind: type[Message]) -> list[Any]:
        """All messages of one kind from a device."""
        return [message for message in self.heard.get(device, []) if isinstance(message, kind)]

    def turn(self) -> bool:
        """Take one delivery; return False if there was none."""
        event = self.transport.receive(0)
        if isinstance(event, Delivery) and event.payload:
            self._take(event.topic, event.payload)
        return event is not None

    def _take(self, topic: str, payload: bytes) -> None:
        levels = self.topics.split(topic)
        if levels[-1] == "c":
            self._take_chunk(levels[1], payload)
            return
        whole = self.reassemblers.setdefault(levels[1], Reassembler()).add(payload)
        if whole is None:
            return
        envelope = parse(whole)
        if envelope.name == CheckIn.__name__:
            certificate = self.anchor.verify(parse_body(envelope, CheckIn).certificate, at=self.at, role="device")
            self.certificates[certificate.fingerprint] = certificate
        known = self.certificates.get(envelope.fingerprint)
        if known is None:
            return
        opened = open_envelope(envelope, known, whole)
        message = opened.message
        if isinstance(message, Status):
            self.statuses[levels[1]] = message.online
            return
        assert opened.context.sender == levels[1], "the topic is the sender's own"
        self.heard.setdefault(levels[1], []).append(message)
        if isinstance(message, CheckIn) and levels[1] in self.selected:
            self.select([levels[1]])
        if isinstance(message, CheckIn | Ready | Withdraw) or self.session is None:
            return
        self.session.receive(opened)
        if isinstance(message, MaskedInput):
            expected = self.session.expected_vector(levels[1])
            if expected is not None:
                self.assemblies.setdefault(levels[1], Assembly(expected))
            self._answer_upload(levels[1], self.assemblies[levels[1]])

    def _take_chunk(self, device: str, payload: bytes) -> None:
        chunk = decode_vector_chunk(payload)
        assembly = self.assemblies.get(device)
        if self.session is None or assembly is None or not self.uploads:
            return
        assert chunk.session == self.session.session_id
        self.chunks_taken += 1
        if assembly.add(chunk.index, chunk.content) and self.session.expected_vector(device) is not None:
            self.session.add_vector(device, assembly)
        self._answer_upload(device, assembly)

    def _answer_upload(self, device: str, assembly: Assembly[ExpectedVector]) -> None:
        assert self.session is not None
        slot = UploadSlot(received=assembly.bitmap(), complete=assembly.complete)
        self.send(device, slot, session=self.session.session_id)
