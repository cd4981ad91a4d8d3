"""A fleet in memory: real agents on real disks, and a coordinator that does what the test tells it to.

The coordinator here is a script around the real `ServerSession`, the real codec and the real chunks; it makes no
decision of its own, so a test can stop, repeat or falsify anything.
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.agent import Agent
from edge_agent.config import AgentConfig, BrokerConfig
from edge_agent.home import Home, init_home, load_anchor, load_identity
from edge_agent.ledger import Ledger
from edge_agent.performer import Setup
from edge_agent.policy import Policy
from edge_agent.presence import last_will
from sottovoce.authority import Authority, create_authority, open_authority, sign_request
from sottovoce.blobs import BlobRef, blob_ref, canonical, digest_of
from sottovoce.bundle import Bundle, decode_bundle
from sottovoce.identity import Identity, SignedContext, TrustAnchor, new_key, signing_request
from sottovoce.plan import Aggregation, Counted, LocalWork, Plan, PrivacyTerms, Quantised
from sottovoce.secagg.encoding import Aggregate, decode
from sottovoce.secagg.lanes import layout_of
from sottovoce.secagg.server import STAGE_NAMES, Reply, ServerSession
from sottovoce.secagg.uploads import ExpectedVector
from sottovoce.transport.base import Connected, Delivery
from sottovoce.transport.memory import MemoryBroker, MemoryTransport
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

FLEET = "choir"
AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
AT_MS = int(AT.timestamp() * 1000)
BUNDLES = Path(__file__).parents[2] / "simulation" / "bundles"
VISITS = Path(__file__).parent / "visits.svp"
ROUTE = "r7"


class FakeClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now_ms: int = AT_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


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
    clock: FakeClock
    bundle_bytes: bytes
    state_bytes: bytes
    plan: Plan
    heard: dict[str, list[Message]] = field(default_factory=dict)
    statuses: dict[str, bool] = field(default_factory=dict)
    announcement: Opened[Message] | None = None
    session: ServerSession | None = None
    uploads: bool = True
    chunk_bytes: int = 4096
    round: int = 1
    attempt: int = 0
    assemblies: dict[str, Assembly[ExpectedVector]] = field(default_factory=dict)
    certificates: dict[bytes, Any] = field(default_factory=dict)
    reassemblers: dict[str, Reassembler] = field(default_factory=dict)
    chunks_taken: int = 0
    selected: set[str] = field(default_factory=set)
    at: datetime.datetime = AT
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
        match event:
            case Delivery(topic=topic, payload=payload) if payload:
                self._take(topic, payload)
            case Delivery() | Connected():
                pass
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


@dataclass
class World:
    """A broker, a coordinator, and agents; the test turns the crank."""

    folder: Path
    authority: Authority
    broker: MemoryBroker
    coordinator: Coordinator
    clock: FakeClock
    policy: Policy
    at: datetime.datetime = AT
    checkpoint_s: float = 0.0
    agents: dict[str, Agent] = field(default_factory=dict)
    homes: dict[str, Home] = field(default_factory=dict)

    def enrol(
        self, name: str, *, examples: dict[str, Any] | None = None, port: int = 0, collection: str = "digits"
    ) -> Home:
        """Make a device's folder with key, certificate and examples."""
        home = init_home(
            self.folder / name,
            device=name,
            fleet=self.authority.fleet,
            broker=BrokerConfig(host="127.0.0.1", port=port, tls=False),
        )
        issued = sign_request(self.authority, home.request.read_bytes(), at=self.at)
        home.certificate.write_bytes(issued.pem)
        home.fleet_ca.write_bytes(self.authority.certificate_file.read_bytes())
        self.homes[name] = home
        if examples is None:
            examples = digits(seed=len(self.homes))
        if examples:
            from edge_agent.examples import ExampleStore

            with ExampleStore(home.examples) as store:
                store.add(collection, examples, now_s=self.at.timestamp())
        return home

    def setup(self, name: str, *, resident: bool = True, clock: Callable[[], int] | None = None) -> Setup:
        home = self.homes[name]
        config = AgentConfig(
            device=name,
            fleet=self.authority.fleet,
            broker=BrokerConfig(host="127.0.0.1", tls=False),
            checkpoint_s=self.checkpoint_s,
            policy=self.policy,
        )
        return Setup(
            home=home,
            config=config,
            identity=load_identity(home, self.at),
            anchor=load_anchor(home),
            clock=clock or self.clock,
            resident=resident,
        )

    def start(self, name: str, *, resident: bool = True, clock: Callable[[], int] | None = None) -> Agent:
        """Start the agent of an enrolled device."""
        setup = self.setup(name, resident=resident, clock=clock)
        agent = Agent(setup, MemoryTransport(self.broker, name, will=last_will(setup.identity)))
        agent.start()
        self.agents[name] = agent
        return agent

    def fleet(self, count: int) -> list[str]:
        """Enrol and start `count` devices; return their ids."""
        names = [f"pi-{number}" for number in range(count)]
        for name in names:
            self.enrol(name)
            self.start(name)
        return names

    def kill(self, name: str) -> None:
        """The process is gone without a word: what it had in memory is lost, its disk stays."""
        self.broker.disconnect(name)
        agent = self.agents.pop(name)
        agent._bench.stop()
        agent._hands.close()

    def settle(self, *, limit: int = 20_000) -> None:
        """Turn everybody until nothing more happens without the clock."""
        quiet = 0
        for _ in range(limit):
            moved = [agent.turn(0) for agent in list(self.agents.values())]
            quiet = 0 if any([*moved, self.coordinator.turn()]) else quiet + 1
            if quiet == 2:  # What is due by the clock is done in a quiet turn, and may set off more.
                return
        raise AssertionError("it does not come to rest")

    def until(self, condition: Callable[[], bool], *, limit: int = 20_000) -> None:
        """Turn everybody until `condition` holds."""
        for _ in range(limit):
            if condition():
                return
            for agent in list(self.agents.values()):
                agent.turn(0)
            self.coordinator.turn()
        raise AssertionError("it never came to that")

    def pass_time(self, milliseconds: int) -> None:
        self.clock.now_ms += milliseconds

    def state_of(self, name: str) -> str:
        return type(self.agents[name].participation.state).__name__

    def releases(self, name: str) -> list[tuple[int, str]]:
        """What the ledger of a device says: round and status of each release, the newest first."""
        with Ledger(self.homes[name].ledger) as ledger:
            return [(row.round, row.status) for row in ledger.rows()]

    def slow_training(self) -> None:
        """Ask for 200 batches instead of 6."""
        work = LocalWork(epochs=20, batch_size=2)
        self.coordinator.plan = msgspec.structs.replace(self.coordinator.plan, work=work)

    def run_rendezvous(self, devices: list[str]) -> Aggregate:
        """Take ready devices through a whole rendezvous."""
        self.coordinator.open_rendezvous(devices)
        while self.coordinator.stage != "over":
            self.settle()
            self.coordinator.close_stage()
        return self.coordinator.aggregate()

    def train(self, devices: list[str]) -> None:
        """Announce a round, select `devices` and let them train until they are ready."""
        self.coordinator.announce()
        self.settle()
        self.coordinator.select(devices)
        self.settle()


