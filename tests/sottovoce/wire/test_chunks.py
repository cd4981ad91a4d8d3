"""Cutting and putting together: any order, repeats, damage, and senders that only want our memory."""

from __future__ import annotations

import contextlib
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.blobs import MAX_CHUNK_BYTES, blob_ref, digest_of
from sottovoce.errors import BadBlob, LocalProtocolError, MalformedMessage
from sottovoce.wire.chunks import (
    MIN_FRAGMENT_BYTES,
    Assembly,
    Reassembler,
    VectorChunk,
    assemble,
    decode_vector_chunk,
    encode_vector_chunk,
    fragments,
    missing_in_bitmap,
)

contents = st.binary(max_size=700)


@given(content=contents, step=st.integers(1, 300), choice=st.data())
def test_an_assembly_takes_chunks_in_any_order_repeated_and_damaged(content, step, choice):
    ref = blob_ref(content, chunk_bytes=step)
    indices = choice.draw(st.permutations([*range(ref.chunk_count), *range(0, ref.chunk_count, 2)]))
    assembly = Assembly(ref)
    received: set[int] = set()
    for index in indices:
        chunk = content[ref.chunk_slice(index)]
        if index not in received:
            damaged = bytes([chunk[0] ^ 1, *chunk[1:]]) if chunk else b"\0"
            with pytest.raises(BadBlob):
                assembly.add(index, damaged)
        assert assembly.missing() == sorted(set(range(ref.chunk_count)) - received)
        received.add(index)
        assert assembly.add(index, chunk) is (len(received) == ref.chunk_count)
        assert missing_in_bitmap(assembly.bitmap(), ref.chunk_count) == assembly.missing()
    assert assembly.content() == content


@pytest.mark.parametrize("index", [-1, 3, 2**40, 2**64 - 1])
def test_a_chunk_outside_the_blob_is_refused(index):
    with pytest.raises(BadBlob):
        Assembly(blob_ref(bytes(30), chunk_bytes=10)).add(index, bytes(10))


def test_a_repeat_cannot_replace_what_was_verified():
    assembly = Assembly(blob_ref(b"aabb", chunk_bytes=2))
    assembly.add(0, b"aa")
    assembly.add(0, b"XX")
    assembly.add(1, b"bb")
    assert assembly.content() == b"aabb"


def test_an_incomplete_assembly_has_no_content():
    assembly = Assembly(blob_ref(b"aabb", chunk_bytes=2))
    assembly.add(1, b"bb")
    for read in (assembly.content, assembly.chunks):
        with pytest.raises(BadBlob, match="1 chunks are missing"):
            read()


def test_chunks_that_fit_a_whole_that_does_not_are_refused():
    assembly = Assembly(msgspec.structs.replace(blob_ref(b"aabb", chunk_bytes=2), digest=bytes(32)))
    assembly.add(0, b"aa")
    assembly.add(1, b"bb")
    with pytest.raises(BadBlob):
        assembly.content()
    assert assembly.chunks() == [b"aa", b"bb"], "every byte of it is bound all the same, by the chunks"


@given(content=contents, step=st.integers(1, 300))
def test_content_at_hand_is_assembled_only_under_its_own_reference(content, step):
    assert assemble(blob_ref(content, chunk_bytes=step), content).content() == content
    for other in (content + b"x", content[:-1] + bytes([content[-1] ^ 1]) if content else b"\0"):
        with pytest.raises(BadBlob):
            assemble(blob_ref(content, chunk_bytes=step), other)
        with pytest.raises(BadBlob):
            assemble(blob_ref(other, chunk_bytes=step), content)


def test_a_blob_larger_than_the_caller_can_afford_is_refused_first():
    ref = blob_ref(bytes(1000))
    assert Assembly(ref, max_bytes=1000).missing() == [0]
    with pytest.raises(BadBlob, match="larger than the 999"):
        Assembly(ref, max_bytes=999)
    huge = blob_ref(bytes(65 * 1024 * 1024), chunk_bytes=2**24)
    with pytest.raises(BadBlob):
        Assembly(huge)


