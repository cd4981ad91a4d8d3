"""The link to an MQTT broker through paho: connections, one after the other, in a thread of its own.

That thread is the only one that ever touches paho, so paho needs no lock and its callbacks only note what happened.
paho's own reconnect loop is not used: it has no jitter, resends for ever what the broker never takes, and its `select`
ends at 340 clients.
"""

from __future__ import annotations

import contextlib
import queue
import random
import selectors
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from paho.mqtt import MQTTException
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import LogLevel
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from sottovoce.errors import TransportError
from sottovoce.transport.base import Delivery
from sottovoce.transport.bell import Bell
from sottovoce.transport.diagnosis import Facts, diagnose, diagnose_tls
from sottovoce.transport.inbox import Inbox, Receipt
from sottovoce.transport.mqtt_client import new_client
from sottovoce.transport.mqtt_settings import MqttSettings, check_broker_validity
from sottovoce.transport.outbox import Outbox, Outgoing
from sottovoce.transport.reconnection import Ending, FullJitter, Persistence

_TICK_S = 1.0
GOODBYE_S = 1.0
_NO_MQTT = (MQTTException, ValueError, KeyError, IndexError, struct.error)


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Command: subscribe to this filter, now and after every reconnect."""

    topic_filter: str


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Command: unsubscribe from this filter."""

    topic_filter: str


Command: TypeAlias = Subscribe | Unsubscribe | Receipt