def digits(count: int = 20, *, seed: int = 0) -> dict[str, Any]:
    """Examples that fit the digits program."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.integers(0, 17, (count, 64)).astype(np.float32),
        "y": rng.integers(0, 10, count).astype(np.int32),
    }


def digits_plan(bundle_bytes: bytes, *, chunk_bytes: int = 4096, **changes: Any) -> Plan:
    """A plan for the digits program."""
    bundle: Bundle = decode_bundle(bundle_bytes)
    delta = tuple(port.type for port in bundle.results[0].ports)
    chosen: dict[str, Any] = {
        "fleet": FLEET,
        "name": "digits",
        "collection": "digits",
        "program": blob_ref(bundle_bytes, chunk_bytes=chunk_bytes),
        "work": LocalWork(epochs=2, batch_size=8),
        "aggregations": (
            Aggregation(
                name="delta",
                tensors=delta,
                encoding=Quantised(half_range=1.0, bits=16),
                weighted=True,
                clip_norm=5.0,
            ),
            Aggregation(name="correct", tensors=("float32[1]",), encoding=Counted(maximum=1000)),
        ),
        "privacy": PrivacyTerms(purpose="to read digits", minimum_cohort=3, weight_cap=100),
    }
    return Plan(**{**chosen, **changes})


def visits_world(folder: Path) -> World:
    """A fleet whose plan is the program with client state, visits.svp; its examples are one column of readings."""
    world = make_world(folder)
    coordinator, content = world.coordinator, VISITS.read_bytes()
    coordinator.bundle_bytes, coordinator.state_bytes = content, decode_bundle(content).initial
    whole = Counted(maximum=10_000_000)
    coordinator.plan = digits_plan(
        content,
        name="visits",
        collection="readings",
        work=LocalWork(batch_size=2, order="stored"),
        aggregations=tuple(
            Aggregation(name=name, tensors=("float32[1]",), encoding=whole) for name in ("now", "before")
        ),
        privacy=PrivacyTerms(purpose="to count visits", minimum_cohort=3, weight_cap=100),
    )
    return world


def _der(pem: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    from sottovoce.identity import load_certificate

    return load_certificate(pem).public_bytes(Encoding.DER)


def coordinator_identity(authority: Authority, *, name: str, at: datetime.datetime) -> Identity:
    """Return a new coordinator of the fleet, in the place of the one before."""
    key = new_key()
    request = signing_request(key, name=name, fleet=FLEET, role="coordinator")
    issued = sign_request(authority, request, at=at, role="coordinator", replace=True)
    return Identity(key, TrustAnchor(authority.certificate).verify(_der(issued.pem), at=at))


def make_world(folder: Path, *, at: datetime.datetime = AT) -> World:
    if (folder / "ca").exists():
        authority = open_authority(folder / "ca")
    else:
        authority = create_authority(folder / "ca", fleet=FLEET, at=at - datetime.timedelta(days=1))
    anchor = TrustAnchor(authority.certificate)
    identity = coordinator_identity(authority, name="coordinator", at=at)
    broker, clock = MemoryBroker(random.Random(7)), FakeClock()
    bundle_bytes = (BUNDLES / "digits.svp").read_bytes()
    coordinator = Coordinator(
        identity=identity,
        anchor=anchor,
        transport=MemoryTransport(broker, "coordinator"),
        clock=clock,
        bundle_bytes=bundle_bytes,
        state_bytes=decode_bundle(bundle_bytes).initial,
        plan=digits_plan(bundle_bytes),
        at=at,
    )
    coordinator.start()
    policy = Policy(minimum_cohort=3, minimum_honest_survivors=2)
    return World(folder, authority, broker, coordinator, clock, policy, at)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A fleet without devices yet, with a CA of its own."""
    made = make_world(tmp_path)
    yield made
    for name in list(made.agents):
        made.kill(name)


@pytest.fixture
def world_of_today(tmp_path: Path) -> World:
    """A fleet whose certificates are valid now, for processes that read the machine's clock."""
    return make_world(tmp_path, at=datetime.datetime.now(datetime.UTC))


@pytest.fixture(scope="session")
def motionless_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One enrolled device and a coordinator's identity; nothing runs. For tests of the machine alone."""
    made = make_world(tmp_path_factory.mktemp("world"))
    made.enrol("pi-0", examples={})
    return made
