"""What the memory broker does on demand: loss, duplication, reordering, rights, outages, threads."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.errors import TransportError
from sottovoce.transport.base import Connected, Delivery, Disconnected, Will
from sottovoce.transport.memory import MemoryBroker, MemoryTransport
from sottovoce.wire.topics import Topics

TOPICS = Topics("f")
DOWN = TOPICS.down("pi-1")


def pair(broker: MemoryBroker) -> tuple[MemoryTransport, MemoryTransport]:
    coordinator, device = MemoryTransport(broker, "coordinator"), MemoryTransport(broker, "pi-1")
    device.subscribe(DOWN)
    assert device.receive(0) == Connected(resumed=False)
    return coordinator, device


def everything(broker: MemoryBroker, transport: MemoryTransport) -> list[bytes]:
    payloads = []
    while True:
        event = transport.receive(0)
        if isinstance(event, Delivery):
            payloads.append(event.payload)
        elif event is None and not broker.queued(transport.client_id):
            return payloads


faults = st.floats(0, 0.8)


@given(seed=st.integers(0, 2**32), loss=faults, duplicate=faults, reorder=faults, count=st.integers(0, 30))
def test_at_least_once_survives_every_fault(seed, loss, duplicate, reorder, count):
    broker = MemoryBroker(random.Random(seed), loss=loss, duplicate=duplicate, reorder=reorder)
    coordinator, device = MemoryTransport(broker, "coordinator"), MemoryTransport(broker, "pi-1")
    device.subscribe(DOWN)
    while not isinstance(device.receive(0), Connected):
        pass
    coordinator.receive(0)
    for index in range(count):
        coordinator.publish(DOWN, bytes([index]))
    assert set(everything(broker, device)) == {bytes([index]) for index in range(count)}


def run(**how: float) -> list[bytes]:
    broker = MemoryBroker(random.Random(5), **how)
    coordinator, device = pair(broker)
    coordinator.receive(0)
    for index in range(50):
        coordinator.publish(DOWN, bytes([index]))
    return everything(broker, device)


def test_each_fault_does_what_it_says_and_repeatably():
    in_order = [bytes([index]) for index in range(50)]
    assert run() == in_order
    assert len(run(duplicate=0.5)) > 60
    assert sorted(run(reorder=0.5)) == in_order != run(reorder=0.5)
    assert sorted(run(loss=0.5)) == in_order != run(loss=0.5)
    assert run(loss=0.3, duplicate=0.3, reorder=0.3) == run(loss=0.3, duplicate=0.3, reorder=0.3)


def test_telemetry_is_lost_for_good():
    broker = MemoryBroker(random.Random(5), loss=0.5)
    coordinator, device = MemoryTransport(broker, "coordinator"), MemoryTransport(broker, "pi-1")
    coordinator.subscribe(TOPICS.up_filters()[0])
    for index in range(100):
        device.publish(TOPICS.up_message("pi-1"), bytes([index]), qos=0)
    device.receive(0)
    assert 30 < len(everything(broker, coordinator)) < 70
    broker.disconnect("pi-1")
    device.publish(TOPICS.up_message("pi-1"), b"lost", qos=0)
    assert device.pending() == 0


def test_a_device_uses_only_its_own_topics():
    broker = MemoryBroker(random.Random(1))
    coordinator, device = pair(broker)
    other = MemoryTransport(broker, "pi-2")
    for topic_filter in (DOWN, "sv1/f/dn/#", "#", TOPICS.up_message("+", "+")):
        other.subscribe(topic_filter)
    other.receive(0)
    coordinator.receive(0)
    coordinator.subscribe("sv1/#")
    for topic in (TOPICS.up_message("pi-1"), TOPICS.status("pi-1"), TOPICS.round(), TOPICS.down("pi-2"), DOWN):
        other.publish(topic, b"forged", retain=True)
    device.publish(TOPICS.up_message("pi-1"), b"mine")
    coordinator.publish(DOWN, b"for pi-1 only")
    assert everything(broker, other) == []
    assert everything(broker, device) == [b"for pi-1 only"]
    assert everything(broker, coordinator) == [b"mine", b"for pi-1 only"]
    assert broker.retained() == {}
    assert broker.denied["pi-2"] >= 5


def test_a_second_client_of_one_id_ends_the_first_for_good():
    broker = MemoryBroker(random.Random(1))
    _, first = pair(broker)
    second = MemoryTransport(broker, "pi-1")
    ended = first.receive(0)
    assert isinstance(ended, Disconnected)
    assert ended.fatal
    assert first.receive(0) is None
    with pytest.raises(TransportError):
        first.publish(TOPICS.status("pi-1"), b"")
    assert second.receive(0) == Connected(resumed=True)


def test_a_will_is_published_once_and_not_by_a_restart():
    broker = MemoryBroker(random.Random(1))
    MemoryTransport(broker, "pi-1", will=Will(TOPICS.status("pi-1"), b"gone"))
    broker.restart()
    assert broker.retained() == {}
    broker.disconnect("pi-1")
    broker.disconnect("pi-1")
    assert broker.retained() == {TOPICS.status("pi-1"): b"gone"}


def test_a_broker_that_lost_its_state_is_noticed_and_subscribed_to_again():
    broker = MemoryBroker(random.Random(1))
    coordinator, device = pair(broker)
    coordinator.publish(TOPICS.round(), b"announced", retain=True)
    broker.restart(keep_state=False)
    assert broker.retained() == {}
    assert isinstance(device.receive(0), Disconnected)
    assert device.receive(0) == Connected(resumed=False)
    coordinator.publish(DOWN, b"again")
    assert everything(broker, device) == [b"again"]


def test_a_thread_waits_for_a_message_and_for_a_lossy_one():
    broker = MemoryBroker(random.Random(5), loss=0.9)
    coordinator, device = MemoryTransport(broker, "coordinator"), MemoryTransport(broker, "pi-1")
    device.subscribe(DOWN)
    assert device.receive(10) == Connected(resumed=False)
    received: list[object] = []
    waiting = threading.Thread(target=lambda: received.append(device.receive(10)))
    waiting.start()
    coordinator.publish(DOWN, b"hello")
    waiting.join(10)
    assert received == [Delivery(DOWN, b"hello", retained=False)]


def test_a_waiting_thread_learns_of_a_takeover():
    broker = MemoryBroker(random.Random(5))
    _, device = pair(broker)
    received: list[object] = []
    waiting = threading.Thread(target=lambda: received.append(device.receive(10)))
    waiting.start()
    MemoryTransport(broker, "pi-1")
    waiting.join(10)
    assert [event.fatal for event in received if isinstance(event, Disconnected)] == [True]


def test_only_those_who_have_something_to_receive_are_waiting():
    broker = MemoryBroker(random.Random(0))
    coordinator, device = pair(broker)
    assert broker.waiting() == ["coordinator"]
    coordinator.receive(0)
    assert broker.waiting() == []
    coordinator.publish(DOWN, b"a question")
    assert broker.waiting() == ["pi-1"]
    broker.disconnect("pi-1")
    assert broker.waiting() == []
    assert isinstance(device.receive(0), Disconnected)


def test_an_expired_session_has_lost_its_queue_and_hears_what_is_retained_again():
    broker = MemoryBroker(random.Random(0))
    coordinator, device = pair(broker)
    device.subscribe(TOPICS.round())
    coordinator.publish(TOPICS.round(), b"announcement", retain=True)
    assert everything(broker, device) == [b"announcement"]
    broker.disconnect("pi-1")
    coordinator.publish(DOWN, b"missed")
    broker.reconnect("pi-1", resumed=False)
    assert isinstance(device.receive(0), Disconnected)
    assert device.receive(0) == Connected(resumed=False)
    assert device.receive(0) == Delivery(TOPICS.round(), b"announcement", retained=True)
    assert device.receive(0) is None
    coordinator.publish(DOWN, b"a question")
    assert everything(broker, device) == [b"a question"]
