"""What the port promises, held by every implementation: memory, MQTT 5 and MQTT 3.1.1 over a real mosquitto."""

from __future__ import annotations

import pytest

from sottovoce.errors import LocalProtocolError, TransportError
from sottovoce.transport.base import Delivery, Disconnected, Event, Will

DIGEST = bytes(range(32))


def test_a_published_payload_arrives_unchanged(harness, expect):
    coordinator, device = harness.connect("coordinator"), harness.connect("pi-1")
    topic = harness.topics.down("pi-1")
    device.subscribe(topic)
    assert expect.connected(device).resumed is False
    payload = bytes(range(256)) * 700
    coordinator.publish(topic, payload)
    assert expect.delivery(device, topic) == Delivery(topic, payload, retained=False)
    expect.nothing_pending(coordinator)


def test_only_what_matches_a_filter_arrives(harness, expect):
    coordinator, device = harness.connect("coordinator"), harness.connect("pi-1")
    device.subscribe(harness.topics.blob_filter(DIGEST))
    device.subscribe(harness.topics.outcome())
    expect.connected(device)
    coordinator.publish(harness.topics.round(), b"not subscribed")
    coordinator.publish(harness.topics.blob_chunk(bytes(32), 0), b"another blob")
    coordinator.publish(harness.topics.blob_chunk(DIGEST, 7), b"chunk")
    coordinator.publish(harness.topics.outcome(), b"last")
    seen: list[Event] = []
    expect.delivery(device, harness.topics.outcome(), seen=seen)
    arrived = [event.topic for event in seen if isinstance(event, Delivery)]
    assert arrived == [harness.topics.blob_chunk(DIGEST, 7)]


def test_a_device_is_heard_by_the_coordinators_wildcards(harness, expect):
    coordinator, device = harness.connect("coordinator"), harness.connect("pi-1")
    for topic_filter in harness.topics.up_filters():
        coordinator.subscribe(topic_filter)
    expect.connected(coordinator)
    device.publish(harness.topics.up_message("pi-1"), b"hello")
    device.publish(harness.topics.up_chunk("pi-1", "r7"), b"chunk")
    assert expect.delivery(coordinator, harness.topics.up_message("pi-1")).payload == b"hello"
    assert expect.delivery(coordinator, harness.topics.up_chunk("pi-1", "r7")).payload == b"chunk"


def test_a_retained_message_waits_for_subscribers_and_can_be_cleared(harness, expect):
    coordinator = harness.connect("coordinator")
    coordinator.publish(harness.topics.round(), b"first", retain=True)
    coordinator.publish(harness.topics.round(), b"second", retain=True)
    coordinator.publish(harness.topics.outcome(), b"gone", retain=True)
    coordinator.publish(harness.topics.outcome(), b"", retain=True)
    expect.nothing_pending(coordinator)
    device = harness.connect("pi-1")
    device.subscribe(harness.topics.outcome())
    device.subscribe(harness.topics.round())
    seen: list[Event] = []
    arrived = expect.delivery(device, harness.topics.round(), seen=seen)
    assert arrived == Delivery(harness.topics.round(), b"second", retained=True)
    assert not [event for event in seen if isinstance(event, Delivery)]


def test_a_delivery_is_acknowledged_by_the_next_receive_and_not_before(harness, expect):
    coordinator, device = harness.connect("coordinator"), harness.connect("pi-1")
    topic = harness.topics.down("pi-1")
    device.subscribe(topic)
    expect.connected(device)
    for payload in (b"one", b"two"):
        coordinator.publish(topic, payload)
    assert expect.delivery(device, topic).payload == b"one"
    assert expect.delivery(device, topic).payload == b"two"  # acknowledges "one"
    device.publish(harness.topics.up_message("pi-1"), b"on the same link, so behind the acknowledgement")
    expect.acknowledged(device)
    harness.kill("pi-1")
    restarted = harness.connect("pi-1")
    coordinator.publish(topic, b"three")
    seen: list[Event] = []
    assert expect.delivery(restarted, topic, seen=seen).payload == b"two"
    assert expect.delivery(restarted, topic).payload == b"three"


def test_messages_for_an_absent_client_wait_for_it(harness, expect):
    coordinator, device = harness.connect("coordinator"), harness.connect("pi-1")
    topic = harness.topics.down("pi-1")
    device.subscribe(topic)
    expect.connected(device)
    device.close()
    for index in range(5):
        coordinator.publish(topic, bytes([index]))
    expect.nothing_pending(coordinator)
    again = harness.connect("pi-1")
    assert [expect.delivery(again, topic).payload for _ in range(5)] == [bytes([index]) for index in range(5)]


def test_the_will_of_a_killed_client_is_published_and_retained(harness, expect):
    topic = harness.topics.status("pi-1")
    coordinator = harness.connect("coordinator")
    coordinator.subscribe(harness.topics.status_filter())
    expect.connected(coordinator)
    device = harness.connect("pi-1", will=Will(topic, b"gone"))
    expect.connected(device)
    device.publish(topic, b"here", retain=True)
    assert expect.delivery(coordinator, topic).payload == b"here"
    harness.kill("pi-1")
    assert expect.delivery(coordinator, topic).payload == b"gone"
    coordinator.unsubscribe(harness.topics.status_filter())
    coordinator.subscribe(topic)
    assert expect.retained(coordinator, topic) == Delivery(topic, b"gone", retained=True)


