"""MQTT 5 and 3.1.1, the same payload bytes over both: the owner's side of a link.

Two threads. The owner calls `MqttTransport`; its calls go into queues and return. The link's own thread
(`sottovoce.transport.mqtt_link`) alone touches paho and the network.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping

from sottovoce.errors import TransportError
from sottovoce.transport.base import Event
from sottovoce.transport.inbox import Inbox, Receipt
from sottovoce.transport.mqtt_link import GOODBYE_S, Link, Subscribe, Unsubscribe
from sottovoce.transport.mqtt_settings import HEADER_ALLOWANCE_BYTES, MqttSettings, TlsFiles
from sottovoce.transport.outbox import Outbox, Outgoing
from sottovoce.wire.topics import check_filter, check_topic

__all__ = ["MqttSettings", "MqttTransport", "TlsFiles"]


class MqttTransport:
    """A link to an MQTT broker; see `sottovoce.transport.base.Transport` for what the methods promise.

    The link is built in the background from the first `receive` or `publish` on, and again whenever it breaks, so what
    is subscribed before that is in place when Connected comes. A broker that is away is not an error. QoS 0 publishes
    are lost while the link is down; all others wait in the outgoing queue.
    """

    def __init__(
        self, settings: MqttSettings, *, rng: random.Random, now_unix_s: Callable[[], float] = time.time
    ) -> None:
        """Prepare a link; nothing is sent yet.

        Args:
            settings: Where and how.
            rng: For the jitter of reconnects. Only this transport may use it.
            now_unix_s: The best known time, to judge the broker's certificate by (see identity.latest_time).

        Raises:
            ConfigError: A TLS file cannot be used.
        """
        self._settings = settings
        self._inbox = Inbox()
        self._outbox = Outbox(max_messages=settings.queue_messages, max_bytes=settings.queue_bytes)
        self._link = Link(settings, rng, now_unix_s, self._inbox, self._outbox)
        self._receipt: Receipt | None = None
        self._thread = threading.Thread(target=self._link.run, name=f"mqtt-{settings.client_id}", daemon=True)
        self._started = False

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that one publish may carry; smaller once a broker has said that it takes less."""
        packet_limit = self._link.packet_limit
        if packet_limit is None:
            return self._settings.max_payload_bytes
        return max(0, min(self._settings.max_payload_bytes, packet_limit - HEADER_ALLOWANCE_BYTES))

    @property
    def refused(self) -> Mapping[str, int]:
        """How many publishes and subscriptions the broker has refused, by its reason, and how many deliveries were too
        large. Empty when all is well."""
        return dict(self._link.refused)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Queue `payload` for `topic`; an empty retained payload clears the topic.

        Raises:
            TransportError: Larger than `max_payload_bytes`, the outgoing queue is full, or the transport is closed.
            LocalProtocolError: Not a topic.
        """
        check_topic(topic)
        if self._link.stopped is not None:
            raise TransportError(f"the link is closed: {self._link.stopped}")
        if len(payload) > self.max_payload_bytes:
            raise TransportError(
                f"a payload of {len(payload)} bytes is larger than the {self.max_payload_bytes} that the link carries; "
                "cut it into smaller chunks"
            )
        if qos == 0 and not self._link.is_up:
            return
        self._outbox.put(Outgoing(topic, bytes(payload), retain, qos))
        self._start()
        self._link.wake()

    def subscribe(self, topic_filter: str) -> None:
        """Receive what matches `topic_filter` from now on, also after a reconnect.

        Raises:
            LocalProtocolError: Not a topic filter.
        """
        check_filter(topic_filter)
        self._link.command(Subscribe(topic_filter))

    def unsubscribe(self, topic_filter: str) -> None:
        """Stop receiving what matches `topic_filter`; what is already on its way may still come.

        Raises:
            LocalProtocolError: Not a topic filter.
        """
        check_filter(topic_filter)
        self._link.command(Unsubscribe(topic_filter))

    def receive(self, timeout_s: float) -> Event | None:
        """Acknowledge the previous delivery and return the next event, or None after `timeout_s` seconds."""
        if self._receipt is not None:
            self._link.command(self._receipt)
            self._receipt = None
        self._start()
        entry = self._inbox.take(timeout_s)
        if entry is None:
            return None
        event, self._receipt = entry
        return event

    def pending(self) -> int:
        """Number of publishes that the broker has not acknowledged yet."""
        return self._outbox.pending()

    def close(self) -> None:
        """Disconnect in an orderly way (no last will is published) and free everything; may be called twice.

        What is still in the outgoing queue is not sent: wait for `pending() == 0` first if it matters.
        """
        self._link.stop()
        self._start()  # A link that never started ends like any other.
        # A thread inside a TCP connect cannot be woken; it is a daemon and ends by itself within connect_timeout_s.
        self._thread.join(2 * GOODBYE_S)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._thread.start()
