"""The two queues between a link and its owner."""

from __future__ import annotations

import threading

import pytest

from sottovoce.errors import TransportError
from sottovoce.transport.base import Connected, Delivery, Disconnected
from sottovoce.transport.inbox import Inbox, Receipt
from sottovoce.transport.outbox import Outbox, Outgoing


def delivery(content: bytes) -> Delivery:
    return Delivery("t", content, retained=False)


def events(inbox: Inbox) -> list[object]:
    taken = []
    while (entry := inbox.take(0)) is not None:
        taken.append(entry[0])
    return taken


def message(size: int = 1, qos: int = 1) -> Outgoing:
    return Outgoing("sv1/f/up/a/0/m", bytes(size), False, qos)


def test_events_come_in_order_with_their_receipts():
    inbox = Inbox()
    inbox.link_up(resumed=False)
    inbox.deliver(delivery(b"1"), Receipt(1, 7))
    inbox.deliver(delivery(b"2"), None)
    assert inbox.take(0) == (Connected(resumed=False), None)
    assert inbox.take(0) == (delivery(b"1"), Receipt(1, 7))
    assert inbox.take(0) == (delivery(b"2"), None)
    assert inbox.take(0) is None


def test_a_waiting_owner_is_woken_by_another_thread():
    inbox = Inbox()
    threading.Thread(target=inbox.link_down, args=("gone",)).start()
    assert inbox.take(10) == (Disconnected("gone"), None)


def test_many_outages_leave_one_word_and_never_hide_a_lost_session():
    inbox = Inbox()
    for number in range(1000):
        inbox.link_down(f"outage {number}")
        inbox.link_up(resumed=number != 500)
    assert events(inbox) == [Disconnected("outage 999"), Connected(resumed=False)]


def test_a_final_outage_is_told_after_the_connection_before_it():
    inbox = Inbox()
    inbox.link_up(resumed=True)
    inbox.link_down("first")
    inbox.link_down("stopped", fatal=True)
    assert events(inbox) == [Connected(resumed=True), Disconnected("stopped", fatal=True)]


def test_what_comes_again_is_dropped_and_telemetry_is_not():
    inbox = Inbox()
    inbox.deliver(delivery(b"comes again"), Receipt(1, 1))
    inbox.deliver(delivery(b"telemetry"), None)
    inbox.drop_unacknowledged()
    inbox.deliver(delivery(b"comes again"), Receipt(2, 1))
    assert events(inbox) == [delivery(b"telemetry"), delivery(b"comes again")]


def test_only_telemetry_is_dropped_when_the_owner_is_busy():
    inbox = Inbox(telemetry_limit=3)
    for index in range(5):
        inbox.deliver(delivery(bytes([index])), None)
    inbox.deliver(delivery(b"kept"), Receipt(1, 1))
    assert events(inbox) == [delivery(b"\0"), delivery(b"\1"), delivery(b"\2"), delivery(b"kept")]


def test_the_bytes_that_wait_are_bounded_and_freed():
    """A broker need not keep to any number: a thousand deliveries of a megabyte must not fill a Pi."""
    inbox = Inbox(telemetry_bytes=100, most_bytes=200)
    small, large = delivery(bytes(30)), delivery(bytes(80))
    for _ in range(5):
        inbox.deliver(small, None)
    kept = len(small.topic) + 30
    fitting = 100 // kept
    assert 1 <= fitting < 5
    for number in range(5):
        inbox.deliver(large, Receipt(1, number))
    waiting = events(inbox)
    assert waiting.count(small) == fitting
    assert waiting.count(large) == (200 - fitting * kept) // (len(large.topic) + 80) >= 1
    inbox.deliver(small, None)
    assert events(inbox) == [small], "what was taken makes room"


def test_what_comes_again_makes_room_at_once():
    inbox = Inbox(telemetry_bytes=100, most_bytes=200)
    inbox.deliver(delivery(bytes(150)), Receipt(1, 1))
    inbox.drop_unacknowledged()
    inbox.deliver(delivery(b"telemetry"), None)
    inbox.deliver(delivery(b"more"), None)
    assert events(inbox) == [delivery(b"telemetry"), delivery(b"more")]


def test_what_is_on_its_way_still_counts():
    outbox = Outbox(max_messages=2, max_bytes=100)
    outbox.put(message())
    outbox.put(message())
    taken = outbox.take()
    assert taken is not None
    assert outbox.pending() == 2
    with pytest.raises(TransportError, match="full"):
        outbox.put(message())
    outbox.finish(taken)
    outbox.put(message())
    assert outbox.pending() == 2


def test_bytes_are_bounded_and_freed():
    outbox = Outbox(max_messages=100, max_bytes=100)
    outbox.put(message(60))
    with pytest.raises(TransportError, match="60 bytes"):
        outbox.put(message(41))
    first = outbox.take()
    assert first is not None
    outbox.finish(first)
    outbox.put(message(100))


def test_what_is_put_back_goes_first_and_in_order():
    outbox = Outbox(max_messages=10, max_bytes=100)
    sizes = (1, 2, 3, 4)
    for size in sizes:
        outbox.put(message(size))
    taken = [outbox.take(), outbox.take()]
    outbox.put_back([each for each in taken if each is not None])
    assert [len(each.payload) for _ in sizes if (each := outbox.take()) is not None] == [1, 2, 3, 4]
    assert outbox.take() is None


def test_the_packet_size_is_an_upper_bound():
    assert message(1000).packet_bytes >= 1000 + len("sv1/f/up/a/0/m") + 2 + 2 + 1 + 3
