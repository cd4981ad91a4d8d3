"""A fleet of scripted devices: real keys, real envelopes, real secure aggregation, and no loop of their own."""

from __future__ import annotations

import datetime
import hashlib
import json
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from coordinator.events import EventLog
from coordinator.journal import Journal
from coordinator.phases import Abandoned, Agenda, Committed, Effect, Send, Terms
from coordinator.presence import Presence
from coordinator.round import Round
from coordinator.sequence import Setup
from coordinator.service import Service
from coordinator.settings import UploadSettings
from coordinator.task import read_task
from sottovoce.authority import create_authority, revoke, sign_request
from sottovoce.blobs import blob_ref, digest_of
from sottovoce.bundle import FORMAT, Bundle, Port, Result, Role, SelfTest, encode_bundle
from sottovoce.errors import CryptoError, RemoteProtocolError
from sottovoce.identity import Identity, SignedContext, TrustAnchor, new_key, signing_request
from sottovoce.identity import Role as CertifiedRole
from sottovoce.language.ports import RoundRequest
from sottovoce.plan import Aggregation, Counted, LocalWork, Plan, PrivacyTerms, Quantised, decode_plan
from sottovoce.secagg.client import ClientSession, ClientTerms
from sottovoce.secagg.encoding import encode
from sottovoce.secagg.lanes import layout_of
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.transport.base import Delivery
from sottovoce.transport.blobs import BlobFetcher, Fetched, Subscribe, Unsubscribe
from sottovoce.transport.memory import MemoryBroker, MemoryTransport
from sottovoce.types import Array, TensorType
from sottovoce.wire.chunks import VectorChunk, encode_vector_chunk, missing_in_bitmap
from sottovoce.wire.codec import ALL, Opened, open_envelope, parse, seal
from sottovoce.wire.messages import (
    AdvertiseKeysRequest,
    Announcement,
    CheckIn,
    MaskedInputRequest,
    Message,
    NotSelected,
    Outcome,
    Ready,
    Roster,
    RoundOver,
    Selected,
    Status,
    SurvivorsRequest,
    UnmaskingRequest,
    UploadSlot,
)
from sottovoce.wire.topics import NO_ROUTE, Topics

FLEET, COORDINATOR = "choir", "coordinator"
AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
START_MS = round(AT.timestamp() * 1000)
ANNOUNCEMENT, STATE = b"a" * 32, b"s" * 32
LENIENT = ClientTerms(minimum_cohort=3, minimum_honest_survivors=2, modes=("active", "curious"))
ENTRIES = 50


