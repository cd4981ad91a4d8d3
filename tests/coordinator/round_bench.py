"""One round on a bench: the real machine and scripted devices, message by message."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from choir import AT, COORDINATOR, FLEET, Choir
from scripted_devices import ANNOUNCEMENT, STATE, ScriptedDevice, make_plan, values_of

from coordinator.phases import Abandoned, Agenda, Committed, Effect, Send, Terms
from coordinator.presence import Presence
from coordinator.round import Round
from sottovoce.errors import CryptoError, RemoteProtocolError
from sottovoce.identity import SignedContext
from sottovoce.plan import Plan
from sottovoce.types import Array
from sottovoce.wire.chunks import VectorChunk
from sottovoce.wire.codec import Opened, open_envelope, parse, seal
from sottovoce.wire.messages import Message

START_MS = round(AT.timestamp() * 1000)


class Bench:
    """A `Round` and scripted devices, message by message, with a clock that only the test moves."""

    def __init__(self, choir: Choir, count: int = 6, *, plan: Plan | None = None, **terms: Any) -> None:
        self.choir = choir
        self.plan = plan or make_plan()
        self.now_ms = START_MS
        names = choir.names(count)
        settled = {"goal": count, "minimum": 3, "wanted": count, **terms}
        self.terms = Terms(
            selection_closes_ms=START_MS + 60_000,
            rendezvous_ms=START_MS + 600_000,
            stage_ms=10_000,
            **settled,
        )
        self.agenda = Agenda(FLEET, COORDINATOR, 4, 1, ANNOUNCEMENT, self.plan, STATE)
        presence = Presence(online=names, offline=(), now_ms=START_MS, grace_ms=1000)
        entropy = random.Random("round").randbytes
        self.round = Round(self.agenda, self.terms, presence=presence, entropy=entropy, now_ms=START_MS)
        self.devices = {
            name: ScriptedDevice(choir.devices[name], choir, self.plan, values_of(number))
            for number, name in enumerate(names)
        }
        self.effects: list[Effect] = []
        self.refused: list[str] = []
        self.deferred: deque[tuple[str, Message | VectorChunk, bytes]] = deque()

    def opened(self, device: str, message: Message, *, session: bytes = bytes(32), **context: Any) -> Opened[Any]:
        """What the codec makes of `message` from `device`, through the real envelope."""
        identity = self.choir.devices[device]
        where = {"round": self.agenda.round, "attempt": self.agenda.attempt, **context}
        signed = SignedContext(device, COORDINATOR, FLEET, session=session, **where)
        payload = seal(message, identity, signed)
        return open_envelope(parse(payload), identity.certificate, payload)

    def say(self, device: str, message: Message | VectorChunk, session: bytes = bytes(32)) -> None:
        """Deliver one message of a device and everything that follows from it."""
        self.deferred.append((device, message, session))
        self.settle()

    def settle(self) -> None:
        """Deliver whatever is on its way until nobody has anything to say."""
        while self.deferred:
            device, message, session = self.deferred.popleft()
            try:
                if isinstance(message, VectorChunk):
                    effects = self.round.receive_chunk(device, message, self.now_ms)
                else:
                    effects = self.round.receive(self.opened(device, message, session=session), self.now_ms)
            except (RemoteProtocolError, CryptoError) as error:
                self.refused.append(error.reason)
                continue
            self.perform(effects)

    def perform(self, effects: list[Effect]) -> None:
        """Deliver the round's messages to the devices; their answers are queued."""
        self.effects += effects
        for effect in effects:
            if isinstance(effect, Send):
                context = SignedContext(
                    COORDINATOR, effect.device, FLEET, self.agenda.round, self.agenda.attempt, effect.session
                )
                device = self.devices[effect.device]
                for answer, session in device.receive(effect.message, context):
                    if isinstance(answer, Message):
                        device.said.append((answer, session))
                    self.deferred.append((effect.device, answer, session))

    def check_in(self, devices: Iterable[str] | None = None) -> None:
        """Let `devices` (all by default) check in."""
        for device in list(self.devices) if devices is None else devices:
            self.say(device, self.devices[device].check_in())

    def expected_mean(self, survivors: list[str]) -> Array:
        """What the update of these devices must come to, in float64."""
        devices = [self.devices[name] for name in survivors]
        weights = np.array([min(device.weight, 10) for device in devices], np.float64)
        updates = [device.values["delta"][0].astype(np.float64) for device in devices]
        return np.asarray(np.average(updates, axis=0, weights=weights))

    def wait(self, milliseconds: int) -> None:
        """Let time pass."""
        self.now_ms += milliseconds
        self.perform(self.round.tick(self.now_ms))
        self.settle()

    def offline(self, device: str) -> None:
        """Tell the round that `device` is gone."""
        self.perform(self.round.device_status(device, False, self.now_ms))
        self.settle()

    def sent(self, kind: type[Message]) -> list[str]:
        """Who was sent a message of this type."""
        return [
            effect.device for effect in self.effects if isinstance(effect, Send) and isinstance(effect.message, kind)
        ]

    @property
    def committed(self) -> Committed:
        assert isinstance(self.round.phase, Committed), self.round.phase
        return self.round.phase

    @property
    def abandoned(self) -> Abandoned:
        assert isinstance(self.round.phase, Abandoned), self.round.phase
        return self.round.phase


MakeBench = Callable[..., Bench]
