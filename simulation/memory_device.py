"""One device of a fleet in memory: a real agent on a home of its own, whose link, sleep and crashes are the fleet's."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from edge_agent.agent import Agent
from edge_agent.config import AgentConfig, BrokerConfig
from edge_agent.examples import ExampleStore
from edge_agent.home import Home, init_home, load_anchor, load_identity
from edge_agent.performer import Setup
from edge_agent.policy import Policy
from edge_agent.presence import last_will
from sottovoce.authority import create_authority, sign_request
from sottovoce.identity import Identity, Role, TrustAnchor, load_certificate, new_key, signing_request
from sottovoce.transport.memory import MemoryBroker, MemoryTransport
from sottovoce.types import Array

FLEET = "simulation"
POLICY = Policy(
    minimum_cohort=3,
    minimum_honest_survivors=2,
    modes=("active", "curious"),
    # The same question asked again and again is what a simulation is for; on a real device it is what leaks.
    max_releases_per_state=2**31 - 1,
    max_client_state_bytes=1 << 30,
    minimum_threshold=0,
    discovery=True,
)
"""What the owners of simulated devices allow: everything that three devices can do."""
_BROKER = BrokerConfig(host="127.0.0.1", tls=False)


class SimulatedClock:
    """Unix milliseconds that pass only when they are told to."""

    def __init__(self, now_ms: int) -> None:
        """Start at `now_ms`."""
        self.now_ms = now_ms

    def __call__(self) -> int:
        """Return the time."""
        return self.now_ms

    @property
    def at(self) -> datetime.datetime:
        """The time, timezone-aware."""
        return datetime.datetime.fromtimestamp(self.now_ms / 1000, datetime.UTC)


class Enrolment:
    """The fleet's CA, for as long as the simulation lasts.

    Attributes:
        anchor: What everybody pins.
    """

    def __init__(self, folder: Path, clock: SimulatedClock) -> None:
        """Make a CA in the folder `folder`."""
        self._authority = create_authority(folder, fleet=FLEET, at=clock.at)
        self._clock = clock
        self.anchor = TrustAnchor(self._authority.certificate)

    def identity(self, name: str, role: Role) -> Identity:
        """Return a new key with its certificate, neither of them on any disk."""
        key = new_key()
        issued = sign_request(
            self._authority, signing_request(key, name=name, fleet=FLEET, role=role), at=self._clock.at, role=role
        )
        der = load_certificate(issued.pem).public_bytes(serialization.Encoding.DER)
        return Identity(key, self.anchor.verify(der, at=self._clock.at, role=role))

    def home(self, path: Path, name: str) -> Home:
        """Return the home of a new device, made by the same steps as `edge-agent init` and `enrol`."""
        home = init_home(path, device=name, fleet=FLEET, broker=_BROKER)
        home.certificate.write_bytes(sign_request(self._authority, home.request.read_bytes(), at=self._clock.at).pem)
        home.fleet_ca.write_bytes(self._authority.certificate_file.read_bytes())
        return home


class MemoryDevice:
    """A device: its home stays, its agent comes and goes.

    Attributes:
        name: Its device id.
        home: Its folder.
        agent: Its agent; None before the first start and after a crash.
        awake: True while its link is meant to be up.
    """

    def __init__(
        self, home: Home, *, name: str, broker: MemoryBroker, clock: SimulatedClock, entropy: Callable[[int], bytes]
    ) -> None:
        """Take the enrolled `home` into use; nothing is started yet.

        Args:
            home: Its folder.
            name: Its device id.
            broker: The fleet's broker.
            clock: The fleet's time.
            entropy: Where its randomness comes from.
        """
        self.name = name
        self.home = home
        self.agent: Agent | None = None
        self.awake = False
        self._broker = broker
        self._setup = Setup(
            home=home,
            config=AgentConfig(device=name, fleet=FLEET, broker=_BROKER, policy=POLICY),
            identity=load_identity(home, clock.at),
            anchor=load_anchor(home),
            clock=clock,
            resident=True,
            entropy=entropy,
        )
        self._store = ExampleStore(home.examples)
        self._lent: tuple[str, bytes] | None = None
        self._stopped = False

    def wake(self) -> None:
        """Bring the link up, and before that the agent, if there is none."""
        if self.awake:
            return
        self.awake = True
        if self.agent is None:
            transport = MemoryTransport(self._broker, self.name, will=last_will(self._setup.identity))
            if self._stopped:
                # What came while it was stopped is not for it any more: its session has expired.
                self._broker.disconnect(self.name)
                self._broker.reconnect(self.name, resumed=False)
                self._stopped = False
            self.agent = Agent(self._setup, transport)
            self.agent.start()
        else:
            self._broker.reconnect(self.name, resumed=False)

    def sleep(self) -> None:
        """Cut the link without a word; the agent goes on when it is woken."""
        if self.awake:
            self._broker.disconnect(self.name)
            self.awake = False

    def stop(self) -> None:
        """Put it to sleep and end the agent, so that it takes no memory; it is started again when it is woken."""
        self.sleep()
        self._stopped = self._stopped or self.agent is not None
        self._end_agent()

    def crash(self) -> None:
        """End the agent as SIGKILL does: what it had in memory is gone, its disk stays."""
        self.sleep()
        self._end_agent()

    def turn(self) -> bool:
        """Let the agent do one thing; return False if there was nothing to do."""
        return self.agent is not None and self.agent.turn(0)

    def due_ms(self) -> int | None:
        """Return when the agent has something to do by the clock, or None."""
        return self.agent.participation.next_wakeup_ms() if self.agent is not None else None

    def give(self, collection: str, examples: Mapping[str, Array], *, now_s: float) -> None:
        """Append `examples` (columns of equal length) to a collection of this device, as its owner's import would."""
        self._store.add(collection, examples, now_s=now_s)

    def lend(self, collection: str, examples: Mapping[str, Array], *, digest: bytes, now_s: float) -> None:
        """Make `examples` all that there is in `collection`, unless it is the same as the last time (`digest`)."""
        if self._lent == (collection, digest):
            return
        self._store.forget(collection)
        if all(len(column) for column in examples.values()):
            self._store.add(collection, examples, now_s=now_s)
        # What was computed from other values must not be taken for a result of these.
        for unfinished in (*self.home.pending.glob("result-*"), *self.home.pending.glob("checkpoint-*")):
            unfinished.unlink()
        self._lent = collection, digest

    def close(self) -> None:
        """End everything and close the files."""
        self.crash()
        self._store.close()

    def _end_agent(self) -> None:
        # The link is down for good, so that of the orderly goodbye nothing but the closing of files comes about.
        if self.agent is not None:
            self.agent.close()
            self.agent = None