class FixedEntropy:
    """Repeatable entropy: SHA-256 in counter mode under a name."""

    def __init__(self, name: str) -> None:
        self._name = name.encode()
        self._count = 0

    def __call__(self, count: int) -> bytes:
        blocks = -(-count // 32)
        start, self._count = self._count, self._count + blocks
        stream = (hashlib.sha256(self._name + at.to_bytes(8, "little")).digest() for at in range(start, start + blocks))
        return b"".join(stream)[:count]


@dataclass(frozen=True)
class Choir:
    """A CA, one coordinator, and as many devices as are asked for."""

    anchor: TrustAnchor
    authority_pem: bytes
    coordinator: Identity
    enrol: Callable[[str, CertifiedRole], Identity]
    devices: dict[str, Identity]
    revoke: Callable[[str], bytes]
    """Revokes a device in the CA's list, which `anchor` does not know, and returns that list, PEM."""

    def names(self, count: int) -> list[str]:
        """The ids of the first `count` devices, enrolled on first use."""
        names = [f"pi-{number:02}" for number in range(count)]
        for name in names:
            if name not in self.devices:
                self.devices[name] = self.enrol(name, "device")
        return names


@pytest.fixture(scope="session")
def choir(tmp_path_factory: pytest.TempPathFactory) -> Choir:
    """The fleet `choir`."""
    folder = tmp_path_factory.mktemp("ca")
    before = AT - datetime.timedelta(days=1)
    authority = create_authority(folder / "ca", fleet=FLEET, at=before)
    ca_certificate = x509.load_pem_x509_certificate(authority.certificate_file.read_bytes())
    anchor = TrustAnchor(ca_certificate)

    def enrol(name: str, role: CertifiedRole) -> Identity:
        key = new_key()
        request = signing_request(key, name=name, fleet=FLEET, role=role)
        pem = sign_request(authority, request, at=before, role=role).pem
        der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        return Identity(key, anchor.verify(der, at=AT, role=role))

    ca_pem = ca_certificate.public_bytes(Encoding.PEM)
    devices: dict[str, Identity] = {}

    def void(name: str) -> bytes:
        certificate = x509.load_der_x509_certificate(devices[name].certificate.der)
        revoke(authority, f"{certificate.serial_number:x}", at=before)
        return authority.revoked_file.read_bytes()

    return Choir(anchor, ca_pem, enrol(COORDINATOR, "coordinator"), enrol, devices, void)


def make_plan(*, minimum: int = 3, entries: int = ENTRIES) -> Plan:
    """A plan with an update, a whole-number sum and a cap of 10 on weights."""
    delta = Aggregation(
        name="delta",
        tensors=(f"float32[{entries}]",),
        encoding=Quantised(half_range=1.0, bits=16),
        weighted=True,
        clip_norm=100.0,
    )
    correct = Aggregation(name="correct", tensors=("float32[1]",), encoding=Counted(maximum=100))
    return Plan(
        fleet=FLEET,
        name="digits",
        collection="digits",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=(delta, correct),
        privacy=PrivacyTerms(purpose="to test", minimum_cohort=minimum, weight_cap=10),
    )


@dataclass
class ScriptedDevice:
    """One device: says what a good device says, unless the test tells it to be silent.

    Attributes:
        silent_at: It dies when it is sent a message of this type.
        present: What its Ready says.
        refused: Errors that its session raised.
        heard: Everything it was sent.
    """

    identity: Identity
    choir: Choir
    plan: Plan
    values: dict[str, list[Array]]
    weight: int = 10
    chunk_bytes: int = 64
    state: bytes = STATE
    silent_at: type[Message] | None = None
    present: bool = True
    heard: list[Message] = field(default_factory=list)
    handled: list[Message] = field(default_factory=list)
    said: list[tuple[Message, bytes]] = field(default_factory=list)
    session: ClientSession | None = None
    in_flight: list[int] = field(default_factory=list)
    dead: bool = False

    @property
    def name(self) -> str:
        return self.identity.certificate.name

    def check_in(self, announcement: bytes = ANNOUNCEMENT) -> CheckIn:
        return CheckIn(certificate=self.identity.certificate.der, announcement=announcement, fast_aes=True)

    def receive(self, message: Message, context: SignedContext) -> Iterable[tuple[Message | VectorChunk, bytes]]:
        """Yield the answers to `message`, each with the session it belongs to."""
        self.heard.append(message)
        if self.silent_at is not None and isinstance(message, self.silent_at):
            self.dead = True
        if self.dead or (message in self.handled and not isinstance(message, UploadSlot)):
            return  # A device answers a repeat only when its own timer says so: see `docs/SPEC.md`, redelivery.
        self.handled.append(message)
        match message:
            case Selected():
                yield Ready(present=self.present), bytes(32)
            case AdvertiseKeysRequest():
                yield self._open_session(message, context).advertise(), bytes(32)
            case Roster() | MaskedInputRequest() | SurvivorsRequest() | UnmaskingRequest():
                assert self.session is not None
                yield self.session.receive(message), self.session.session_id
            case UploadSlot(received=received, complete=False):
                assert self.session is not None
                vector = self.session.masked_vector
                assert vector is not None
                missing = missing_in_bitmap(received, -(-len(vector) // self.chunk_bytes))
                self.in_flight = [index for index in self.in_flight if index in missing] if any(received) else []
                fresh = [index for index in missing if index not in self.in_flight][: 2 - len(self.in_flight)]
                self.in_flight += fresh
                for index in fresh:
                    content = bytes(vector[index * self.chunk_bytes : (index + 1) * self.chunk_bytes])
                    yield VectorChunk(self.session.session_id, index, content), self.session.session_id
            case UploadSlot() | NotSelected() | RoundOver():
                return
            case _:
                raise AssertionError(f"a device does not understand {type(message).__name__}")

    def _open_session(self, request: AdvertiseKeysRequest, context: SignedContext) -> ClientSession:
        if self.session is None:
            layout = layout_of(self.plan, maximum_clients=request.parameters.maximum_clients)
            entropy = FixedEntropy(self.name)
            vector = encode(layout, self.values, weight=self.weight, entropy=entropy)
            self.session = ClientSession(
                identity=self.identity,
                anchor=self.choir.anchor,
                at=AT,
                context=msgspec.structs.replace(context, sender=self.name, recipient=COORDINATOR, session=bytes(32)),
                plan=self.plan.digest,
                state=self.state,
                parameters=request.parameters,
                upload_key=request.upload_key,
                terms=LENIENT,
                vector=vector,
                entropy=entropy,
                chunk_bytes=self.chunk_bytes,
            )
        return self.session


class Bench:
    """A `Round` and scripted devices, message by message, with a clock that only the test moves."""

    def __init__(
        self, choir: Choir, *, count: int, online: bool = True, plan: Plan | None = None, **terms: Any
    ) -> None:
        self.choir = choir
        self.plan = plan or make_plan()
        self.now_ms = START_MS
        names = choir.names(count)
        settled = {"goal": count, "minimum": 3, "wanted": count, **terms}
        self.terms = Terms(
            selection_closes_ms=START_MS + 60_000,
            rendezvous_ms=START_MS + 600_000,
            stage_ms=10_000,
            **settled,
        )
        self.agenda = Agenda(FLEET, COORDINATOR, 4, 1, ANNOUNCEMENT, self.plan, STATE)
        presence = Presence(online=names if online else (), offline=(), now_ms=START_MS, grace_ms=1000)
        self.round = Round(self.agenda, self.terms, presence=presence, entropy=FixedEntropy("round"), now_ms=START_MS)
        self.devices = {
            name: ScriptedDevice(choir.devices[name], choir, self.plan, values_of(number))
            for number, name in enumerate(names)
        }
        self.effects: list[Effect] = []
        self.refused: list[str] = []
        self.deferred: deque[tuple[str, Message | VectorChunk, bytes]] = deque()

    def opened(self, device: str, message: Message, *, session: bytes = bytes(32), **context: Any) -> Opened[Any]:
        """What the codec makes of `message` from `device`, through the real envelope."""
        identity = self.choir.devices[device]
        where = {"round": self.agenda.round, "attempt": self.agenda.attempt, **context}
        signed = SignedContext(device, COORDINATOR, FLEET, session=session, **where)
        payload = seal(message, identity, signed)
        return open_envelope(parse(payload), identity.certificate, payload)

    def say(self, device: str, message: Message | VectorChunk, session: bytes = bytes(32)) -> None:
        """Deliver one message of a device and everything that follows from it."""
        self.deferred.append((device, message, session))
        self.settle()

    def settle(self) -> None:
        """Deliver whatever is on its way until nobody has anything to say."""
        while self.deferred:
            device, message, session = self.deferred.popleft()
            try:
                if isinstance(message, VectorChunk):
                    effects = self.round.receive_chunk(device, message, self.now_ms)
                else:
                    effects = self.round.receive(self.opened(device, message, session=session), self.now_ms)
            except (RemoteProtocolError, CryptoError) as error:
                self.refused.append(error.reason)
                continue
            self.perform(effects)

    def perform(self, effects: list[Effect]) -> None:
        """Deliver the round's messages to the devices; their answers are queued."""
        self.effects += effects
        for effect in effects:
            if isinstance(effect, Send):
                context = SignedContext(
                    COORDINATOR, effect.device, FLEET, self.agenda.round, self.agenda.attempt, effect.session
                )
                device = self.devices[effect.device]
                for answer, session in device.receive(effect.message, context):
                    if isinstance(answer, Message):
                        device.said.append((answer, session))
                    self.deferred.append((effect.device, answer, session))

    def check_in(self, devices: Iterable[str] | None = None) -> None:
        """Let `devices` (all by default) check in."""
        for device in list(self.devices) if devices is None else devices:
            self.say(device, self.devices[device].check_in())

    def expected_mean(self, survivors: list[str]) -> Array:
        """What the update of these devices must come to, in float64."""
        devices = [self.devices[name] for name in survivors]
        weights = np.array([min(device.weight, 10) for device in devices], np.float64)
        updates = [device.values["delta"][0].astype(np.float64) for device in devices]
        return np.asarray(np.average(updates, axis=0, weights=weights))

    def wait(self, milliseconds: int) -> None:
        """Let time pass."""
        self.now_ms += milliseconds
        self.perform(self.round.tick(self.now_ms))
        self.settle()

    def offline(self, device: str) -> None:
        """Tell the round that `device` is gone."""
        self.perform(self.round.device_status(device, False, self.now_ms))
        self.settle()

    def sent(self, kind: type[Message]) -> list[str]:
        """Who was sent a message of this type."""
        return [
            effect.device for effect in self.effects if isinstance(effect, Send) and isinstance(effect.message, kind)
        ]

    @property
    def committed(self) -> Committed:
        assert isinstance(self.round.phase, Committed), self.round.phase
        return self.round.phase

    @property
    def abandoned(self) -> Abandoned:
        assert isinstance(self.round.phase, Abandoned), self.round.phase
        return self.round.phase


def values_of(number: int, entries: int = ENTRIES) -> dict[str, list[Array]]:
    """What device `number` contributes."""
    random = np.random.default_rng(number)
    return {
        "delta": [random.uniform(-0.5, 0.5, entries).astype(np.float32)],
        "correct": [np.array([number + 1], np.float32)],
    }


@pytest.fixture
def bench(choir: Choir) -> Callable[..., Bench]:
    """Makes a `Bench`."""

    def make(count: int = 6, **terms: Any) -> Bench:
        return Bench(choir, count=count, **terms)

    return make


# --- bundles ----------------------------------------------------------------------------------------------------------


def _role(name: str) -> Role:
    return Role(flatbuffer="main", signature=name)


@pytest.fixture(scope="session")
def model_bundle() -> bytes:
    """A bundle that is a model: 2 weights, mean and variance for inputs of 3 features. Its flatbuffer is never run."""
    initial = {
        "kernel": np.arange(6, dtype=np.float32).reshape(3, 2),
        "mean": np.zeros(3, np.float32),
        "variance": np.ones(3, np.float32),
        "learning_rate": np.array([0.5], np.float32),
    }
    types = {"kernel": "float32[3,2]", "mean": "float32[3]", "variance": "float32[3]", "learning_rate": "float32[1]"}
    ports = tuple(Port(name=name, type=types[name]) for name in initial)
    bundle = Bundle(
        format=FORMAT,
        name="tiny",
        description="For tests.",
        flatbuffers={"main": b"never run"},
        roles={name: _role(name) for name in ("begin", "step", "finish", "infer", "evaluate")},
        broadcast=ports,
        state=(Port(name="k", type="float32[3,2]"),),
        batch=(Port(name="x", type="float32[?,3]"),),
        metrics=(Port(name="loss", type="float32[1]"), Port(name="correct", type="float32[1]")),
        results=(Result(name="delta", ports=(Port(name="delta_kernel", type="float32[3,2]"),), updates=("kernel",)),),
        initial=encode_tensors(initial),
        self_test=SelfTest(broadcast=encode_tensors({}), batches=(), expected=encode_tensors({}), tolerance=1e-5),
        features=("x",),
        predictions=(Port(name="p", type="float32[?,2]"),),
        sums=(Port(name="examples", type="float32[1]"),),
    )
    return encode_bundle(bundle)


@pytest.fixture(scope="session")
def moments_bundle() -> bytes:
    """A bundle that only sums: count, sum and sum of squares of 3 features."""
    results = {"count": "int32[1]", "sum": "float32[3]", "sum_of_squares": "float32[3]"}
    bundle = Bundle(
        format=FORMAT,
        name="moments",
        description="For tests.",
        flatbuffers={"main": b"never run"},
        roles={name: _role(name) for name in ("begin", "step", "finish")},
        broadcast=(),
        state=(Port(name="s", type="float32[3]"),),
        batch=(Port(name="x", type="float32[?,3]"),),
        metrics=(),
        results=tuple(Result(name=name, ports=(Port(name=name, type=kind),)) for name, kind in results.items()),
        initial=encode_tensors({}),
        self_test=SelfTest(broadcast=encode_tensors({}), batches=(), expected=encode_tensors({}), tolerance=1e-5),
    )
    return encode_bundle(bundle)


MODEL_TASK = """
name = "tiny"
bundle = "tiny.svp"
collection = "numbers"
rounds = 2
purpose = "to test"
[cohort]
goal = 5
minimum = 4
[time]
selection_s = 10
training_s = 20
stage_s = 5
retry_delay_s = 1
[optimizer]
learning_rate = 0.25
[update]
clip_norm = 10.0
half_range = 1.0
weight_cap = 10
[metrics.correct]
maximum = 100
"""

SUM_TASK = """
name = "moments"
bundle = "moments.svp"
collection = "numbers"
purpose = "to count"
[cohort]
goal = 5
minimum = 4
[results.count]
maximum = 1000
[results.sum]
half_range = 1000.0
[results.sum_of_squares]
half_range = 1000.0
bits = 40
"""


@pytest.fixture
def task_folder(tmp_path: Path, model_bundle: bytes, moments_bundle: bytes) -> Path:
    """A folder with two bundles and two task files."""
    (tmp_path / "tiny.svp").write_bytes(model_bundle)
    (tmp_path / "moments.svp").write_bytes(moments_bundle)
    (tmp_path / "tiny.toml").write_text(MODEL_TASK)
    (tmp_path / "moments.toml").write_text(SUM_TASK)
    return tmp_path


@pytest.fixture
def scripted(choir: Choir) -> Callable[..., ScriptedDevice]:
    """Makes the device that takes part in a plan: its update is 0.125 everywhere, its sums are small whole numbers."""

    def make(name: str, plan: Plan, state_digest: bytes, state: dict[str, Array]) -> ScriptedDevice:
        fixed = {"delta": 0.125, "correct": 3.0, "count": 4.0, "sum": 8.0, "sum_of_squares": 24.0}
        values = {
            a.name: [np.full(TensorType.parse(t).shape, fixed[a.name], np.float32) for t in a.tensors]  # type: ignore[arg-type]
            for a in plan.aggregations
        }
        return ScriptedDevice(choir.devices[name], choir, plan, values, weight=4, state=state_digest)

    return make


def make_request(bundle: bytes, *, key: str = "", broadcast: float | None = None, **changed: Any) -> RoundRequest:
    """A round that sums what the moments bundle gives."""
    aggregations = (
        Aggregation(name="count", tensors=("int32[1]",), encoding=Counted(maximum=1000)),
        Aggregation(name="sum", tensors=("float32[3]",), encoding=Quantised(half_range=100.0, bits=40), lane="uint64"),
    )
    tensors = {} if broadcast is None else {"threshold": np.array([broadcast], np.float32)}
    parts: dict[str, Any] = {
        "key": key,
        "name": "mean_temperature",
        "purpose": "to know how warm it is",
        "collection": "temperature",
        "bundle": bundle,
        "work": LocalWork(batch_size=1, max_examples=1, order="stored"),
        "aggregations": aggregations,
        "weight_cap": 10,
        "broadcast": encode_tensors(tensors),
    }
    return RoundRequest(**{**parts, **changed})


@pytest.fixture
def request_of(moments_bundle: bytes) -> Callable[..., RoundRequest]:
    """Makes a request for the sums of the moments bundle."""

    def make(key: str = "", **changed: Any) -> RoundRequest:
        return make_request(**{"bundle": moments_bundle, "key": key, **changed})

    return make


# --- a whole coordinator over the memory broker ----------------------------------------------------------------------


class Player:
    """A scripted device on the broker: fetches plan and state, then lets `ScriptedDevice` speak."""

    def __init__(self, broker: MemoryBroker, choir: Any, name: str, scripted: Callable[..., Any]) -> None:
        self.identity = choir.devices[name]
        self.name = name
        self.choir = choir
        self.topics = Topics(choir.anchor.fleet)
        self.transport = MemoryTransport(broker, name)
        self.fetcher = BlobFetcher(self.topics)
        self.scripted = scripted
        self.device: Any = None
        self.announcement: tuple[Announcement, SignedContext, bytes] | None = None
        self.blobs: dict[bytes, bytes] = {}
        self.outcomes: list[Outcome] = []
        self.announced: list[tuple[int, int]] = []
        self.silent_at: type[Message] | None = None
        self.silent = False
        self.note: Callable[[], object] = lambda: None
        for topic in (self.topics.round(), self.topics.outcome(), self.topics.down(name)):
            self.transport.subscribe(topic)
        self.say_status(online=True)

    def say_status(self, *, online: bool) -> None:
        context = SignedContext(self.name, ALL, self.topics.fleet)
        payload = seal(Status(online=online, version="test"), self.identity, context)
        self.transport.publish(self.topics.status(self.name), payload, retain=True)

    def step(self) -> bool:
        self.note()
        event = self.transport.receive(0)
        if not isinstance(event, Delivery):
            return event is not None
        if event.topic.startswith(self.topics.round().rsplit("/", 1)[0] + "/blob/"):
            self._fetch(self.fetcher.receive(event.topic, event.payload))
            return True
        envelope = parse(event.payload)
        coordinator = self.choir.coordinator.certificate
        opened = open_envelope(envelope, coordinator)
        match opened.message:
            case Announcement() as announcement:
                self.announcement = announcement, opened.context, digest_of(event.payload)
                self.announced.append((opened.context.round, opened.context.attempt))
                self._fetch(self.fetcher.want(announcement.plan) + self.fetcher.want(announcement.state))
                self._check_in()
            case Outcome() as outcome:
                self.outcomes.append(outcome)
            case message if self.device is not None and not self.silent:
                for answer, session in self.device.receive(message, opened.context):
                    self.say(answer, session)
        return True

    def _fetch(self, effects: Any) -> None:
        for effect in effects:
            match effect:
                case Subscribe(topic_filter=topic_filter):
                    self.transport.subscribe(topic_filter)
                case Unsubscribe(topic_filter=topic_filter):
                    self.transport.unsubscribe(topic_filter)
                case Fetched(ref=ref, content=content):
                    self.blobs[ref.digest] = content
                    self._check_in()

    def _check_in(self) -> None:
        assert self.announcement is not None
        announcement, _, digest = self.announcement
        if self.silent or not {announcement.plan.digest, announcement.state.digest} <= self.blobs.keys():
            return
        plan = decode_plan(self.blobs[announcement.plan.digest])
        state = decode_tensors(self.blobs[announcement.state.digest])
        self.device = self.scripted(self.name, plan, announcement.state.digest, state)
        self.device.silent_at = self.silent_at
        self.say(self.device.check_in(digest), bytes(32))

    def say(self, message: Any, session: bytes = bytes(32), **changed: Any) -> None:
        assert self.announcement is not None
        _, context, _ = self.announcement
        if isinstance(message, VectorChunk):
            self.transport.publish(self.topics.up_chunk(self.name, "1"), encode_vector_chunk(message))
            return
        where = {"round": context.round, "attempt": context.attempt, "session": session, **changed}
        signed = SignedContext(self.name, context.sender, context.fleet, **where)
        self.transport.publish(self.topics.up_message(self.name, NO_ROUTE), seal(message, self.identity, signed))


@dataclass
class Stage:
    """A broker, a coordinator and players, driven by one hand."""

    choir: Any
    folder: Path
    scripted: Callable[..., Any]
    broker: MemoryBroker
    now_ms: int
    players: list[Player] = field(default_factory=list)
    service: Service | None = None
    journal: Journal | None = None

    def start(self, *, journal: Journal | None = None, **setup: Any) -> None:
        self.journal = journal or Journal(self.folder / "journal.sqlite")
        parts = {
            "identity": self.choir.coordinator,
            "anchor": self.choir.anchor,
            "chunk_bytes": 1024,
            "uploads": UploadSettings(),
            "entropy": random.Random(1).randbytes,
        }
        self.transport = MemoryTransport(self.broker, "coordinator")
        events = EventLog((self.folder / "events.jsonl").open("a", encoding="utf-8"))
        self.events_log = events
        self.service = Service(
            Setup(**{**parts, **setup}), journal=self.journal, transport=self.transport, events=events
        )
        self.service.start(self.now_ms)

    def crash(self) -> None:
        """The process is gone: no goodbye, nothing flushed."""
        assert self.journal is not None
        self.journal.close()
        self.events_log.close()
        self.transport.close()
        self.service = None

    def settle(self) -> None:
        """Let everybody speak until nobody has anything to say."""
        assert self.service is not None
        busy = True
        while busy:
            self.service.step(self.now_ms, 0)
            moved = [player.step() for player in self.players]
            busy = any(moved) or self.broker.queued() > 0

    def run(self, seconds: float, *, step_ms: int = 500, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass in steps, everybody speaking in between."""
        end_ms = self.now_ms + round(1000 * seconds)
        self.settle()
        while self.now_ms < end_ms and not until():
            self.now_ms += step_ms
            self.settle()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]

    def submit(self, name: str) -> None:
        text = (self.folder / f"{name}.toml").read_text()
        task = read_task(text)
        moments = (self.folder / task.standardise.bundle).read_bytes() if task.standardise else None
        with Journal(self.folder / "journal.sqlite") as journal:
            bundle = (self.folder / task.bundle).read_bytes()
            journal.submit(task.name, text, purpose=task.purpose, bundle=bundle, moments=moments, now_ms=self.now_ms)

    def done(self) -> bool:
        assert self.journal is not None
        return all(task.status not in ("queued", "running") for task in self.journal.tasks())


@pytest.fixture
def stage(choir: Any, task_folder: Path, scripted: Callable[..., Any]) -> Any:
    """A stage with five players, nothing started."""
    broker = MemoryBroker(random.Random(3))
    made = Stage(choir, task_folder, scripted, broker, now_ms=1_796_083_200_000)
    made.players = [Player(broker, choir, name, scripted) for name in choir.names(5)]
    yield made
    if made.service is not None:
        made.crash()
