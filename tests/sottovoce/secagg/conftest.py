"""A small fleet with a CA, and rehearsals: whole sessions of the real client and server, message by message."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.serialization import Encoding

from sottovoce.errors import SottovoceError, UnexpectedMessage
from sottovoce.identity import Identity, SignedContext, TrustAnchor, new_key, subject
from sottovoce.secagg.client import ClientSession, ClientTerms
from sottovoce.secagg.client_stages import Aborted, InputMasked
from sottovoce.secagg.graph import GraphRule
from sottovoce.secagg.keys import key_pair
from sottovoce.secagg.server import STAGE_NAMES, Reply, ServerSession
from sottovoce.secagg.transcript import survivors_digest
from sottovoce.wire.chunks import assemble
from sottovoce.wire.codec import Opened, open_envelope, parse, seal
from sottovoce.wire.messages import MaskedInputRequest, Message, SecAggParameters, SurvivorsSignature, Unmasking

FLEET, COORDINATOR, ROUND, ATTEMPT = "choir", "conductor", 7, 1
PLAN, STATE = b"p" * 32, b"s" * 32
AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
LARGEST = 100
UPLOAD_SEED = 999_999
SHARE_BYTES, CIPHERTEXT_BYTES = 36, 88
"""By the SPEC, written down a second time."""


class FixedEntropy:
    """Entropy for tests: a ChaCha20 stream under a fixed seed, so that a failing test fails again."""

    def __init__(self, seed: int) -> None:
        key = seed.to_bytes(32, "little")
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def __call__(self, count: int) -> bytes:
        return self._stream.update(bytes(count))


UPLOAD_KEY = key_pair(FixedEntropy(UPLOAD_SEED)(32)).public
"""The coordinator's, in every session of these tests but those that say otherwise."""


Kind = Literal["self_seed", "mask_key"]


