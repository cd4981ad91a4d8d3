"""One harness for every implementation of the transport port: clients, and ways to hurt them."""

from __future__ import annotations

import contextlib
import itertools
import random
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import pytest

from simulation.broker_process import BrokerProcess
from sottovoce.transport.base import Connected, Delivery, Event, Transport, Will
from sottovoce.transport.memory import MemoryBroker, MemoryTransport
from sottovoce.transport.mqtt import MqttSettings, MqttTransport
from sottovoce.wire.topics import Topics

DEADLINE_S = 10.0
E = TypeVar("E", bound=Event)
_FLEETS = (f"fleet-{number}" for number in itertools.count(1))


class Relay:
    """A TCP relay in front of the broker: the network, which can be cut."""

    def __init__(self, broker_port: int) -> None:
        self._broker_port = broker_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._brokers_ends: set[socket.socket] = set()
        self.bytes_down = 0
        self._lock = threading.Lock()
        self._open = True
        self._reachable = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def move(self, broker_port: int) -> None:
        """Reset every connection; new ones lead to another broker."""
        self._broker_port = broker_port
        self.cut()

    def cut(self) -> None:
        """Reset every connection; new ones come through."""
        with self._lock:
            for end in list(self._peers):
                self._drop(end)

    def unplug(self) -> None:
        """Reset every connection and every new one."""
        self._reachable = False
        self.cut()

    def plug(self) -> None:
        """Let connections through again."""
        self._reachable = True

    def close(self) -> None:
        """Free everything."""
        self._open = False
        self._thread.join()
        self.unplug()
        self._listener.close()
        self._selector.close()

    def _run(self) -> None:
        while self._open:
            for key, _ in self._selector.select(0.02):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._peers:
                        self._forward(key.fileobj)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            if not self._reachable:
                raise OSError("unplugged")
            broker = socket.create_connection(("127.0.0.1", self._broker_port))
        except OSError:
            client.close()
            return
        self._peers |= {client: broker, broker: client}
        self._brokers_ends.add(broker)
        for end in (client, broker):
            self._selector.register(end, selectors.EVENT_READ)

    def _forward(self, end: socket.socket) -> None:
        try:
            content = end.recv(65_536)
            self.bytes_down += len(content) if end in self._brokers_ends else 0
            self._peers[end].sendall(content)
        except OSError:
            content = b""
        if not content:
            self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        peer = self._peers.pop(end, None)
        if peer is not None:
            self._brokers_ends.discard(end)
            self._selector.unregister(end)
            end.close()
            self._drop(peer)


def until(transport: Transport, wanted: Callable[[Event], bool], *, seen: list[Event] | None = None) -> Event:
    """Return the first event that is wanted; those before it go into `seen`."""
    seen = [] if seen is None else seen
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        event = transport.receive(0.05)
        if event is not None and wanted(event):
            return event
        if event is not None:
            seen.append(event)
    raise AssertionError(f"what was wanted did not come within {DEADLINE_S} s; came: {seen}")


class Harness(Protocol):
    """A broker and its clients."""

    topics: Topics

    def connect(self, client_id: str, *, will: Will | None = None) -> Transport:
        """Return a transport for `client_id`, connecting."""

    def cut(self, client_id: str) -> None:
        """Break the link of `client_id`; it comes back by itself."""

    def unplug(self, client_id: str) -> None:
        """Break the link of `client_id` until `plug`."""

    def plug(self, client_id: str) -> None:
        """Let the link of `client_id` come back."""

    def kill(self, client_id: str) -> None:
        """Let the client vanish without a word, as SIGKILL does."""

    def restart_broker(self) -> None:
        """Restart the broker; it keeps sessions and retained messages."""


class MemoryHarness:
    """Clients of a MemoryBroker."""

    def __init__(self) -> None:
        self.topics = Topics(next(_FLEETS))
        self.broker = MemoryBroker(random.Random(1))
        self._open: list[MemoryTransport] = []

    def connect(self, client_id: str, *, will: Will | None = None) -> Transport:
        self._open.append(MemoryTransport(self.broker, client_id, will=will))
        return self._open[-1]

    def cut(self, client_id: str) -> None:
        self.broker.disconnect(client_id)
        self.broker.reconnect(client_id)

    def unplug(self, client_id: str) -> None:
        self.broker.disconnect(client_id)

    def plug(self, client_id: str) -> None:
        self.broker.reconnect(client_id)

    def kill(self, client_id: str) -> None:
        self.broker.disconnect(client_id)

    def restart_broker(self) -> None:
        self.broker.restart()

    def close(self) -> None:
        for transport in self._open:
            transport.close()


