"""Masked vectors on the server: from verified chunks into the total, and who still owes one."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from sottovoce.errors import BadBlob, ConflictingMessage, MalformedMessage
from sottovoce.identity import SignedContext
from sottovoce.secagg.segments import add_packed_into, unpacked_bytes
from sottovoce.secagg.server import ServerSession
from sottovoce.secagg.server_stages import CollectingInputs, Unmasked
from sottovoce.secagg.server_steps import add_upload
from sottovoce.secagg.uploads import ExpectedVector, expect, tag_vector
from sottovoce.wire.chunks import Assembly, assemble
from sottovoce.wire.messages import Cipher, SecAggParameters

LAYOUTS = [(), ((16, 64),), ((32, 64), (16, 128)), ((21, 64),), ((16, 64), (5, 192))]


KEY = b"k" * 32
CIPHERS: tuple[Cipher, ...] = ("aes-128-ctr", "chacha20")


def expected_of(vector: bytes, chunk_bytes: int, cipher: Cipher = "aes-128-ctr") -> ExpectedVector:
    return expect(tag_vector(vector, KEY, cipher, chunk_bytes=chunk_bytes), KEY, cipher)


def parameters_with(packed: tuple[tuple[int, int], ...]) -> SecAggParameters:
    narrow = sum(width * count // 8 for width, count in packed) + 40
    return SecAggParameters(
        mode="active", cipher="chacha20", minimum_survivors=3, maximum_clients=9, corrupt_share_bp=500,
        dropout_share_bp=500, vector_bytes=narrow + 32, wide_bytes=32, packed=packed,
    )  # fmt: skip


@given(
    packed=st.sampled_from(LAYOUTS),
    chunk_bytes=st.integers(1, 200) | st.sampled_from([8, 16, 24, 40, 64, 4096]),
    seed=st.integers(0, 2**32),
)
def test_chunks_of_any_size_add_up_to_the_vector(
    packed: tuple[tuple[int, int], ...], chunk_bytes: int, seed: int
) -> None:
    dice, parameters = random.Random(seed), parameters_with(packed)
    vector = dice.randbytes(parameters.vector_bytes)
    total = bytearray(dice.randbytes(unpacked_bytes(parameters)))
    expected = bytearray(total)
    add_packed_into(expected, vector, parameters)
    add_upload(total, assemble(expected_of(vector, chunk_bytes), vector), parameters)
    assert total == expected


@pytest.mark.parametrize("chunk_bytes", [16, 20])
def test_an_upload_that_is_not_whole_leaves_the_total_as_it_was(chunk_bytes: int) -> None:
    parameters = parameters_with(())
    vector, total = bytes(range(parameters.vector_bytes)), bytearray(unpacked_bytes(parameters))
    upload = Assembly(expected_of(vector, chunk_bytes))
    for index in range(upload.ref.chunk_count - 1):
        upload.add(index, vector[upload.ref.chunk_slice(index)])
    with pytest.raises(BadBlob, match="1 chunks are missing"):
        add_upload(total, upload, parameters)
    assert total == bytes(len(total))


@given(
    vector=st.binary(min_size=1, max_size=300),
    chunk_bytes=st.integers(1, 320),
    cipher=st.sampled_from(CIPHERS),
    choice=st.data(),
)
def test_every_chunk_is_told_from_every_other_of_the_same_vector(
    vector: bytes, chunk_bytes: int, cipher: Cipher, choice: st.DataObject
) -> None:
    expected = expected_of(vector, chunk_bytes, cipher)
    index = choice.draw(st.integers(0, expected.chunk_count - 1))
    chunk = vector[expected.chunk_slice(index)]
    expected.verify_chunk(index, chunk)
    bit = choice.draw(st.integers(0, 8 * len(chunk) - 1))
    changed = (int.from_bytes(chunk, "little") ^ 1 << bit).to_bytes(len(chunk), "little")
    wrong = [(index, changed), (index, chunk[:-1]), (index, chunk + b"\0")]
    if vector[expected.chunk_slice(index + 1)] != chunk:
        wrong.append((index + 1, chunk))
    for other, content in wrong:
        with pytest.raises(BadBlob):
            expected.verify_chunk(other, content)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_vector_is_tagged_without_a_copy_of_it(cipher: Cipher) -> None:
    vector = bytearray(2_000_000)
    tracemalloc.start()
    announced = tag_vector(vector, KEY, cipher, chunk_bytes=65_536)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert (announced.size, announced.chunk_count) == (2_000_000, 31)
    vector.clear()  # No view of it is left, either.


def test_a_key_is_not_shown_and_is_another_for_every_session_and_device(fleet: Any) -> None:
    rehearsals = [fleet.rehearse(4, seed=seed) for seed in (1, 2)]
    found = []
    for rehearsal in rehearsals:
        rehearsal.run_until(CollectingInputs)
        for client in rehearsal.clients.values():
            found.append(client.stage.upload_key)
            assert client.stage.upload_key.hex() not in repr(client.stage)
            assert repr(client.stage.upload_key) not in repr(client.stage)
    assert len(set(found)) == 8
    assert "_aead" not in repr(expected_of(b"vector", 10))


def test_the_coordinators_key_is_fresh_and_one_for_all_its_devices(fleet: Any) -> None:
    settings: dict[str, Any] = {"plan": b"p" * 32, "state": b"s" * 32, "parameters": fleet.parameters()}
    context = SignedContext("conductor", "all", "choir", 7, 1)
    servers = [ServerSession(context=context, expected=["a", "b"], entropy=os.urandom, **settings) for _ in range(2)]
    asked = [{reply.message for reply in server.outstanding()} for server in servers]
    assert asked == [{server.invitation} for server in servers]
    assert servers[0].invitation.upload_key != servers[1].invitation.upload_key


@pytest.mark.parametrize("abandoned", [True, False])
def test_when_a_session_ends_the_server_keeps_nothing_of_its_key(fleet: Any, abandoned: bool) -> None:
    rehearsal = fleet.rehearse(4)
    pair = rehearsal.server.stage.upload_keys
    rehearsal.run_until(CollectingInputs)
    derived = rehearsal.server.stage.upload_keys
    if abandoned:
        rehearsal.server.abandon("stopped")
    else:
        rehearsal.run_until(Unmasked)
    gc.collect()
    assert sys.getrefcount(pair) == sys.getrefcount(derived) == 2, "this test's own, and the argument"


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_who_owes_an_answer_is_known_without_asking_the_stage(fleet: Any, mode: str) -> None:
    rehearsal = fleet.rehearse(6, parameters=fleet.parameters(mode=mode))
    server = rehearsal.server
    while not isinstance(server.stage, Unmasked):
        requests = {reply.device: reply.message for reply in server.outstanding()}
        assert server.owing == requests.keys()
        for device, request in requests.items():
            if rehearsal.stage_name == "advertise_keys":
                rehearsal.advertise([device])
            else:
                rehearsal.answer(device, request, upload=False)
            if server.expected_vector(device) is not None:
                assert device in server.owing, "an announcement is not yet a vector"
                rehearsal.upload(device)
            assert server.owing == server.stage.waiting_for() == server.waiting_for()
            assert device not in server.owing
        rehearsal.close()
    assert server.owing == frozenset()


def test_nobody_owes_anything_to_a_session_that_was_abandoned(fleet: Any) -> None:
    rehearsal = fleet.rehearse(4)
    rehearsal.run_until(CollectingInputs)
    assert rehearsal.server.owing == set(rehearsal.devices)
    rehearsal.server.abandon("stopped")
    assert rehearsal.server.owing == frozenset()


def announced_vector(fleet: Any, *, seed: int = 0) -> Any:
    """A rehearsal whose first device has announced its vector, in chunks of 16 bytes: it, its name and the vector."""
    rehearsal = fleet.rehearse(6, seed=seed)
    device = rehearsal.devices[0]
    rehearsal.clients[device] = fleet.client(device, bytearray(rehearsal.plain[device]), chunk_bytes=16)
    requests = rehearsal.run_until(CollectingInputs)
    rehearsal.answer(device, requests[device], upload=False)
    return rehearsal, device, bytes(rehearsal.clients[device].masked_vector)


def test_a_chunk_changed_by_the_broker_is_refused_and_the_right_one_still_fits(fleet: Any) -> None:
    rehearsal, device, vector = announced_vector(fleet)
    upload = Assembly(rehearsal.server.expected_vector(device))
    assert upload.ref.chunk_count == 5
    for index in range(5):
        right, other = vector[upload.ref.chunk_slice(index)], vector[upload.ref.chunk_slice((index + 1) % 5)]
        for wrong in (bytes([right[0] ^ 1]) + right[1:], right[:-1] + bytes([right[-1] ^ 128]), other, right[:-1], b""):
            with pytest.raises(BadBlob):
                upload.add(index, wrong)
            with pytest.raises(BadBlob, match="chunks are missing"):
                rehearsal.server.add_vector(device, upload)
        assert bytes(rehearsal.server.stage.total) == bytes(fleet.vector_bytes), "nothing unverified is in the sum"
        upload.add(index, right)
    rehearsal.server.add_vector(device, upload)
    rehearsal.run_until(Unmasked)
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.devices)


def test_a_tag_from_another_session_is_refused(fleet: Any) -> None:
    """The same device, with the same keys even, in two sessions; the broker puts the one vector into the other."""
    first, device, before = announced_vector(fleet)
    earlier = first.server.expected_vector(device)
    second, _, after = announced_vector(fleet, seed=1)
    expected = second.server.expected_vector(device)
    assert before != after
    for content in (before, after):
        with pytest.raises(BadBlob):
            assemble(dataclasses.replace(expected, tags=earlier.tags), content)
    with pytest.raises(BadBlob):
        assemble(expected, before)
    message = second.answers[device][-1]
    with pytest.raises(ConflictingMessage):
        second.send(device, structs.replace(message, vector=first.answers[device][-1].vector))


def test_a_tag_of_another_device_is_refused(fleet: Any) -> None:
    """A member announces another's vector and tags as its own: whoever copies does not know the key."""
    rehearsal, device, vector = announced_vector(fleet)
    copier = rehearsal.devices[1]
    request = next(reply.message for reply in rehearsal.server.outstanding() if reply.device == copier)
    own = rehearsal.clients[copier].receive(request)
    rehearsal.send(copier, structs.replace(own, vector=rehearsal.answers[device][-1].vector))
    with pytest.raises(BadBlob, match="does not match its tag"):
        assemble(rehearsal.server.expected_vector(copier), vector)
    assert copier in rehearsal.server.waiting_for()