def test_an_orderly_close_publishes_no_will(harness, expect):
    topic = harness.topics.status("pi-1")
    coordinator = harness.connect("coordinator")
    coordinator.subscribe(harness.topics.status_filter())
    expect.connected(coordinator)
    device = harness.connect("pi-1", will=Will(topic, b"gone"))
    expect.connected(device)
    device.close()
    device.close()
    other = harness.connect("pi-2")
    other.publish(harness.topics.status("pi-2"), b"marker")
    seen: list[Event] = []
    expect.delivery(coordinator, harness.topics.status("pi-2"), seen=seen)
    assert not [event for event in seen if isinstance(event, Delivery)]
    with pytest.raises(TransportError, match="closed"):
        device.publish(topic, b"too late")


def test_nothing_more_arrives_after_unsubscribe(harness, expect):
    coordinator, device = harness.connect("coordinator"), harness.connect("pi-1")
    device.subscribe(harness.topics.round())
    device.subscribe(harness.topics.outcome())
    expect.connected(device)
    coordinator.publish(harness.topics.round(), b"before")
    assert expect.delivery(device, harness.topics.round()).payload == b"before"
    device.unsubscribe(harness.topics.round())
    device.subscribe(harness.topics.down("pi-1"))
    coordinator.publish(harness.topics.down("pi-1"), b"subscribed after the unsubscribe", retain=True)
    expect.delivery(device, harness.topics.down("pi-1"))
    coordinator.publish(harness.topics.round(), b"after")
    coordinator.publish(harness.topics.outcome(), b"marker")
    seen: list[Event] = []
    expect.delivery(device, harness.topics.outcome(), seen=seen)
    assert harness.topics.round() not in [event.topic for event in seen if isinstance(event, Delivery)]


def test_a_payload_larger_than_the_limit_is_refused_at_once(harness, expect):
    coordinator = harness.connect("coordinator")
    with pytest.raises(TransportError, match="larger"):
        coordinator.publish(harness.topics.round(), bytes(coordinator.max_payload_bytes + 1))
    coordinator.publish(harness.topics.round(), bytes(coordinator.max_payload_bytes))
    expect.nothing_pending(coordinator)


@pytest.mark.parametrize("topic", ["", "sv1/+/all/round", "sv1/#", "a\0b", "x" * 65_536])
def test_what_is_not_a_topic_is_refused_at_once(harness, topic):
    with pytest.raises(LocalProtocolError):
        harness.connect("coordinator").publish(topic, b"")


@pytest.mark.parametrize("topic_filter", ["", "sv1/#/x", "sv1/a+", "sv1/a#", "a\0b"])
def test_what_is_not_a_topic_filter_is_refused_at_once(harness, topic_filter):
    with pytest.raises(LocalProtocolError):
        harness.connect("coordinator").subscribe(topic_filter)


def test_a_cut_link_comes_back_with_its_session_and_its_queue(harness, expect):
    coordinator, device = harness.connect("coordinator"), harness.connect("pi-1")
    topic = harness.topics.down("pi-1")
    device.subscribe(topic)
    expect.connected(device)
    harness.unplug("pi-1")
    assert expect.event(device, Disconnected).fatal is False
    device.publish(harness.topics.up_message("pi-1"), b"queued while away")
    device.subscribe(harness.topics.round())
    assert device.pending() == 1
    coordinator.subscribe(harness.topics.up_filters()[0])
    expect.connected(coordinator)
    coordinator.publish(topic, b"sent while away")
    coordinator.publish(harness.topics.round(), b"retained while away", retain=True)
    expect.nothing_pending(coordinator)
    harness.plug("pi-1")
    arrived = {expect.event(device, Delivery).payload for _ in range(2)}
    assert arrived == {b"sent while away", b"retained while away"}
    assert expect.delivery(coordinator, harness.topics.up_message("pi-1")).payload == b"queued while away"
    expect.nothing_pending(device)


def test_a_restarted_broker_has_kept_sessions_and_retained_messages(harness, expect):
    coordinator, device = harness.connect("coordinator"), harness.connect("pi-1")
    device.subscribe(harness.topics.down("pi-1"))
    expect.connected(device)
    expect.connected(coordinator)
    coordinator.publish(harness.topics.round(), b"kept", retain=True)
    expect.nothing_pending(coordinator)
    harness.restart_broker()
    seen: list[Event] = []
    assert expect.connected(device).resumed is True
    expect.connected(coordinator)
    coordinator.publish(harness.topics.down("pi-1"), b"after the restart")
    assert expect.delivery(device, harness.topics.down("pi-1"), seen=seen).payload == b"after the restart"
    device.subscribe(harness.topics.round())
    assert expect.delivery(device, harness.topics.round()).payload == b"kept"


def test_receive_without_anything_returns_none_in_time(harness, expect):
    device = harness.connect("pi-1")
    expect.connected(device)
    assert device.receive(0) is None
    assert device.receive(0.01) is None
