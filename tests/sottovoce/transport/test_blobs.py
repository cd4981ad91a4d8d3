"""Blobs over retained chunks: published, found, verified, superseded, and cleared after a crash."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.blobs import BlobRef, blob_ref, digest_of
from sottovoce.errors import BadBlob, MalformedMessage
from sottovoce.transport.base import Connected, Delivery
from sottovoce.transport.blobs import BlobFetcher, BlobPublisher, Failed, Fetched, FetchLimits, Subscribe, Unsubscribe
from sottovoce.transport.memory import MemoryBroker, MemoryTransport
from sottovoce.wire.topics import Topics

TOPICS = Topics("f")


def content_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def chunks_of(ref: BlobRef, content: bytes) -> list[tuple[str, bytes]]:
    return [(TOPICS.blob_chunk(ref.digest, index), content[ref.chunk_slice(index)]) for index in range(ref.chunk_count)]


def pump(publisher: BlobPublisher, transport: MemoryTransport) -> None:
    while not publisher.advance():
        transport.receive(0)


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(random.Random(1))


@pytest.fixture
def coordinator(broker: MemoryBroker) -> MemoryTransport:
    return MemoryTransport(broker, "coordinator")


@given(
    size=st.integers(1, 5000),
    chunk_bytes=st.integers(100, 2000),
    seed=st.integers(0, 2**32),
    fault=st.floats(0, 0.6),
)
def test_what_is_published_is_fetched_over_a_bad_network(size, chunk_bytes, seed, fault):
    broker = MemoryBroker(random.Random(seed), loss=fault, duplicate=fault, reorder=fault)
    coordinator, device = MemoryTransport(broker, "coordinator"), MemoryTransport(broker, "pi-1")
    content = content_of(size, seed)
    ref = blob_ref(content, chunk_bytes=chunk_bytes)
    publisher, fetcher = BlobPublisher(coordinator, TOPICS), BlobFetcher(TOPICS)
    publisher.publish(ref, content)
    effects = fetcher.want(ref)
    assert effects == [Subscribe(TOPICS.blob_filter(ref.digest))]
    device.subscribe(TOPICS.blob_filter(ref.digest))
    effects = []
    while not effects:
        publisher.advance()
        event = device.receive(0)
        if isinstance(event, Delivery):
            effects = fetcher.receive(event.topic, event.payload)
    assert effects == [Fetched(ref, content), Unsubscribe(TOPICS.blob_filter(ref.digest))]
    assert fetcher.wanted == frozenset()


def test_only_a_window_of_chunks_is_handed_over_at_a_time(broker, coordinator):
    content = content_of(1000)
    ref = blob_ref(content, chunk_bytes=100)
    publisher = BlobPublisher(coordinator, TOPICS, window=3)
    publisher.publish(ref, content)
    broker.disconnect("coordinator")
    assert publisher.advance() is False
    assert coordinator.pending() == 3
    assert publisher.advance() is False
    assert coordinator.pending() == 3
    broker.reconnect("coordinator")
    assert publisher.advance() is True
    assert len(broker.retained()) == 10


def test_a_retired_blob_is_cleared_and_the_others_stay(broker, coordinator):
    old, new = content_of(350, 1), content_of(350, 2)
    publisher = BlobPublisher(coordinator, TOPICS)
    for content in (old, new, new):
        publisher.publish(blob_ref(content, chunk_bytes=100), content)
    pump(publisher, coordinator)
    assert len(broker.retained()) == 8
    publisher.retire(digest_of(old))
    publisher.retire(digest_of(old))
    pump(publisher, coordinator)
    ref = blob_ref(new, chunk_bytes=100)
    assert broker.retained() == dict(chunks_of(ref, new))
    assert publisher.wanted == {ref.digest}


@pytest.mark.parametrize("advances_first", [False, True])
def test_a_blob_retired_and_published_again_stays(broker, coordinator, advances_first):
    content = content_of(350)
    ref = blob_ref(content, chunk_bytes=100)
    publisher = BlobPublisher(coordinator, TOPICS)
    publisher.publish(ref, content)
    if advances_first:
        pump(publisher, coordinator)
    publisher.retire(ref.digest)
    publisher.publish(ref, content)
    pump(publisher, coordinator)
    assert broker.retained() == dict(chunks_of(ref, content))


def test_what_a_crashed_run_has_left_behind_is_found_and_cleared(broker):
    kept, superseded = content_of(350, 1), content_of(350, 2)
    crashed_link = MemoryTransport(broker, "coordinator")
    crashed = BlobPublisher(crashed_link, TOPICS)
    for content in (kept, superseded):
        crashed.publish(blob_ref(content, chunk_bytes=100), content)
    pump(crashed, crashed_link)
    broker.disconnect("coordinator")

    link = MemoryTransport(broker, "coordinator")
    publisher = BlobPublisher(link, TOPICS)
    publisher.publish(blob_ref(kept, chunk_bytes=200), kept)  # The same blob in fewer, larger chunks.
    link.subscribe(TOPICS.all_blobs_filter())
    received = 0
    while not publisher.advance() or broker.queued("coordinator"):
        event = link.receive(0)
        if isinstance(event, Delivery):
            publisher.adopt(event.topic, event.payload)
            received += 1
        assert received < 30, "its own messages come back to it and must not answer themselves for ever"
    assert broker.retained() == dict(chunks_of(blob_ref(kept, chunk_bytes=200), kept))
    with pytest.raises(MalformedMessage):
        publisher.adopt(TOPICS.round(), b"")


def test_everything_is_published_again_to_a_broker_that_has_forgotten(broker, coordinator):
    content = content_of(350)
    ref = blob_ref(content, chunk_bytes=100)
    publisher = BlobPublisher(coordinator, TOPICS)
    publisher.publish(ref, content)
    pump(publisher, coordinator)
    broker.restart(keep_state=False)
    assert broker.retained() == {}
    while not isinstance(event := coordinator.receive(0), Connected) or event.resumed:
        pass
    publisher.restore()
    pump(publisher, coordinator)
    assert broker.retained() == dict(chunks_of(ref, content))


def test_a_wrong_blob_or_one_that_does_not_fit_is_not_published(coordinator):
    publisher = BlobPublisher(coordinator, TOPICS)
    with pytest.raises(BadBlob):
        publisher.publish(blob_ref(b"one"), b"two")
    large = bytes(coordinator.max_payload_bytes + 1)
    with pytest.raises(BadBlob, match="smaller chunks"):
        publisher.publish(blob_ref(large, chunk_bytes=len(large)), large)
    assert publisher.advance() is True


def test_a_corrupt_chunk_is_counted_and_a_good_one_awaited():
    content = content_of(350)
    ref = blob_ref(content, chunk_bytes=100)
    fetcher = BlobFetcher(TOPICS)
    fetcher.want(ref)
    good = chunks_of(ref, content)
    for topic, chunk in good[:-1]:
        assert fetcher.receive(topic, bytes(len(chunk))) == []
        assert fetcher.receive(topic, chunk[:-1]) == []
        assert fetcher.receive(topic, chunk) == []
    assert fetcher.receive(TOPICS.blob_chunk(ref.digest, 99), b"beyond the end") == []
    assert fetcher.receive(good[-1][0], good[0][1]) == []
    assert (fetcher.missing(ref.digest), fetcher.refused) == (1, {"bad_blob": 8})
    assert fetcher.receive(*good[-1])[0] == Fetched(ref, content)


def test_chunks_of_what_is_not_wanted_and_cleared_chunks_change_nothing():
    content = content_of(350)
    ref = blob_ref(content, chunk_bytes=100)
    fetcher = BlobFetcher(TOPICS)
    assert fetcher.receive(*chunks_of(ref, content)[0]) == []
    fetcher.want(ref)
    assert fetcher.receive(TOPICS.blob_chunk(ref.digest, 0), b"") == []
    assert (fetcher.missing(ref.digest), fetcher.refused) == (4, {})
    with pytest.raises(MalformedMessage):
        fetcher.receive(TOPICS.round(), b"")


def test_a_reference_that_no_content_fits_fails_instead_of_waiting_for_ever():
    content = content_of(350)
    good = blob_ref(content, chunk_bytes=100)
    bad = msgspec.structs.replace(good, digest=bytes(32))
    fetcher = BlobFetcher(TOPICS)
    fetcher.want(bad)
    effects = [effect for topic, chunk in chunks_of(bad, content) for effect in fetcher.receive(topic, chunk)]
    assert isinstance(effects[0], Failed)
    assert effects[1:] == [Unsubscribe(TOPICS.blob_filter(bad.digest))]
    assert fetcher.wanted == frozenset()


def test_an_empty_blob_is_there_at_once():
    fetcher = BlobFetcher(TOPICS)
    assert fetcher.want(blob_ref(b"")) == [Fetched(blob_ref(b""), b"")]
    with pytest.raises(BadBlob):
        fetcher.want(msgspec.structs.replace(blob_ref(b""), digest=bytes(32)))


def test_number_and_size_of_concurrent_fetches_are_bounded():
    limits = FetchLimits(blob_bytes=1000, open_blobs=2, open_bytes=1500, waiting_blobs=2)
    fetcher = BlobFetcher(TOPICS, limits=limits)
    blobs = [content_of(size, seed) for seed, size in enumerate((1000, 600, 500, 10, 10))]
    refs = [blob_ref(content, chunk_bytes=1000) for content in blobs]
    assert len(fetcher.want(refs[0])) == 1
    assert fetcher.want(refs[0]) == []
    assert fetcher.want(refs[1]) == []  # Together more than open_bytes.
    assert fetcher.want(refs[2]) == []
    with pytest.raises(BadBlob, match="waiting"):
        fetcher.want(refs[3])
    fetched, closed, *opened = fetcher.receive(*chunks_of(refs[0], blobs[0])[0])
    assert (fetched, closed) == (Fetched(refs[0], blobs[0]), Unsubscribe(TOPICS.blob_filter(refs[0].digest)))
    assert opened == [Subscribe(TOPICS.blob_filter(ref.digest)) for ref in refs[1:3]]
    assert fetcher.want(refs[3]) == []  # More than open_blobs.
    assert fetcher.cancel(refs[1].digest) == [
        Unsubscribe(TOPICS.blob_filter(refs[1].digest)),
        Subscribe(TOPICS.blob_filter(refs[3].digest)),
    ]
    assert fetcher.wanted == {refs[2].digest, refs[3].digest}
    assert fetcher.cancel(refs[1].digest) == []


def test_a_blob_that_is_too_large_or_elsewhere_is_refused_before_anything_is_allocated():
    fetcher = BlobFetcher(TOPICS, limits=FetchLimits(blob_bytes=99))
    with pytest.raises(BadBlob, match="100 bytes"):
        fetcher.want(blob_ref(bytes(100)))
    with pytest.raises(BadBlob, match="https:"):
        fetcher.want(msgspec.structs.replace(blob_ref(b"x"), sources=("https:",)))
    assert fetcher.wanted == frozenset()


def test_a_waiting_fetch_can_be_cancelled():
    fetcher = BlobFetcher(TOPICS, limits=FetchLimits(open_blobs=1))
    first, second = blob_ref(b"1"), blob_ref(b"2")
    fetcher.want(first)
    fetcher.want(second)
    assert fetcher.cancel(second.digest) == []
    assert fetcher.cancel(first.digest) == [Unsubscribe(TOPICS.blob_filter(first.digest))]
