"""A minimal device, written from docs/SPEC.md alone: what an interoperable client in another language would be.

It takes the coordinator's signed envelopes and gives signed envelopes back. It verifies what the SPEC says a device
must verify; it has no owner's terms, no timeouts and no redelivery.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import by_the_spec as spec
import msgspec
import shares_by_the_spec as share_spec
import vector_by_the_spec as vector_spec
from by_the_spec import Agreement, Entropy, Fields, Refused, Signer


@dataclass(frozen=True)
class Neighbour:
    device: str
    certificate: bytes
    channel_key: bytes
    mask_key: bytes


@dataclass
class SpecDevice:
    """One device in one session.

    Attributes:
        signer: Its name, key and certificate.
        authority: The fleet CA's certificate, DER.
        coordinator: The coordinator's certificate, DER, verified by the caller.
        agreement: What the announcement and the request for keys said.
        vector: The plain vector of section 6; masked in stage 4.
        entropy: Source of every secret.
        chunk_bytes: Of the upload.
    """

    signer: Signer
    authority: bytes
    coordinator: bytes
    agreement: Agreement
    vector: bytes
    entropy: Entropy
    chunk_bytes: int = 256 * 1024
    session: bytes = spec.NO_SESSION
    position: int = -1
    t: int = 0
    neighbours: dict[int, Neighbour] = field(default_factory=dict)
    held: dict[int, bytes] = field(default_factory=dict)
    signed: bytes = b""

    def advertise(self) -> bytes:
        """Stage 1."""
        if spec.is_low_order(self.agreement.upload_key):
            raise Refused("a coordinator's key of low order")
        self.channel, self.mask, self.nonce = self.entropy(32), self.entropy(32), self.entropy(32)
        agreement = self.agreement
        digests = [agreement.plan, agreement.state, agreement.parameters_digest]
        keys = [spec.public_key(self.channel), spec.public_key(self.mask), self.nonce]
        return self._sealed("AdvertiseKeys", [self.signer.certificate, *digests, *keys])

    def receive(self, payload: bytes) -> bytes:
        """Answer one signed request of the coordinator."""
        opened = spec.open_envelope(payload, self.coordinator)
        expected = self.agreement.context(self.signer.name, session=self.session)
        swapped = (opened.context.recipient, opened.context.sender)
        rest = (opened.context.fleet, opened.context.round, opened.context.attempt, opened.context.session)
        if (*swapped, *rest) != (*_parties(expected), expected.fleet, expected.round, expected.attempt, self.session):
            raise Refused("a request of another session")
        answers: dict[str, tuple[str, Callable[..., Fields]]] = {
            "Roster": ("ShareKeys", self.share_keys),
            "MaskedInputRequest": ("MaskedInput", self.mask_input),
            "SurvivorsRequest": ("SurvivorsSignature", self.sign_survivors),
            "UnmaskingRequest": ("Unmasking", self.unmask),
        }
        name, answer = answers[opened.name]
        return self._sealed(name, answer(*opened.fields))

    def share_keys(self, joined: bytes, k: int, t: int, advertisements: Fields) -> Fields:
        """Stages 2 and 3."""
        leaves = [joined[at : at + 32] for at in range(0, len(joined), 32)]
        n, parameters = len(leaves), self.agreement.parameters
        complete = k == n - 1
        if leaves != sorted(set(leaves)) or (complete and t != spec.threshold(n, parameters)):
            raise Refused("not a roster")
        own = spec.leaf(
            self.signer.name,
            self.signer.fingerprint,
            spec.public_key(self.channel),
            spec.public_key(self.mask),
            self.nonce,
        )
        self.position, self.t, self.n = leaves.index(own), t, n
        root = spec.merkle_root(leaves)
        around = spec.neighbours(root, n=n, k=k, position=self.position)
        self.neighbours = {
            position: self._neighbour(payload, leaves[position])
            for position, payload in zip(around, advertisements, strict=True)
        }
        self.session = spec.session_id(self.agreement, n=n, k=k, t=t, root=root)
        self.seed = self.entropy(32)
        x = spec.points(root, n=n, k=k)
        holders = sorted([*around, self.position]) if complete else around
        rows = share_spec.split([self.seed, self.mask], points=[x[p] for p in holders], t=t, entropy=self.entropy)
        shares = dict(zip(holders, rows, strict=True))
        self.own_share = shares[self.position][0] if complete else b""
        ciphertexts = [
            spec.encrypt(self._share_key(position, outgoing=True), b"".join(shares[position]), session=self.session)
            for position in around
        ]
        return [spec.commitment(self.session, self.position, self.seed), b"".join(ciphertexts)]

    def mask_input(self, senders: list[int], ciphertexts: bytes) -> Fields:
        """Stage 4."""
        if senders != sorted({*senders} & self.neighbours.keys()):
            raise Refused("not rising positions of neighbours")
        if len(senders) + bool(self.own_share) < self.t:
            raise Refused("too few are left")
        incoming = spec.pieces(ciphertexts, spec.CIPHERTEXT_BYTES)
        if len(incoming) != len(senders):
            raise Refused("not one ciphertext of every sender")
        given = zip(senders, incoming, strict=True)
        held = {p: spec.decrypt(self._share_key(p), content, session=self.session) for p, content in given}
        if any(max(spec.words(shares, 2)) >= share_spec.PRIME for shares in held.values()):
            raise Refused("a share out of range")
        self.held = held
        parameters, cipher = self.agreement.parameters, self.agreement.parameters["cipher"]
        own_key = spec.self_mask_key(self.seed, self.signer.name, cipher, session=self.session)
        self._add(own_key, 1)
        for position in self.held:
            peer = self.neighbours[position]
            lower = self.position < position
            names = (self.signer.name, peer.device) if lower else (peer.device, self.signer.name)
            secret = spec.agreed(self.mask, peer.mask_key)
            self._add(spec.pairwise_mask_key(secret, *names, cipher, session=self.session), 1 if lower else -1)
        self.vector = vector_spec.packed_vector(parameters, self.vector)
        active = parameters["mode"] == "active"
        tokens = [self._token(position, outgoing=True) for position in self.held] if active else []
        return [spec.tagged(self.vector, self.chunk_bytes, self.upload_key(), cipher), b"".join(tokens)]

    def upload(self) -> list[bytes]:
        """What carries the chunks of the masked vector."""
        chunks = [self.vector[at : at + self.chunk_bytes] for at in range(0, len(self.vector), self.chunk_bytes)]
        return [spec.chunk_payload(self.session, index, chunk) for index, chunk in enumerate(chunks)]

    def upload_key(self) -> bytes:
        secret = spec.agreed(self.channel, self.agreement.upload_key)
        cipher = self.agreement.parameters["cipher"]
        return spec.upload_key(secret, self.signer.name, cipher, session=self.session)

    def sign_survivors(self, survivors: list[int]) -> Fields:
        """Stage 5."""
        self._check(survivors)
        self.signed = spec.survivors_digest(self.session, survivors)
        return [self.signed]

    def unmask(self, survivors: list[int], signatures: list[bytes], inclusions: bytes) -> Fields:
        """Stage 6."""
        self._check(survivors)
        if self.agreement.parameters["mode"] == "active":
            self._check_signatures(survivors, signatures)
            if inclusions != b"".join(self._token(p, outgoing=False) for p in self.held if p in survivors):
                raise Refused("a neighbour has not masked with this device")
        elif signatures or inclusions:
            raise Refused("signatures in curious mode")
        given = {p: shares[:36] if p in survivors else shares[36:] for p, shares in self.held.items()}
        given[self.position] = self.own_share  # On a ring empty.
        return [b"".join(given[p] for p in sorted(given))]

    def _check(self, survivors: list[int]) -> None:
        rising = survivors == sorted(set(survivors)) and survivors[0] >= 0 and survivors[-1] < self.n
        shared = set(survivors).isdisjoint(self.neighbours.keys() - self.held.keys())
        around = len({*self.held, *([self.position] if self.own_share else [])}.intersection(survivors))
        enough = len(survivors) >= self.agreement.parameters["minimum_survivors"] and around >= self.t
        if self.position not in survivors or not rising or not shared or not enough:
            raise Refused("not a survivor set")

    def _check_signatures(self, survivors: list[int], signatures: list[bytes]) -> None:
        if spec.survivors_digest(self.session, survivors) != self.signed:
            raise Refused("another set than the one signed")
        certificates = {self.neighbours[p].device: self.neighbours[p].certificate for p in survivors if p in self.held}
        signers = set()
        for payload in signatures:
            sender = msgspec.msgpack.decode(payload)[2]
            opened = spec.open_envelope(payload, certificates[sender])
            context = self.agreement.context(sender, session=self.session)
            if (opened.name, opened.context, opened.fields) != ("SurvivorsSignature", context, [self.signed]):
                raise Refused("not a signature on this set")
            signers.add(sender)
        if len(signers) < self.t:
            raise Refused("too few signatures")

    def _neighbour(self, payload: bytes, leaf: bytes) -> Neighbour:
        fields = msgspec.msgpack.decode(msgspec.msgpack.decode(payload)[9])
        certificate = fields[0]
        device = spec.holder(certificate, self.authority, role="device")
        opened = spec.open_envelope(payload, certificate)
        agreement = self.agreement
        _, plan, state, parameters, channel_key, mask_key, nonce = opened.fields
        digests = (agreement.plan, agreement.state, agreement.parameters_digest)
        if opened.name != "AdvertiseKeys" or opened.context != agreement.context(device):
            raise Refused("an advertisement for another session")
        if (plan, state, parameters) != digests:
            raise Refused("an advertisement for another plan, state or parameters")
        if leaf != spec.leaf(device, spec.sha256(certificate), channel_key, mask_key, nonce):
            raise Refused("an advertisement that is not in the roster")
        return Neighbour(device, certificate, channel_key, mask_key)

    def _share_key(self, position: int, *, outgoing: bool = False) -> bytes:
        peer = self.neighbours[position]
        names = (self.signer.name, peer.device) if outgoing else (peer.device, self.signer.name)
        return spec.share_channel_key(spec.agreed(self.channel, peer.channel_key), *names, session=self.session)

    def _token(self, position: int, *, outgoing: bool) -> bytes:
        peer = self.neighbours[position]
        names = (self.signer.name, peer.device) if outgoing else (peer.device, self.signer.name)
        return spec.inclusion_token(spec.agreed(self.channel, peer.channel_key), *names, session=self.session)

    def _add(self, key: bytes, sign: int) -> None:
        parameters: Mapping[str, Any] = self.agreement.parameters
        mask = spec.stream(parameters["cipher"], key, vector_spec.memory_bytes(parameters))
        self.vector = vector_spec.combined(parameters, self.vector, mask, sign)

    def _sealed(self, name: str, fields: Fields) -> bytes:
        session = spec.NO_SESSION if name == "AdvertiseKeys" else self.session
        return spec.envelope(name, fields, self.signer, self.agreement.context(self.signer.name, session=session))


def _parties(context: spec.Context) -> tuple[str, str]:
    return context.sender, context.recipient
