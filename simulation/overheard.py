"""An eavesdropper on the demo's broker: what anybody on the way hears of one device. Keeps a few numbers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from simulation.broker_process import BrokerProcess
from simulation.process_fleet import FLEET
from sottovoce.errors import MalformedMessage
from sottovoce.transport.base import Delivery
from sottovoce.transport.mqtt import MqttTransport
from sottovoce.transport.mqtt_settings import MqttSettings
from sottovoce.wire.chunks import decode_vector_chunk
from sottovoce.wire.topics import Topics


@dataclass(frozen=True, slots=True)
class Overheard:
    """Some entries of one masked vector.

    Attributes:
        device: Whose it was.
        words: The entries, uint32.
    """

    device: str
    words: tuple[int, ...]


class Eavesdropper:
    """Listens to every masked vector on the demo's broker, which has no access rules; keeps a piece of the last one.

    Attributes:
        last: Some entries of the vector heard last, if they lie within its first chunk.
        beginnings: Device -> the first bytes of its newest vector.
    """

    def __init__(self, broker: BrokerProcess, *, offset: int, count: int = 8, keep_bytes: int = 0) -> None:
        """Listen on `broker` from entering on; keep `count` entries from `offset` on (within the first chunk).

        Args:
            broker: Whose traffic.
            offset: Entries before those that are kept as `last`.
            count: How many these are.
            keep_bytes: So much of the beginning of every device's newest vector is kept as `beginnings`.
        """
        self._keep_bytes = keep_bytes
        self.beginnings: dict[str, bytes] = {}
        self._count = count
        self._offset_bytes = 4 * offset
        self._settings = MqttSettings(
            host=broker.host, port=broker.port, protocol=broker.protocol, client_id="eavesdropper", clean_start=True
        )
        self._topics = Topics(FLEET)
        self.last: Overheard | None = None
        self._online_s: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._transport = MqttTransport(self._settings, rng=random.Random())  # only jitters reconnects
        self._transport.subscribe(self._topics.up_chunk("+", "+"))
        self._transport.subscribe(self._topics.status_filter())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.close()

    def listen(self) -> None:
        """Take in everything that has arrived since the last call."""
        while (event := self._transport.receive(0)) is not None:
            if isinstance(event, Delivery):
                self._keep(event)

    def online_after(self, started_s: Mapping[str, float]) -> dict[str, float]:
        """Return how many seconds after its start each device was first seen; `started_s` is on the monotonic clock."""
        return {device: seen - started_s[device] for device, seen in self._online_s.items()}

    def absent(self, started: Iterable[str]) -> int:
        """Return how many of the `started` devices have not been seen yet."""
        self.listen()
        return sum(device not in self._online_s for device in started)

    def heard(self, devices: int) -> bool:
        """Return whether vectors of so many devices have been heard by now."""
        self.listen()
        return len(self.beginnings) >= devices

    def _keep(self, delivery: Delivery) -> None:
        try:
            kind, device, *_ = self._topics.split(delivery.topic)
            if kind == "st":
                self._online_s.setdefault(device, time.monotonic())
                return
            chunk = decode_vector_chunk(delivery.payload)
        except MalformedMessage:
            return  # an eavesdropper shrugs at what it does not understand
        if chunk.index == 0 and self._keep_bytes:
            self.beginnings[device] = bytes(chunk.content[: self._keep_bytes])
        if chunk.index == 0 and len(chunk.content) >= self._offset_bytes + 4 * self._count:
            words = np.frombuffer(chunk.content, dtype="<u4", count=self._count, offset=self._offset_bytes)
            self.last = Overheard(device, tuple(int(word) for word in words))
