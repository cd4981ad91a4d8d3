"""A fleet and a coordinator for the vectors: fixed keys and certificates, whole sessions played by `SpecDevice`s."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import by_the_spec as spec
import msgspec
import shares_by_the_spec as share_spec
import vector_by_the_spec as vector_spec
from by_the_spec import Agreement, Fields, Signer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.x509.oid import NameOID
from spec_device import SpecDevice

FLEET, COORDINATOR = "choir", "conductor"
AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
_BEFORE, _AFTER = AT - datetime.timedelta(days=9), datetime.datetime(2046, 1, 1, tzinfo=datetime.UTC)


class FixedEntropy:
    """ChaCha20 under a named seed; remembers what it gave, which the vectors list."""

    def __init__(self, name: str) -> None:
        key = spec.sha256(name.encode())
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        self.given = b""

    def __call__(self, count: int) -> bytes:
        drawn = self._stream.update(bytes(count))
        self.given += drawn
        return drawn


def key_of(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(spec.sha256(b"key of " + name.encode()), "big") >> 1, ec.SECP256R1())


def subject(name: str, role: str, fleet: str = FLEET) -> x509.Name:
    parts = ((NameOID.COMMON_NAME, name), (NameOID.ORGANIZATION_NAME, fleet), (NameOID.ORGANIZATIONAL_UNIT_NAME, role))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


def certificate(
    holder: x509.Name, key: ec.EllipticCurvePrivateKey, *, issuer: x509.Name, by: ec.EllipticCurvePrivateKey,
    after: datetime.datetime = _AFTER, authority: bool = False,
) -> bytes:  # fmt: skip
    """A certificate in DER, the same bytes every time."""
    serial = int.from_bytes(spec.sha256(holder.public_bytes())[:16], "big") >> 1
    builder = x509.CertificateBuilder().subject_name(holder).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(serial).not_valid_before(_BEFORE).not_valid_after(after)
    constraints = x509.BasicConstraints(ca=authority, path_length=0 if authority else None)
    builder = builder.add_extension(constraints, critical=True)
    return spec.der(builder.sign(by, hashes.SHA256(), ecdsa_deterministic=True))


AUTHORITY_KEY, AUTHORITY_NAME = key_of("authority"), subject("ca", "ca")
AUTHORITY = certificate(AUTHORITY_NAME, AUTHORITY_KEY, issuer=AUTHORITY_NAME, by=AUTHORITY_KEY, authority=True)


def signer(name: str, role: str = "device", **changes: Any) -> Signer:
    key = key_of(name)
    settings: dict[str, Any] = {"issuer": AUTHORITY_NAME, "by": AUTHORITY_KEY} | changes
    return Signer(name, key, certificate(subject(name, role), key, **settings))


CONDUCTOR = signer(COORDINATOR, "coordinator")
UPLOAD_SECRET = spec.sha256(b"upload key")
"""The coordinator's X25519 private key, in every session of the vectors: real ones have a fresh one each."""


def parameters(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "mode": "active",
        "cipher": "aes-128-ctr",
        "minimum_survivors": 3,
        "maximum_clients": 10,
        "corrupt_share_bp": 500,
        "dropout_share_bp": 500,
        "vector_bytes": 40,
        "wide_bytes": 24,
        "packed": [],
    }
    return settings | changes


def agreement(**changes: Any) -> Agreement:
    return Agreement(
        FLEET, COORDINATOR, 7, 1, b"p" * 32, b"s" * 32, parameters(**changes), spec.public_key(UPLOAD_SECRET)
    )


@dataclass
class Exchange:
    """One stage: what the coordinator sent to whom, and what came back, as signed envelopes by device."""

    stage: str
    requests: dict[str, bytes]
    answers: dict[str, bytes]


@dataclass
class Transcript:
    """A whole session.

    Attributes:
        devices: In roster order.
        abandoned: Stage and reason, or None.
        total: Of section 4, step 7: the unmasked sum, as it lies in memory.
    """

    name: str
    comment: str
    agreement: Agreement
    devices: list[SpecDevice]
    plain: dict[str, bytes]
    exchanges: list[Exchange] = field(default_factory=list)
    root: bytes = b""
    survivors: tuple[int, ...] = ()
    abandoned: tuple[str, str] | None = None
    total: bytes = b""

    def body(self, stage: str, device: str, *, answer: bool = False) -> Fields:
        exchange = next(one for one in self.exchanges if one.stage == stage)
        payload = (exchange.answers if answer else exchange.requests)[device]
        fields: Fields = msgspec.msgpack.decode(msgspec.msgpack.decode(payload)[9])
        return fields

    def shares_given(self, device: str) -> dict[int, bytes]:
        """The shares in the last answer of `device`, by the position of the member that each is of."""
        shared = [p for p, one in enumerate(self.devices) if one.signer.name in self.exchanges[1].answers]
        (joined,) = self.body("unmasking", device, answer=True)
        return dict(zip(shared, spec.pieces(joined, spec.SHARE_BYTES), strict=True))

    def device(self, name: str) -> SpecDevice:
        return next(device for device in self.devices if device.signer.name == name)

    def entropy(self, name: str) -> FixedEntropy:
        made = self.device(name).entropy
        assert isinstance(made, FixedEntropy)
        return made