class Link:
    """Owns paho and the connection; everything but `command`, `wake` and `stop` runs in its own thread.

    Attributes:
        is_up: The broker has let us in and the connection lives.
        packet_limit: The broker's Maximum Packet Size as last announced, or None.
        refused: What the broker refused, and what it delivered that is too large, by reason.
        stopped: Why there will be no further connection, or None.
    """

    def __init__(
        self,
        settings: MqttSettings,
        rng: random.Random,
        now_unix_s: Callable[[], float],
        inbox: Inbox,
        outbox: Outbox,
    ) -> None:
        self._settings = settings
        self._now_unix_s = now_unix_s
        self._inbox = inbox
        self._outbox = outbox
        self._jitter = FullJitter(rng, min_s=settings.backoff_min_s, max_s=settings.backoff_max_s)
        self._persistence = Persistence(settings.client_id)
        self._client = new_client(settings)
        self._set_callbacks()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._bell = Bell()
        self._wanted: dict[str, None] = {}
        self._confirmed: set[str] = set()
        self._session_lost = False
        self.is_up = False
        self.packet_limit: int | None = None
        self.refused: Counter[str] = Counter()
        self.stopped: str | None = None
        self._number = 0
        self._in_flight: dict[int, Outgoing] = {}
        self._reset()

    def _reset(self) -> None:
        """Forget the last connection."""
        self._number += 1
        self._announced = False
        self._requested: dict[int, str] = {}
        self._facts = Facts(time.monotonic())
        self._send_limit = self._settings.send_maximum

    # --- called by the owner's thread ---

    def command(self, command: Command) -> None:
        """Have `command` carried out soon; subscriptions are remembered, receipts of a lost connection are dropped."""
        self._commands.put(command)
        self.wake()

    def wake(self) -> None:
        """Say that there is something in a queue."""
        self._bell.ring()

    def stop(self) -> None:
        """End the connection in an orderly way, and the thread."""
        self.stopped = self.stopped or "closed by its owner"
        self._bell.ring()

    # --- the life of the link ---

    def run(self) -> None:
        """Connect again and again until stopped."""
        try:
            while self.stopped is None:
                ending = self._one_connection()
                if self.stopped is not None:
                    return
                reason, final = self._persistence.verdict(ending)
                self.stopped = reason if final else None
                self._inbox.link_down(reason, fatal=final)
                if not final:
                    self._rest(self._jitter.next_wait_s(link_lasted_s=ending.lasted_s))
        finally:
            if self.stopped is None:  # An exception, hence a bug: the owner must not wait for ever.
                self.stopped = "the thread of the link has crashed"
                self._inbox.link_down(self.stopped, fatal=True)
            self._bell.close()

    def _one_connection(self) -> Ending:
        """Connect, move messages until the connection ends, and return how it ended."""
        self._reset()
        where = f"the broker at {self._settings.host}:{self._settings.port}"
        try:
            self._client.reconnect()
            self._serve()
        except TransportError as error:
            return Ending(str(error), time.monotonic())
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
            pass  # Hung up in the middle of the TLS handshake: diagnosed like any connection without an answer.
        except ssl.SSLError as error:
            return diagnose_tls(error, where=where, now_s=time.monotonic())
        except (OSError, UnicodeError) as error:
            return Ending(f"{where} cannot be reached: {error}", time.monotonic(), reached=False)
        finally:
            self._hang_up()
            self._after_connection()
        return diagnose(self._facts, where=where, now_s=time.monotonic())

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            connection = self._client.socket()
            assert isinstance(connection, socket.socket), "reconnect() succeeded over TCP"
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while self._client.socket() is not None:
                if self.stopped is not None:
                    return self._say_goodbye()
                self._move(selector, connection)

    def _move(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        """Wait for something to do, then do all of it."""
        writing = selectors.EVENT_WRITE if self._client.want_write() else 0
        selector.modify(connection, selectors.EVENT_READ | writing)
        # Bytes that TLS has decrypted already are invisible to the selector.
        buffered = isinstance(connection, ssl.SSLSocket) and connection.pending() > 0
        ready = {key.fileobj: events for key, events in selector.select(0 if buffered else _TICK_S)}
        if self._bell in ready:
            self._bell.clear()
        if buffered or ready.get(connection, 0) & selectors.EVENT_READ:
            self._read()
        self._send_queued()
        if self._client.want_write():
            self._client.loop_write()
            self._send_queued()  # What needs no acknowledgement is done once it is written, and makes room.
        self._client.loop_misc()
        unanswered_s = time.monotonic() - self._facts.started_s
        if self._facts.connack_code is None and unanswered_s > self._settings.connect_timeout_s:
            self._facts.silent = True
            self._hang_up()

    def _read(self) -> None:
        try:
            self._client.loop_read()
        except _NO_MQTT as error:
            self._hang_up()
            self._facts.last_words = f"the broker sent something that is not MQTT: {error}"

    def _send_queued(self) -> None:
        """Carry out the owner's commands; send as many publishes as may be on their way."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._obey(self._commands.get_nowait())
        while self.is_up and len(self._in_flight) < self._send_limit:
            message = self._outbox.take()
            if message is None:
                return
            if self.packet_limit is not None and message.packet_bytes > self.packet_limit:
                self._give_up(message)  # Queued before this broker said how little it takes.
            else:
                sent = self._client.publish(message.topic, message.payload, qos=message.qos, retain=message.retain)
                self._in_flight[sent.mid] = message

    def _obey(self, command: Command) -> None:
        match command:
            case Subscribe(topic_filter):
                self._wanted[topic_filter] = None
                if self.is_up:
                    self._request(topic_filter)
            case Unsubscribe(topic_filter):
                self._wanted.pop(topic_filter, None)
                if self.is_up:
                    self._withdraw(topic_filter)
            case Receipt(link, message_id):
                if self.is_up and link == self._number:
                    self._client.ack(message_id, 1)

    def _request(self, topic_filter: str) -> None:
        _, message_id = self._client.subscribe(topic_filter, qos=1)
        if message_id is not None:
            self._requested[message_id] = topic_filter

    def _withdraw(self, topic_filter: str) -> None:
        self._confirmed.discard(topic_filter)
        self._client.unsubscribe(topic_filter)

    def _give_up(self, message: Outgoing) -> None:
        self._outbox.finish(message)
        self.refused["larger than the broker's Maximum Packet Size"] += 1

    def _announce_when_subscribed(self) -> None:
        if self.is_up and not self._announced and not self._requested:
            self._announced = True
            self._inbox.link_up(resumed=not self._session_lost)
            self._session_lost = False

    # --- the end of a connection ---

    def _after_connection(self) -> None:
        """Leave the queues in a state from which the next connection can go on."""
        self.is_up = False
        self._facts.unacknowledged = bool(self._in_flight)
        for message_id, message in list(self._in_flight.items()):
            if message.qos == 0:
                self._outbox.finish(self._in_flight.pop(message_id))
        if self._facts.too_large and self._in_flight:
            largest = max(self._in_flight.values(), key=lambda message: message.packet_bytes)
            self._take_back_in_flight({largest})

    def _take_back_in_flight(self, hopeless: set[Outgoing]) -> None:
        """Keep paho from resending for ever what the broker never takes; everything else waits again, in order."""
        self._client.drop_out_messages()
        for message in hopeless:
            self._give_up(message)
        self._outbox.put_back([message for message in self._in_flight.values() if message not in hopeless])
        self._in_flight.clear()

    def _hang_up(self) -> None:
        """Close the socket, if it is open, without a word."""
        connection = self._client.socket()
        if isinstance(connection, socket.socket):
            connection.close()
            self._client.loop_read()  # Fails at once, whereby paho learns that the socket is closed.

    def _say_goodbye(self) -> None:
        """Tell the broker that we leave, so that it publishes no last will."""
        self._client.disconnect()
        deadline_s = time.monotonic() + GOODBYE_S
        with selectors.DefaultSelector() as selector:
            while (connection := self._client.socket()) is not None and time.monotonic() < deadline_s:
                self._client.loop_write()
                if isinstance(connection, socket.socket) and self._client.socket() is not None:
                    selector.register(connection, selectors.EVENT_WRITE)
                    selector.select(deadline_s - time.monotonic())
                    selector.unregister(connection)

    def _rest(self, wait_s: float) -> None:
        """Wait `wait_s` seconds, or until stopped."""
        deadline_s = time.monotonic() + wait_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._bell, selectors.EVENT_READ)
            while self.stopped is None and (left_s := deadline_s - time.monotonic()) > 0:
                if selector.select(left_s):
                    self._bell.clear()

    # --- paho's callbacks: note what happened and return ---

    def _set_callbacks(self) -> None:
        client = self._client
        client.on_socket_open = self._on_socket_open
        # Having this callback keeps paho from writing to the socket inside other calls.
        client.on_socket_register_write = lambda *_: None
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_log = self._on_log

    def _on_socket_open(self, client: Client, userdata: Any, connection: Any) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if isinstance(connection, ssl.SSLSocket):
            check_broker_validity(connection, self._now_unix_s())

    def _on_connect(
        self, client: Client, userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._facts.connack_code, self._facts.connack_text = reason.value, str(reason)
        if reason.is_failure:
            return
        self._facts.started_s = time.monotonic()
        self.packet_limit = getattr(properties, "MaximumPacketSize", None)
        self._send_limit = min(self._settings.send_maximum, getattr(properties, "ReceiveMaximum", 65_535))
        limit = self.packet_limit
        too_large = {m for m in self._in_flight.values() if limit is not None and m.packet_bytes > limit}
        if too_large:
            self._take_back_in_flight(too_large)
        if flags.session_present:
            self._inbox.drop_unacknowledged()
        else:
            self._session_lost = True
            self._confirmed.clear()
        self.is_up = True
        for topic_filter in self._wanted:
            if topic_filter not in self._confirmed:
                self._request(topic_filter)
        for topic_filter in self._confirmed - self._wanted.keys():
            self._withdraw(topic_filter)
        self._announce_when_subscribed()

    def _on_disconnect(
        self, client: Client, userdata: Any, flags: DisconnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self.is_up = False
        self._facts.farewell_code, self._facts.farewell_text = reason.value, str(reason)
        self._facts.from_broker = flags.is_disconnect_packet_from_server

    def _on_subscribe(
        self, client: Client, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        topic_filter = self._requested.pop(mid, None)
        if topic_filter is not None and topic_filter in self._wanted:
            self._confirmed.add(topic_filter)
        for reason in reasons:
            if reason.is_failure:
                self.refused[f"subscription: {reason}"] += 1
        self._announce_when_subscribed()

    def _on_publish(
        self, client: Client, userdata: Any, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        message = self._in_flight.pop(mid, None)
        if message is not None:
            self._outbox.finish(message)
            if reason.is_failure:
                self.refused[str(reason)] += 1

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # Nobody can act on it, so it is not delivered; unacknowledged it would come again.
            client.ack(message.mid, message.qos)
            return
        if len(message.payload) > self._settings.max_payload_bytes:  # Over 3.1.1 no broker can be told to keep it.
            self.refused["a delivery larger than max_payload_bytes"] += 1
            client.ack(message.mid, message.qos)
            return
        receipt = Receipt(self._number, message.mid) if message.qos > 0 else None
        self._inbox.deliver(Delivery(topic, bytes(message.payload), message.retain), receipt)

    def _on_log(self, client: Client, userdata: Any, level: int, text: str) -> None:
        if level == LogLevel.MQTT_LOG_ERR:
            self._facts.last_words = text