@given(count=st.integers(1, 200), bitmap=st.binary(max_size=30))
def test_only_a_bitmap_of_the_right_length_is_read(count, bitmap):
    if len(bitmap) == -(-count // 8):
        missing = missing_in_bitmap(bitmap, count)
        assert set(missing) == {i for i in range(count) if not bitmap[i // 8] & (1 << i % 8)}
    else:
        with pytest.raises(MalformedMessage):
            missing_in_bitmap(bitmap, count)


@given(session=st.binary(min_size=32, max_size=32), index=st.integers(0, 2**63), content=contents)
def test_a_vector_chunk_survives(session, index, content):
    chunk = VectorChunk(session, index, content)
    payload = encode_vector_chunk(chunk)
    assert payload == session + index.to_bytes(8, "little") + content
    assert decode_vector_chunk(payload) == chunk
    assert decode_vector_chunk(memoryview(payload)) == chunk


@given(content=contents, length=st.integers(0, 39))
def test_a_vector_chunk_without_its_whole_head_is_refused(content, length):
    whole = encode_vector_chunk(VectorChunk(b"s" * 32, 2**64 - 1, content))
    with pytest.raises(MalformedMessage, match="too few"):
        decode_vector_chunk(whole[:length])
    assert decode_vector_chunk(whole[:40]) == VectorChunk(b"s" * 32, 2**64 - 1, b"")


def test_the_largest_vector_chunk_is_read_and_a_byte_more_is_not():
    largest = VectorChunk(b"s" * 32, 7, bytes(MAX_CHUNK_BYTES))
    assert decode_vector_chunk(encode_vector_chunk(largest)) == largest
    with pytest.raises(MalformedMessage, match="more than a chunk"):
        decode_vector_chunk(encode_vector_chunk(largest) + b"x")


def test_a_vector_chunk_is_not_copied_and_its_words_lie_aligned():
    payload = encode_vector_chunk(VectorChunk(b"s" * 32, 7, bytes(range(64))))
    content = decode_vector_chunk(payload).content
    assert isinstance(content, memoryview)
    assert content.obj is payload
    whole, part = (np.frombuffer(each, np.uint8).ctypes.data for each in (payload, content))
    assert (part - whole) % 8 == 0


@given(payload=st.binary(max_size=80))
def test_any_bytes_are_a_vector_chunk_or_malformed(payload):
    for each in (payload, bytes(32) + payload):
        if len(each) < 40:
            with pytest.raises(MalformedMessage):
                decode_vector_chunk(each)
        else:
            assert encode_vector_chunk(decode_vector_chunk(each)) == each  # One encoding, and every byte counts.


envelopes = st.builds(lambda seed, size: random.Random(seed).randbytes(size), st.integers(), st.integers(1, 9000))


@given(envelope=envelopes, chunk_bytes=st.integers(MIN_FRAGMENT_BYTES + 64, 4000), choice=st.data())
def test_fragments_of_two_envelopes_mix_in_any_order(envelope, chunk_bytes, choice):
    envelope = b"\x9b" + envelope  # How every envelope starts, and no fragment.
    other = b"\x9b" + envelope[::-1]
    parts = [fragments(each, chunk_bytes=chunk_bytes) for each in (envelope, other)]
    assert all(len(part) <= chunk_bytes for part in [*parts[0], *parts[1]])
    reassembler = Reassembler()
    mixed = choice.draw(st.permutations(parts[0] + parts[1] + parts[0][:1]))
    whole = [found for part in mixed if (found := reassembler.add(part)) is not None]
    assert {envelope, other} <= {*whole}
    assert set(whole) == {envelope, other}


def test_a_small_envelope_travels_as_it_is():
    envelope = b"\x9b" + bytes(100)
    assert fragments(envelope, chunk_bytes=101) == [envelope]
    assert Reassembler().add(envelope) == envelope


def test_messages_too_small_for_fragments_are_our_own_mistake():
    with pytest.raises(LocalProtocolError):
        fragments(bytes(5000), chunk_bytes=1000)


def fragment(digest=bytes(32), size=5000, step=2000, index=0, content=None, tag="f"):
    content = bytes(2000) if content is None else content
    return msgspec.msgpack.encode([tag, digest, size, step, index, content])


def test_a_fragment_as_made_here_is_accepted():
    assert Reassembler().add(fragment()) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 0},
        {"size": -1},
        {"size": 8 * 1024 * 1024 + 1},
        {"size": 2**64 - 1},
        {"step": 0},
        {"step": -2000},
        {"step": MIN_FRAGMENT_BYTES - 1, "content": bytes(MIN_FRAGMENT_BYTES - 1)},
        {"step": 5000, "content": bytes(5000)},
        {"step": 2**63},
        {"index": -1},
        {"index": 3},
        {"index": 2, "content": bytes(2000)},
        {"index": 2, "content": b""},
        {"index": 2**63},
        {"content": b""},
        {"content": bytes(1999)},
        {"content": bytes(2001)},
        {"digest": bytes(31)},
        {"digest": b""},
    ],
)
def test_a_fragment_out_of_range_is_refused_and_nothing_kept(changes):
    reassembler = Reassembler()
    with pytest.raises(MalformedMessage):
        reassembler.add(fragment(**changes))
    assert reassembler.held_bytes == 0


