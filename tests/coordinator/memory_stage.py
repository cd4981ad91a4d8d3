"""A whole coordinator over the memory broker, and scripted devices that it speaks with."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from choir import Choir
from scripted_devices import ScriptedDevice, device_for

from coordinator.events import EventLog
from coordinator.journal import Journal
from coordinator.sequence import Setup
from coordinator.service import Service
from coordinator.settings import UploadSettings
from coordinator.task import read_task
from sottovoce.blobs import digest_of
from sottovoce.identity import SignedContext
from sottovoce.plan import Plan, decode_plan
from sottovoce.tensors import decode_tensors
from sottovoce.transport.base import Delivery
from sottovoce.transport.blobs import BlobFetcher, Fetched, Subscribe, Unsubscribe
from sottovoce.transport.memory import MemoryBroker, MemoryTransport
from sottovoce.wire.chunks import VectorChunk, encode_vector_chunk
from sottovoce.wire.codec import ALL, open_envelope, parse, seal
from sottovoce.wire.messages import Announcement, Message, Outcome, Status
from sottovoce.wire.topics import NO_ROUTE, Topics


class Player:
    """A scripted device on the broker: fetches plan and state, then lets `ScriptedDevice` speak."""

    def __init__(self, broker: MemoryBroker, choir: Choir, name: str) -> None:
        self.identity = choir.devices[name]
        self.name = name
        self.choir = choir
        self.topics = Topics(choir.anchor.fleet)
        self.transport = MemoryTransport(broker, name)
        self.fetcher = BlobFetcher(self.topics)
        self.scripted: Callable[[Plan, bytes], ScriptedDevice] = functools.partial(device_for, choir, name)
        self.device: Any = None
        self.announcement: tuple[Announcement, SignedContext, bytes] | None = None
        self.blobs: dict[bytes, bytes] = {}
        self.outcomes: list[Outcome] = []
        self.announced: list[tuple[int, int]] = []
        self.silent_at: type[Message] | None = None
        self.silent = False
        self.note: Callable[[], object] = lambda: None
        for topic in (self.topics.round(), self.topics.outcome(), self.topics.down(name)):
            self.transport.subscribe(topic)
        self.say_status(online=True)

    def say_status(self, *, online: bool) -> None:
        context = SignedContext(self.name, ALL, self.topics.fleet)
        payload = seal(Status(online=online, version="test"), self.identity, context)
        self.transport.publish(self.topics.status(self.name), payload, retain=True)

    def step(self) -> bool:
        self.note()
        event = self.transport.receive(0)
        if not isinstance(event, Delivery):
            return event is not None
        if event.topic.startswith(self.topics.round().rsplit("/", 1)[0] + "/blob/"):
            self._fetch(self.fetcher.receive(event.topic, event.payload))
            return True
        opened = open_envelope(parse(event.payload), self.choir.coordinator.certificate)
        match opened.message:
            case Announcement() as announcement:
                self.announcement = announcement, opened.context, digest_of(event.payload)
                self.announced.append((opened.context.round, opened.context.attempt))
                self._fetch(self.fetcher.want(announcement.plan) + self.fetcher.want(announcement.state))
                self._check_in()
            case Outcome() as outcome:
                self.outcomes.append(outcome)
            case message if self.device is not None and not self.silent:
                for answer, session in self.device.receive(message, opened.context):
                    self.say(answer, session)
        return True

    def _fetch(self, effects: Iterable[object]) -> None:
        for effect in effects:
            match effect:
                case Subscribe(topic_filter=topic_filter):
                    self.transport.subscribe(topic_filter)
                case Unsubscribe(topic_filter=topic_filter):
                    self.transport.unsubscribe(topic_filter)
                case Fetched(ref=ref, content=content):
                    self.blobs[ref.digest] = content
                    self._check_in()

    def _check_in(self) -> None:
        assert self.announcement is not None
        announcement, _, digest = self.announcement
        if self.silent or not {announcement.plan.digest, announcement.state.digest} <= self.blobs.keys():
            return
        plan = decode_plan(self.blobs[announcement.plan.digest])
        decode_tensors(self.blobs[announcement.state.digest])  # Raises: what is broadcast must be tensors.
        self.device = self.scripted(plan, announcement.state.digest)
        self.device.silent_at = self.silent_at
        self.say(self.device.check_in(digest), bytes(32))

    def say(self, message: Message | VectorChunk, session: bytes = bytes(32), **changed: Any) -> None:
        assert self.announcement is not None
        _, context, _ = self.announcement
        if isinstance(message, VectorChunk):
            self.transport.publish(self.topics.up_chunk(self.name, "1"), encode_vector_chunk(message))
            return
        where = {"round": context.round, "attempt": context.attempt, "session": session, **changed}
        signed = SignedContext(self.name, context.sender, context.fleet, **where)
        self.transport.publish(self.topics.up_message(self.name, NO_ROUTE), seal(message, self.identity, signed))


@dataclass
class Stage:
    """A broker, a coordinator and players, driven by one hand."""

    choir: Choir
    folder: Path
    broker: MemoryBroker
    now_ms: int
    players: list[Player] = field(default_factory=list)
    service: Service | None = None
    journal: Journal = field(init=False)
    transport: MemoryTransport = field(init=False)
    events_log: EventLog = field(init=False)

    def start(self, *, journal: Journal | None = None, **setup: Any) -> None:
        self.journal = journal or Journal(self.folder / "journal.sqlite")
        parts: dict[str, Any] = {
            "identity": self.choir.coordinator,
            "anchor": self.choir.anchor,
            "chunk_bytes": 1024,
            "uploads": UploadSettings(),
            "entropy": random.Random(1).randbytes,
        }
        self.transport = MemoryTransport(self.broker, "coordinator")
        self.events_log = EventLog((self.folder / "events.jsonl").open("a", encoding="utf-8"))
        self.service = Service(
            Setup(**{**parts, **setup}), journal=self.journal, transport=self.transport, events=self.events_log
        )
        self.service.start(self.now_ms)

    def crash(self) -> None:
        """The process is gone: no goodbye, nothing flushed."""
        self.journal.close()
        self.events_log.close()
        self.transport.close()
        self.service = None

    def settle(self) -> None:
        """Let everybody speak until nobody has anything to say."""
        assert self.service is not None
        busy = True
        while busy:
            self.service.step(self.now_ms, 0)
            moved = [player.step() for player in self.players]
            busy = any(moved) or self.broker.queued() > 0

    def run(self, seconds: float, *, step_ms: int = 500, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass in steps, everybody speaking in between."""
        end_ms = self.now_ms + round(1000 * seconds)
        self.settle()
        while self.now_ms < end_ms and not until():
            self.now_ms += step_ms
            self.settle()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]

    def submit(self, name: str) -> None:
        text = (self.folder / f"{name}.toml").read_text()
        task = read_task(text)
        moments = (self.folder / task.standardise.bundle).read_bytes() if task.standardise else None
        with Journal(self.folder / "journal.sqlite") as journal:
            bundle = (self.folder / task.bundle).read_bytes()
            journal.submit(task.name, text, purpose=task.purpose, bundle=bundle, moments=moments, now_ms=self.now_ms)

    def done(self) -> bool:
        return all(task.status not in ("queued", "running") for task in self.journal.tasks())