class MqttHarness:
    """Clients of a real mosquitto, each behind its own relay."""

    def __init__(self, broker: BrokerProcess, protocol: str) -> None:
        self.topics = Topics(next(_FLEETS))
        self.broker = broker
        self._protocol = protocol
        self._relays: dict[str, Relay] = {}
        self._open: dict[str, list[MqttTransport]] = {}

    def settings(self, client_id: str, **changes: object) -> MqttSettings:
        relay = self._relays.setdefault(client_id, Relay(self.broker.port))
        # One session for one client of one test: all tests share the broker.
        mine = {
            "host": "127.0.0.1",
            "port": relay.port,
            "client_id": f"{self.topics.fleet}-{client_id}",
            "protocol": self._protocol,
            "backoff_min_s": 0.05,
            "backoff_max_s": 0.2,
        }
        return MqttSettings(**{**mine, **changes})  # type: ignore[arg-type]  # settings by name, checked at run time

    def connect(self, client_id: str, *, will: Will | None = None) -> Transport:
        transport = MqttTransport(self.settings(client_id, will=will), rng=random.Random(1))
        self._open.setdefault(client_id, []).append(transport)
        return transport

    def cut(self, client_id: str) -> None:
        self._relays[client_id].cut()

    def unplug(self, client_id: str) -> None:
        self._relays[client_id].unplug()

    def plug(self, client_id: str) -> None:
        self._relays[client_id].plug()

    def kill(self, client_id: str) -> None:
        self._relays.pop(client_id).close()

    def restart_broker(self) -> None:
        self.broker.restart()

    def move(self, client_id: str, broker: BrokerProcess) -> None:
        """Break the link of `client_id`; it comes back to another broker."""
        self._relays[client_id].move(broker.port)

    def bytes_down(self, client_id: str) -> int:
        """Bytes that the broker has sent to the client."""
        return self._relays[client_id].bytes_down

    def wait_for_link(self, client_id: str) -> None:
        """Wait until the broker has sent something over a new connection."""
        before, deadline_s = self.bytes_down(client_id), time.monotonic() + DEADLINE_S
        while self.bytes_down(client_id) == before:
            assert time.monotonic() < deadline_s, "the link does not come back"
            time.sleep(0.005)

    def close(self) -> None:
        for transport in itertools.chain.from_iterable(self._open.values()):
            transport.close()
        for relay in self._relays.values():
            relay.close()


@pytest.fixture(scope="module")
def mosquitto() -> Iterator[BrokerProcess]:
    with BrokerProcess() as broker:
        yield broker


@pytest.fixture(params=["memory", "mqtt-5", "mqtt-3.1.1"])
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    if request.param == "memory":
        made: MemoryHarness | MqttHarness = MemoryHarness()
    else:
        made = MqttHarness(request.getfixturevalue("mosquitto"), request.param.removeprefix("mqtt-"))
    with contextlib.closing(made):
        yield made


@pytest.fixture
def mqtt_harness(mosquitto: BrokerProcess) -> Iterator[MqttHarness]:
    with contextlib.closing(MqttHarness(mosquitto, "5")) as made:
        yield made


@pytest.fixture(params=["5", "3.1.1"])
def any_mqtt_harness(request: pytest.FixtureRequest, mosquitto: BrokerProcess) -> Iterator[MqttHarness]:
    with contextlib.closing(MqttHarness(mosquitto, request.param)) as made:
        yield made


class Expect:
    """Waits for events with a deadline, never with a sleep."""

    def that(self, transport: Transport, wanted: Callable[[Event], bool]) -> Event:
        return until(transport, wanted)

    def event(self, transport: Transport, kind: type[E], *, seen: list[Event] | None = None) -> E:
        event = until(transport, lambda event: isinstance(event, kind), seen=seen)
        assert isinstance(event, kind)
        return event

    def delivery(self, transport: Transport, topic: str, *, seen: list[Event] | None = None) -> Delivery:
        event = until(transport, lambda event: isinstance(event, Delivery) and event.topic == topic, seen=seen)
        assert isinstance(event, Delivery)
        return event

    def retained(self, transport: Transport, topic: str) -> Delivery:
        event = until(transport, lambda e: isinstance(e, Delivery) and e.topic == topic and e.retained)
        assert isinstance(event, Delivery)
        return event

    def connected(self, transport: Transport) -> Connected:
        return self.event(transport, Connected)

    def acknowledged(self, transport: Transport) -> None:
        """Wait until every publish is acknowledged, without receiving: what was received last stays unacknowledged."""
        deadline_s = time.monotonic() + DEADLINE_S
        while transport.pending():
            time.sleep(0.002)
            assert time.monotonic() < deadline_s, "publishes are still not acknowledged"

    def nothing_pending(self, transport: Transport) -> list[Event]:
        """Wait until every publish is acknowledged and return the events that came meanwhile."""
        deadline_s = time.monotonic() + DEADLINE_S
        seen = []
        while transport.pending():
            seen.append(transport.receive(0.01))
            assert time.monotonic() < deadline_s, "publishes are still not acknowledged"
        return [event for event in seen if event is not None]


@pytest.fixture
def expect() -> Expect:
    return Expect()