@pytest.mark.parametrize(
    ("vector_bytes", "chunk_bytes", "taken"),
    [
        (72, 1, False),
        (64 * 1023, 1023, True),
        (65 * 1023 + 1, 1023, False),
        (65 * 1024, 1024, True),
        (10_000 * 1024, 1024, True),
        (10_001 * 1024, 1024, False),
    ],
)
def test_a_vector_in_many_tiny_chunks_is_refused_before_anything_is_kept_of_it(
    fleet: Any, vector_bytes: int, chunk_bytes: int, taken: bool
) -> None:
    """Every chunk is answered with a bitmap of all: 65,000 of them would cost the coordinator 8 kB each."""
    rehearsal = dataclasses.replace(fleet, vector_bytes=vector_bytes).rehearse(6)
    device = rehearsal.devices[0]
    requests = rehearsal.run_until(CollectingInputs)
    right = rehearsal.clients[device].receive(requests[device])
    key = rehearsal.server.stage.upload_keys[rehearsal.server.stage.cohort.position_of[device]]
    cut = tag_vector(rehearsal.clients[device].masked_vector, key, "aes-128-ctr", chunk_bytes=chunk_bytes)
    if taken:
        rehearsal.send(device, structs.replace(right, vector=cut))
    else:
        with pytest.raises(MalformedMessage, match="each too small"):
            rehearsal.send(device, structs.replace(right, vector=cut))
        assert rehearsal.server.expected_vector(device) is None
        rehearsal.send(device, right)
    rehearsal.upload(device)
    assert device not in rehearsal.server.waiting_for()