@dataclass
class Rehearsal:
    """One server and its clients; the test decides what is delivered, how often and in which order.

    Attributes:
        server: Under test.
        clients: By device id.
        plain: Every device's plain vector, as it was before masking.
        requests: Everything the server has sent, per device, in order.
        answers: Everything the clients have answered, per device, in order.
        entrusted: What every device holds of whom, read from its memory when it has masked its vector.
    """

    fleet: Fleet
    server: ServerSession
    clients: dict[str, ClientSession]
    plain: dict[str, bytes]
    requests: dict[str, list[Reply]] = field(default_factory=dict)
    answers: dict[str, list[Message]] = field(default_factory=dict)
    entrusted: dict[str, dict[int, dict[Kind, bytes]]] = field(default_factory=dict)

    @property
    def devices(self) -> list[str]:
        return sorted(self.clients)

    def opened(self, device: str, message: Message, *, session: bytes | None = None) -> Opened[Any]:
        """What the server's codec makes of `message` from `device`."""
        known = self.clients[device].session_id if session is None else session
        return self.fleet.opened(device, message, session=known)

    def send(self, device: str, message: Message) -> list[Reply]:
        """Deliver a device's message to the server; a masked vector comes with its announcement."""
        return self.server.receive(self.opened(device, message))

    def upload(self, device: str) -> None:
        """Deliver the masked vector that a device has announced."""
        vector, expected = self.clients[device].masked_vector, self.server.expected_vector(device)
        assert vector is not None
        assert expected is not None
        self.server.add_vector(device, assemble(expected, vector))

    def advertise(self, devices: Iterable[str]) -> None:
        """Let `devices` advertise keys, through the real envelopes."""
        for device in devices:
            message = self.clients[device].advertise()
            self.answers.setdefault(device, []).append(message)
            self.server.receive(self.opened(device, message, session=bytes(32)))

    def close(self) -> dict[str, Message]:
        """Close the stage; return what the server asks of whom."""
        replies = self.server.close_stage()
        for reply in replies:
            self.requests.setdefault(reply.device, []).append(reply)
        return {reply.device: reply.message for reply in replies}

    def answer(self, device: str, request: Message, *, upload: bool = True) -> Message:
        """Let a device answer `request`, and the server take the answer."""
        reply = self.clients[device].receive(request)  # type: ignore[arg-type]
        self.answers.setdefault(device, []).append(reply)
        if isinstance(self.clients[device].stage, InputMasked):
            self.entrusted[device] = self.holdings(device)
        self.send(device, reply)
        if upload and self.server.expected_vector(device) is not None:
            self.upload(device)
        return reply

    def run_until(self, stage: type, *, silent: Mapping[str, Iterable[str]] | None = None) -> dict[str, Message]:
        """Go on until the server stands in `stage`, with `silent[stage name]` never answering; return its requests."""
        quiet = {name: set(devices) for name, devices in (silent or {}).items()}
        gone: set[str] = set()
        while type(self.server.stage) is not stage:
            gone |= quiet.get(self.stage_name, set())
            requests = {reply.device: reply.message for reply in self.server.outstanding() if reply.device not in gone}
            if self.stage_name == "advertise_keys":
                self.advertise(requests)
            else:
                for device, request in requests.items():
                    self.answer(device, request)
            self.close()
        return {reply.device: reply.message for reply in self.server.outstanding()}

    @property
    def stage_name(self) -> str:
        return STAGE_NAMES.get(type(self.server.stage), "")

    @property
    def cohort(self) -> Any:
        """The members, while the server stands between the roster and the sum."""
        stage: Any = self.server.stage
        return stage.cohort if hasattr(stage, "cohort") else stage.inputs.cohort

    def position(self, device: str) -> int:
        return int(self.cohort.position_of[device])

    def signed(self, device: str, survivors: Sequence[int], **changes: Any) -> bytes:
        """A corrupt member's signature on any set it is asked to sign."""
        session = self.server.session_id
        context = msgspec.structs.replace(self.fleet.context(device, session=session), **changes)
        message = SurvivorsSignature(survivors=survivors_digest(survivors, session=session))
        return seal(message, self.fleet.identities[device], context)

    def assert_refused(self, device: str, request: Any, error: type[SottovoceError], match: str | None = None) -> None:
        """The device refuses `request` by exactly this kind of error, and is then empty."""
        client = self.clients[device]
        with pytest.raises(error, match=match) as caught:
            client.receive(request)
        assert type(caught.value) is error
        assert isinstance(client.stage, Aborted)
        assert client.masked_vector is None
        with pytest.raises(UnexpectedMessage):
            client.receive(request)

    def plain_sum(self, devices: Iterable[str]) -> bytes:
        """The plain sum of the devices' vectors, word by word, each modulo 2 to its width, computed the slow way."""
        split = self.fleet.vector_bytes - self.fleet.wide_bytes
        narrow, wide = np.zeros(split // 4, object), np.zeros(self.fleet.wide_bytes // 8, object)
        for device in devices:
            narrow += np.frombuffer(self.plain[device], "<u4", count=split // 4).astype(object)
            wide += np.frombuffer(self.plain[device], "<u8", offset=split).astype(object)
        return (narrow % 2**32).astype("<u4").tobytes() + (wide % 2**64).astype("<u8").tobytes()

    def shares_given(self) -> list[tuple[str, Unmasking]]:
        """Every unmasking answer that left a device."""
        return [(d, m) for d, sent in self.answers.items() for m in sent if isinstance(m, Unmasking)]

    def holdings(self, device: str) -> dict[int, dict[Kind, bytes]]:
        """The shares that a device which has masked its vector holds, of whom and of which kind."""
        stage = self.clients[device].stage
        assert isinstance(stage, InputMasked)
        held: dict[int, dict[Kind, bytes]] = {
            owner: {"self_seed": content[:SHARE_BYTES], "mask_key": content[SHARE_BYTES:]}
            for owner, content in stage.held.items()
        }
        own: dict[int, dict[Kind, bytes]] = {stage.seat.position: {"self_seed": stage.own_share}}
        return dict(sorted((held | (own if stage.own_share else {})).items()))

    def kinds_given(self, device: str, given: Unmasking) -> dict[int, Kind]:
        """Of whom an answer gives a share and of which kind, found by comparing it with what the device holds."""
        held, shares = self.entrusted[device], self.cut(given.shares, SHARE_BYTES)
        assert len(shares) == len(held)
        kinds: dict[int, Kind] = {}
        for (owner, of_owner), share in zip(held.items(), shares, strict=True):
            (kinds[owner],) = (kind for kind, content in of_owner.items() if content == share)
        return kinds

    @staticmethod
    def cut(content: bytes, size: int) -> list[bytes]:
        """Pieces of `size` bytes, and all of them."""
        assert len(content) % size == 0
        return [content[at : at + size] for at in range(0, len(content), size)]

    def forwarded(self, request: MaskedInputRequest) -> list[tuple[int, bytes]]:
        """Whose ciphertext is which."""
        return [*zip(request.senders, self.cut(request.ciphertexts, CIPHERTEXT_BYTES), strict=True)]

    @staticmethod
    def forwarding(ciphertexts: Iterable[tuple[int, bytes]]) -> MaskedInputRequest:
        """The request that forwards these, right or wrong."""
        pairs = [*ciphertexts]
        return MaskedInputRequest(tuple(sender for sender, _ in pairs), b"".join(content for _, content in pairs))


@dataclass
class Fleet:
    """A CA, a coordinator and LARGEST devices, made once."""

    anchor: TrustAnchor
    coordinator: Identity
    identities: dict[str, Identity]
    issue: Callable[[str, str], Identity]
    vector_bytes: int = 72
    wide_bytes: int = 32

    def parameters(self, *, mode: str = "active", cipher: str = "aes-128-ctr", **changes: Any) -> SecAggParameters:
        settings: dict[str, Any] = {
            "minimum_survivors": 3,
            "maximum_clients": LARGEST,
            "corrupt_share_bp": 500,
            "dropout_share_bp": 500,
            "vector_bytes": self.vector_bytes,
            "wide_bytes": self.wide_bytes,
        }
        return SecAggParameters(mode=mode, cipher=cipher, **(settings | changes))  # type: ignore[arg-type]

    def context(self, device: str, *, session: bytes = bytes(32)) -> SignedContext:
        return SignedContext(device, COORDINATOR, FLEET, ROUND, ATTEMPT, session)

    def envelope(self, device: str, message: Message, *, session: bytes) -> bytes:
        return seal(message, self.identities[device], self.context(device, session=session))

    def opened(self, device: str, message: Message, *, session: bytes) -> Opened[Any]:
        payload = self.envelope(device, message, session=session)
        certificate = self.anchor.verify(self.identities[device].certificate.der, at=AT, role="device")
        return open_envelope(parse(payload), certificate, payload)

    def client(self, device: str, vector: bytearray, **changes: Any) -> ClientSession:
        settings: dict[str, Any] = {
            "identity": self.identities[device],
            "anchor": self.anchor,
            "at": AT,
            "context": self.context(device),
            "plan": PLAN,
            "state": STATE,
            "parameters": self.parameters(),
            "upload_key": UPLOAD_KEY,
            "terms": ClientTerms(minimum_cohort=3, minimum_honest_survivors=2, modes=("active", "curious")),
            "vector": vector,
            "entropy": FixedEntropy(1000 + sorted(self.identities).index(device)),
        }
        return ClientSession(**(settings | changes))

    def server(
        self, devices: Sequence[str], parameters: SecAggParameters, graph_rule: GraphRule | None = None
    ) -> ServerSession:
        context = SignedContext(COORDINATOR, "all", FLEET, ROUND, ATTEMPT)
        settings: dict[str, Any] = {"context": context, "plan": PLAN, "state": STATE, "parameters": parameters}
        return ServerSession(**settings, expected=devices, graph_rule=graph_rule, entropy=FixedEntropy(UPLOAD_SEED))

    def rehearse(
        self,
        count: int,
        *,
        seed: int = 0,
        parameters: SecAggParameters | None = None,
        graph_rule: GraphRule | None = None,
    ) -> Rehearsal:
        """A session of `count` devices with random vectors, lanes wrapping around on purpose."""
        chosen = parameters or self.parameters()
        devices = sorted(self.identities)[:count]
        vectors = {d: random.Random(seed * 100 + i).randbytes(self.vector_bytes) for i, d in enumerate(devices)}
        clients = {
            d: self.client(d, bytearray(vectors[d]), parameters=chosen, entropy=FixedEntropy(seed * 1000 + i))
            for i, d in enumerate(devices)
        }
        return Rehearsal(self, self.server(devices, chosen, graph_rule), clients, vectors)


def make_fleet() -> Fleet:
    authority_key = new_key()
    name = subject(name="ca", fleet=FLEET, role="ca")
    before, after = AT - datetime.timedelta(days=9), AT + datetime.timedelta(days=99)

    def certificate(holder: x509.Name, key: Any, *, authority: bool) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(holder).issuer_name(name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(before).not_valid_after(after)
        path_length = 0 if authority else None
        builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=path_length), critical=True)
        if authority:
            usage = dict.fromkeys(
                (
                    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
                    "key_agreement", "encipher_only", "decipher_only",
                ),
                False,
            )  # fmt: skip
            builder = builder.add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
        return builder.sign(authority_key, hashes.SHA256())

    anchor = TrustAnchor(certificate(name, authority_key.public_key(), authority=True))

    def issue(device: str, role: str) -> Identity:
        key = new_key()
        issued = certificate(subject(name=device, fleet=FLEET, role=role), key.public_key(), authority=False)
        return Identity(key, anchor.verify(issued.public_bytes(Encoding.DER), at=AT))

    identities = {f"pi-{number:03}": issue(f"pi-{number:03}", "device") for number in range(LARGEST)}
    return Fleet(anchor, issue(COORDINATOR, "coordinator"), identities, issue)


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    return make_fleet()


@pytest.fixture(scope="session")
def large_fleet(fleet: Fleet) -> Fleet:
    """Just more devices than a complete graph takes: they stand on a ring."""
    names = [f"pi-{number:03}" for number in range(201)]
    return replace(
        fleet, identities={name: fleet.identities.get(name) or fleet.issue(name, "device") for name in names}
    )


@pytest.fixture(scope="session")
def fixed_entropy() -> type[FixedEntropy]:
    return FixedEntropy