def play(name: str, comment: str, *, count: int, drops: dict[str, str] | None = None, **changes: Any) -> Transcript:
    """Let `count` devices hold a session; `drops` names the stage in which a device goes silent."""
    agreed, gone = agreement(**changes), drops or {}
    transcript = Transcript(name, comment, agreed, [], {})
    for index in range(count):
        device = f"pi-{index + 1}"
        vector = _plain_vector(agreed, f"{name}/{device}")
        transcript.plain[device] = vector
        made = SpecDevice(
            signer(device), AUTHORITY, CONDUCTOR.certificate, agreed, vector, FixedEntropy(f"{name}/{device}"), 16
        )
        transcript.devices.append(made)
    _Conductor(transcript, gone).run()
    return transcript


def _plain_vector(agreed: Agreement, name: str) -> bytes:
    """Small entries, but for the first of each segment, which is as large as an entry can be: sums wrap around."""
    entropy, vector = FixedEntropy("vector " + name), b""
    for part in vector_spec.segments(agreed.parameters):
        entries = [2**part.width - 1] + [byte % 2**part.width for byte in entropy(part.count)[1:]]
        vector += b"".join(entry.to_bytes(part.word, "little") for entry in entries[: part.count])
    return vector


class _Conductor:
    """The coordinator's side by the SPEC, as far as vectors need it."""

    def __init__(self, transcript: Transcript, gone: dict[str, str]) -> None:
        self.transcript, self.gone = transcript, gone
        self.agreed = transcript.agreement
        self.t = self.n = 0

    def run(self) -> None:
        for step in (self.advertise, self.share_keys, self.mask, self.check, self.unmask):
            reason = step()
            if reason is not None:
                self.transcript.abandoned = self.transcript.exchanges[-1].stage, reason
                return

    def ask(self, stage: str, requests: dict[str, tuple[str, Fields]], session: bytes) -> dict[str, bytes]:
        devices = {device.signer.name: device for device in self.transcript.devices}
        sent: dict[str, bytes] = {}
        answers: dict[str, bytes] = {}
        for name, (kind, fields) in requests.items():
            agreed = self.agreed
            context = spec.Context(COORDINATOR, name, FLEET, agreed.round, agreed.attempt, session)
            sent[name] = spec.envelope(kind, fields, CONDUCTOR, context)
            if self.gone.get(name) != stage:
                device = devices[name]
                answers[name] = device.advertise() if kind == "AdvertiseKeysRequest" else device.receive(sent[name])
        self.transcript.exchanges.append(Exchange(stage, sent, answers))
        return answers

    def advertise(self) -> str | None:
        names = [device.signer.name for device in self.transcript.devices]
        request = ("AdvertiseKeysRequest", [dict(self.agreed.parameters), self.agreed.upload_key])
        answers = self.ask("advertise_keys", dict.fromkeys(names, request), spec.NO_SESSION)
        self.n = len(answers)
        if self.n < spec.members_needed(self.n, self.agreed.parameters):
            return "too_few_devices"
        members = [device for device in self.transcript.devices if device.signer.name in answers]
        self.members = sorted(members, key=self.leaf)
        self.transcript.devices = self.members
        self.t = spec.threshold(self.n, self.agreed.parameters)
        self.payloads = [answers[device.signer.name] for device in self.members]
        return None

    @staticmethod
    def leaf(device: SpecDevice) -> bytes:
        keys = spec.public_key(device.channel), spec.public_key(device.mask)
        return spec.leaf(device.signer.name, device.signer.fingerprint, *keys, device.nonce)

    def share_keys(self) -> str | None:
        leaves = [self.leaf(device) for device in self.members]
        root = self.transcript.root = spec.merkle_root(leaves)
        self.session = spec.session_id(self.agreed, n=self.n, k=self.n - 1, t=self.t, root=root)
        requests: dict[str, tuple[str, Fields]] = {}
        for position, device in enumerate(self.members):
            around = self.payloads[:position] + self.payloads[position + 1 :]
            requests[device.signer.name] = ("Roster", [b"".join(leaves), self.n - 1, self.t, around])
        answers = self.ask("share_keys", requests, spec.NO_SESSION)
        self.shared = [p for p, device in enumerate(self.members) if device.signer.name in answers]
        return None if len(self.shared) >= self._needed() else "too_few_devices"

    def mask(self) -> str | None:
        requests: dict[str, tuple[str, Fields]] = {}
        for position in self.shared:
            others = [other for other in self.shared if other != position]
            incoming = b"".join(self._ciphertext(other, position) for other in others)
            requests[self.members[position].signer.name] = ("MaskedInputRequest", [others, incoming])
        answers = self.ask("masked_input", requests, self.session)
        survivors = tuple(p for p in self.shared if self.members[p].signer.name in answers)
        self.transcript.survivors = survivors
        return None if len(survivors) >= self._needed() else "too_few_devices"

    def check(self) -> str | None:
        self.asked, self.signatures = list(self.transcript.survivors), dict[int, bytes]()
        if self.agreed.parameters["mode"] == "curious":
            return None
        names = [self.members[p].signer.name for p in self.asked]
        request = ("SurvivorsRequest", [list(self.transcript.survivors)])
        answers = self.ask("consistency_check", dict.fromkeys(names, request), self.session)
        self.asked = [p for p in self.asked if self.members[p].signer.name in answers]
        self.signatures = {p: answers[self.members[p].signer.name] for p in self.asked}
        return None if len(self.asked) > self.t else "too_few_signatures"

    def unmask(self) -> str | None:
        requests: dict[str, tuple[str, Fields]] = {}
        for position in self.asked:
            others = [self.signatures[other] for other in self.signatures if other != position][: self.t]
            fields = [list(self.transcript.survivors), others, self._tokens_for(position)]
            requests[self.members[position].signer.name] = ("UnmaskingRequest", fields)
        answers = self.ask("unmasking", requests, self.session)
        if len(answers) < self.t:
            return "too_few_shares"
        self._unmask()
        return None

    def _unmask(self) -> None:
        """Rebuild every secret from the first t answers and take the masks off."""
        agreed, transcript = self.agreed, self.transcript
        cipher, length = agreed.parameters["cipher"], vector_spec.memory_bytes(agreed.parameters)
        total = bytes(length)
        for position in transcript.survivors:
            masked = vector_spec.unpacked_vector(agreed.parameters, self.members[position].vector)
            total = vector_spec.combined(agreed.parameters, total, masked, 1)
        given = transcript.exchanges[-1].answers
        answering = [p for p in self.asked if self.members[p].signer.name in given][: self.t]
        answers = {p: transcript.shares_given(self.members[p].signer.name) for p in answering}
        for position in transcript.survivors:
            seed = share_spec.rebuild({p + 1: shares[position] for p, shares in answers.items()})
            key = spec.self_mask_key(seed, self.members[position].signer.name, cipher, session=self.session)
            total = vector_spec.combined(agreed.parameters, total, spec.stream(cipher, key, length), -1)
        for position in set(self.shared) - set(transcript.survivors):
            secret = share_spec.rebuild({p + 1: shares[position] for p, shares in answers.items()})
            for other in transcript.survivors:
                low, high = sorted((position, other))
                names = self.members[low].signer.name, self.members[high].signer.name
                shared = spec.agreed(secret, spec.public_key(self.members[other].mask))
                key = spec.pairwise_mask_key(shared, *names, cipher, session=self.session)
                sign = -1 if other == low else 1
                total = vector_spec.combined(agreed.parameters, total, spec.stream(cipher, key, length), sign)
        transcript.total = total

    def _tokens_for(self, recipient: int) -> bytes:
        if self.agreed.parameters["mode"] == "curious":
            return b""
        tokens = b""
        for sender in self.transcript.survivors:
            sent = self.transcript.body("masked_input", self.members[sender].signer.name, answer=True)[1]
            at = 16 * [p for p in self.shared if p != sender].index(recipient) if sender != recipient else len(sent)
            tokens += sent[at : at + 16]
        return tokens

    def _needed(self) -> int:
        return spec.members_needed(self.n, self.agreed.parameters)

    def _ciphertext(self, sender: int, recipient: int) -> bytes:
        body = self.transcript.body("share_keys", self.members[sender].signer.name, answer=True)
        return spec.pieces(body[1], spec.CIPHERTEXT_BYTES)[recipient - (recipient > sender)]


def positions(transcript: Transcript, names: Sequence[str]) -> list[int]:
    order = [device.signer.name for device in transcript.devices]
    return sorted(order.index(name) for name in names)
