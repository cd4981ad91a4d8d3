"""Parts that no whole round shows well: clock, processor, latest states, fetching, fragments, the documented table."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.agent import Clock
from edge_agent.effects import Contribution
from edge_agent.evidence import MOST_FILES, keep_evidence
from edge_agent.hardware import has_fast_aes
from edge_agent.latest import keep_latest, read_latest
from edge_agent.library import Library
from edge_agent.steps import STEPS
from edge_agent.verification import Verifier
from sottovoce.blobs import blob_ref
from sottovoce.errors import BadBlob, BadCertificate, MalformedMessage, ProgramError
from sottovoce.transport.base import Delivery
from sottovoce.transport.memory import MemoryBroker, MemoryTransport
from sottovoce.wire.chunks import fragments
from sottovoce.wire.messages import Outcome, RoundOver, Selected
from sottovoce.wire.topics import Topics

AGENT_DOCUMENT = Path(__file__).parents[2] / "docs" / "agent.md"
PROGRAM = b"p" * 32


def test_the_documented_table_is_the_one_in_the_code() -> None:
    rows = re.findall(r"^\| ([A-Z]\w+) \| ([\w, ]+) \|$", AGENT_DOCUMENT.read_text(), re.MULTILINE)
    documented = {(state, each) for state, messages in rows for each in messages.split(", ")}
    assert documented == {(state.__name__, kind.__name__) for state, kind in STEPS}


def test_the_clock_starts_at_the_wall_clock_and_never_goes_back() -> None:
    clock = Clock(wall_ms=5_000)
    times = [clock() for _ in range(1000)]
    assert times[0] >= 5_000
    assert times == sorted(times)
    assert times[-1] < 65_000


def test_the_latest_state_is_the_last_one_kept(tmp_path: Path) -> None:
    folder = tmp_path / "latest"
    assert read_latest(folder, PROGRAM) is None
    for number in (1, 2):
        keep_latest(folder, PROGRAM, b"state %d" % number, round=number)
    latest = read_latest(folder, PROGRAM)
    assert latest is not None
    assert (latest.round, latest.content) == (2, b"state 2")
    assert read_latest(folder, b"q" * 32) is None


def test_a_damaged_state_is_not_used(tmp_path: Path) -> None:
    keep_latest(tmp_path, PROGRAM, b"the state", round=1)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes().replace(b"state", b"STATE"))
    assert read_latest(tmp_path, PROGRAM) is None


def test_evidence_is_kept_once_for_its_owner_only_and_not_without_end(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    paths = keep_evidence(folder, (b"one", b"two"))
    assert [path.read_bytes() for path in paths] == [b"one", b"two"]
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    assert keep_evidence(folder, (b"two",)) == paths[1:]
    keep_evidence(folder, [b"%d" % number for number in range(2 * MOST_FILES)])
    assert len(list(folder.iterdir())) == MOST_FILES


def test_what_a_device_computed_is_in_no_text_of_its_objects() -> None:
    assert "12.5" not in repr(Contribution({"delta": [np.array([12.5])]}, 3))


# --- the library ------------------------------------------------------------------------------------------------------


class Shelf:
    """A library with its broker."""

    def __init__(self, folder: Path) -> None:
        self.topics = Topics("choir")
        broker = MemoryBroker(random.Random(1))
        self.coordinator = MemoryTransport(broker, "coordinator")
        self.transport = MemoryTransport(broker, "pi-0")
        self.library = Library(folder, self.transport, self.topics)
        self.arrived: list[bytes] = []

    def request(self, content: bytes, **options: Any) -> None:
        self.library.request(blob_ref(content, chunk_bytes=4), self.arrived.append, now_ms=0, **options)

    def publish(self, content: bytes) -> None:
        ref = blob_ref(content, chunk_bytes=4)
        for index in range(ref.chunk_count):
            topic = self.topics.blob_chunk(ref.digest, index)
            self.coordinator.publish(topic, content[ref.chunk_slice(index)], retain=True)

    def settle(self) -> None:
        while (event := self.transport.receive(0)) is not None:
            if isinstance(event, Delivery):
                assert self.library.owns(event.topic)
                self.library.receive(event.topic, event.payload, now_ms=0)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "blobs")


def test_a_blob_is_fetched_once_and_then_here(shelf: Shelf) -> None:
    shelf.publish(b"some content")
    shelf.request(b"some content")
    shelf.settle()
    assert shelf.arrived == [b"some content"]
    assert not shelf.library.waiting
    shelf.request(b"some content")
    assert shelf.arrived == [b"some content"] * 2
    assert shelf.library.read(blob_ref(b"some content").digest) == b"some content"


def test_everybody_who_waits_for_a_blob_is_called(shelf: Shelf) -> None:
    shelf.request(b"some content")
    shelf.request(b"some content", lasting=True)
    shelf.publish(b"some content")
    shelf.settle()
    assert shelf.arrived == [b"some content"] * 2


def test_another_round_forgets_requests_but_not_the_lasting_one(shelf: Shelf) -> None:
    shelf.request(b"for the round")
    shelf.request(b"an older state", lasting=True)
    shelf.request(b"the newest state", lasting=True)
    shelf.library.forget_requests()
    for content in (b"for the round", b"an older state", b"the newest state"):
        shelf.publish(content)
    shelf.settle()
    assert shelf.arrived == [b"the newest state"]


def test_what_can_never_be_fetched_is_refused(shelf: Shelf) -> None:
    ref = blob_ref(b"content")
    elsewhere = type(ref)(
        digest=ref.digest,
        size=ref.size,
        chunk_bytes=ref.chunk_bytes,
        chunk_digests=ref.chunk_digests,
        sources=("https://example.org/",),
    )
    with pytest.raises(BadBlob):
        shelf.library.request(elsewhere, shelf.arrived.append, now_ms=0)


def test_a_blob_that_is_gone_is_named(shelf: Shelf) -> None:
    with pytest.raises(ProgramError, match="is gone from this device's cache"):
        shelf.library.read(b"d" * 32)


# --- the verifier -----------------------------------------------------------------------------------------------------


@pytest.fixture
def verifier(motionless_world: Any) -> Verifier:
    return Verifier(motionless_world.coordinator.anchor, device="pi-0", fleet="choir")


def test_messages_to_one_device_are_believed_once_their_coordinator_has_announced(
    motionless_world: Any, verifier: Verifier
) -> None:
    coordinator = motionless_world.coordinator
    coordinator.announced = b"a" * 32
    direct = coordinator.seal(Selected(route="r7", now_ms=1), "pi-0")
    down = coordinator.topics.down("pi-0")
    with pytest.raises(BadCertificate):
        verifier.open(down, direct, at=motionless_world.at)
    outcome = coordinator.seal(outcome_of(motionless_world), "all")
    assert verifier.open(coordinator.topics.outcome(), outcome, at=motionless_world.at) is not None
    opened = verifier.open(down, direct, at=motionless_world.at)
    assert opened is not None
    assert opened.message == Selected(route="r7", now_ms=1)


def outcome_of(world: Any, *, now_ms: int | None = None) -> Outcome:
    coordinator = world.coordinator
    return Outcome(
        certificate=coordinator.identity.certificate.der,
        announcement=b"a" * 32,
        committed=False,
        reason="late",
        survivors=(),
        state=coordinator.ref(b"state"),
        now_ms=coordinator.clock() if now_ms is None else now_ms,
    )


def test_a_selection_cannot_push_the_time_beyond_the_end_of_its_certificate(
    motionless_world: Any, verifier: Verifier
) -> None:
    coordinator, at = motionless_world.coordinator, motionless_world.at
    published = coordinator.seal(outcome_of(motionless_world), "all")
    verifier.open(coordinator.topics.outcome(), published, at=at)
    down = coordinator.topics.down("pi-0")
    hundred_years_ms = 100 * 365 * 86_400_000
    late = coordinator.seal(Selected(route="r7", now_ms=coordinator.clock() + hundred_years_ms), "pi-0")
    with pytest.raises(BadCertificate, match="valid"):
        verifier.open(down, late, at=at)
    for impossible_ms in (2**63, -(2**63)):
        with pytest.raises(MalformedMessage, match="is not a time"):
            verifier.open(down, coordinator.seal(Selected(route="r7", now_ms=impossible_ms), "pi-0"), at=at)


@pytest.mark.parametrize(
    "changes",
    [{"rendezvous_closes_ms": 2**64 - 1}, {"selection_closes_ms": 1}, {"rendezvous_ms": 2**62}],
    ids=lambda changes: next(iter(changes)),
)
def test_appointments_must_be_times_in_order(motionless_world: Any, verifier: Verifier, changes: Any) -> None:
    coordinator = motionless_world.coordinator
    wrong = msgspec.structs.replace(coordinator.announcement_message(), **changes)
    with pytest.raises(MalformedMessage):
        verifier.open(coordinator.topics.round(), coordinator.seal(wrong, "all"), at=motionless_world.at)


def test_a_large_message_comes_in_fragments(motionless_world: Any, verifier: Verifier) -> None:
    coordinator = motionless_world.coordinator
    verifier.open(
        coordinator.topics.outcome(), coordinator.seal(outcome_of(motionless_world), "all"), at=motionless_world.at
    )
    payloads = fragments(coordinator.seal(RoundOver("x" * 50_000), "pi-0"), chunk_bytes=8_000)
    assert len(payloads) > 5
    down = coordinator.topics.down("pi-0")
    opened = [verifier.open(down, payload, at=motionless_world.at) for payload in reversed(payloads)]
    assert opened[:-1] == [None] * (len(payloads) - 1)
    assert opened[-1] is not None
    assert opened[-1].message == RoundOver("x" * 50_000)


@pytest.mark.parametrize(
    "topic", ["sv1/choir/all/round", "sv1/choir/dn/pi-0/m", "sv1/choir/st/pi-0"], ids=["round", "down", "status"]
)
def test_a_message_on_a_topic_that_is_not_its_own_is_refused(
    motionless_world: Any, verifier: Verifier, topic: str
) -> None:
    envelope = motionless_world.coordinator.seal(outcome_of(motionless_world), "all")
    with pytest.raises(MalformedMessage):
        verifier.open(topic, envelope, at=motionless_world.at)


@pytest.mark.parametrize("now_ms", [2**62, 10**15, 3_000_000_000_000], ids=["absurd", "far", "after the certificate"])
def test_nobody_moves_this_devices_time_beyond_the_certificate(
    motionless_world: Any, verifier: Verifier, now_ms: int
) -> None:
    coordinator = motionless_world.coordinator
    envelope = coordinator.seal(outcome_of(motionless_world, now_ms=now_ms), "all")
    with pytest.raises((BadCertificate, MalformedMessage)):
        verifier.open(coordinator.topics.outcome(), envelope, at=motionless_world.at)


@pytest.mark.parametrize(
    ("cpu", "fast"),
    [("flags\t: fpu aes sse2\n", True), ("Features\t: fp asimd aes\n", True), ("Features : fp\nmodel: aes\n", False)],
)
def test_aes_instructions_are_recognised(cpu: str, fast: bool) -> None:
    assert has_fast_aes(cpu) is fast
