"""A fleet in memory: real agents on real disks, and a scripted coordinator."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from scripted_coordinator import Coordinator

from edge_agent.agent import Agent
from edge_agent.config import AgentConfig, BrokerConfig
from edge_agent.examples import ExampleStore
from edge_agent.home import Home, init_home, load_anchor, load_identity
from edge_agent.ledger import Ledger
from edge_agent.performer import Setup
from edge_agent.policy import Policy
from edge_agent.presence import last_will
from sottovoce.authority import Authority, create_authority, open_authority, sign_request
from sottovoce.blobs import blob_ref
from sottovoce.bundle import decode_bundle
from sottovoce.identity import Identity, TrustAnchor, load_certificate, new_key, signing_request
from sottovoce.plan import Aggregation, Counted, LocalWork, Plan, PrivacyTerms, Quantised
from sottovoce.secagg.encoding import Aggregate
from sottovoce.transport.memory import MemoryBroker, MemoryTransport

FLEET = "choir"
AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
AT_MS = int(AT.timestamp() * 1000)
BUNDLES = Path(__file__).parents[2] / "simulation" / "bundles"
VISITS = Path(__file__).parent / "visits.svp"


class FakeClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now_ms: int = AT_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


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
    delta = tuple(port.type for port in decode_bundle(bundle_bytes).results[0].ports)
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


def make_world(folder: Path, *, at: datetime.datetime = AT) -> World:
    """A fleet without devices yet, whose CA is in `folder` or is made there."""
    if (folder / "ca").exists():
        authority = open_authority(folder / "ca")
    else:
        authority = create_authority(folder / "ca", fleet=FLEET, at=at - datetime.timedelta(days=1))
    anchor = TrustAnchor(authority.certificate)
    broker, clock = MemoryBroker(random.Random(7)), FakeClock()
    bundle_bytes = (BUNDLES / "digits.svp").read_bytes()
    coordinator = Coordinator(
        identity=_coordinator_identity(authority, anchor, at=at),
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


def _coordinator_identity(authority: Authority, anchor: TrustAnchor, *, at: datetime.datetime) -> Identity:
    """Return a new coordinator of the fleet, in the place of the one before."""
    key = new_key()
    request = signing_request(key, name="coordinator", fleet=FLEET, role="coordinator")
    issued = sign_request(authority, request, at=at, role="coordinator", replace=True)
    der = load_certificate(issued.pem).public_bytes(Encoding.DER)
    return Identity(key, anchor.verify(der, at=at))