@given(payload=st.binary(max_size=200))
def test_any_bytes_are_an_envelope_a_fragment_or_malformed(payload):
    for each in (payload, fragment()[:3] + payload):
        with contextlib.suppress(MalformedMessage):
            assert Reassembler().add(each) in (None, each)


def test_fragments_that_are_not_the_envelope_they_name_are_dropped_and_forgotten():
    reassembler = Reassembler()
    for index, size in ((0, 2000), (1, 2000)):
        assert reassembler.add(fragment(index=index, content=bytes(size))) is None
    with pytest.raises(MalformedMessage, match="do not make up"):
        reassembler.add(fragment(index=2, content=bytes(1000)))
    assert reassembler.held_bytes == 0


def test_many_unfinished_envelopes_cost_a_bounded_amount_of_memory():
    reassembler = Reassembler(max_bytes=5000, open_limit=2)
    for number in range(500):
        reassembler.add(fragment(digest=digest_of(bytes([number % 256, number // 256]))))
        assert reassembler.held_bytes <= 4000


def test_the_same_digest_cut_differently_is_another_envelope():
    """Otherwise overlapping parts could add up to the size without covering it, or pile up without end."""
    reassembler = Reassembler(max_bytes=100_000, open_limit=2)
    for step in range(1100, 1400):
        for index in range(3):
            reassembler.add(fragment(size=100_000, step=step, index=index, content=bytes(step)))
        assert reassembler.held_bytes <= 2 * 3 * 1400


def test_the_one_heard_of_last_stays():
    envelope = b"\x9b" + random.Random(1).randbytes(7000)
    parts = fragments(envelope, chunk_bytes=2064)
    reassembler = Reassembler(open_limit=2)
    for number, part in enumerate(parts[:-1]):
        reassembler.add(fragment(digest=digest_of(bytes([number]))))
        assert reassembler.add(part) is None
    assert reassembler.add(parts[-1]) == envelope


def test_what_is_longer_than_any_chunk_is_not_decoded():
    with pytest.raises(MalformedMessage, match="more than a chunk"):
        decode_vector_chunk(bytes(MAX_CHUNK_BYTES + 41))
    begun = fragments(bytes(5000), chunk_bytes=2048)[0]
    with pytest.raises(MalformedMessage, match="where a whole may have"):
        Reassembler(max_bytes=1024).add(begun)
