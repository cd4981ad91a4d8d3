"""Masked vectors on the server: from verified chunks into the total, and who still owes one."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.errors import BadBlob
from sottovoce.plan import blob_ref
from sottovoce.secagg.segments import add_packed_into, unpacked_bytes
from sottovoce.secagg.server_stages import CollectingInputs, Unmasked
from sottovoce.secagg.server_steps import add_upload
from sottovoce.wire.chunks import Assembly, assemble
from sottovoce.wire.messages import SecAggParameters

LAYOUTS = [(), ((16, 64),), ((32, 64), (16, 128)), ((21, 64),), ((16, 64), (5, 192))]


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
    add_upload(total, assemble(blob_ref(vector, chunk_bytes=chunk_bytes), vector), parameters)
    assert total == expected


@pytest.mark.parametrize("chunk_bytes", [16, 20])
def test_an_upload_that_is_not_whole_leaves_the_total_as_it_was(chunk_bytes: int) -> None:
    parameters = parameters_with(())
    vector, total = bytes(range(parameters.vector_bytes)), bytearray(unpacked_bytes(parameters))
    upload = Assembly(blob_ref(vector, chunk_bytes=chunk_bytes))
    for index in range(upload.ref.chunk_count - 1):
        upload.add(index, vector[upload.ref.chunk_slice(index)])
    with pytest.raises(BadBlob, match="1 chunks are missing"):
        add_upload(total, upload, parameters)
    assert total == bytes(len(total))


def test_the_chunks_that_a_device_signed_bind_its_vector_whatever_name_it_gave_the_whole(fleet: Any) -> None:
    rehearsal = fleet.rehearse(4)
    requests = rehearsal.run_until(CollectingInputs)
    for device, request in requests.items():
        reply = rehearsal.clients[device].receive(request)
        misnamed = msgspec.structs.replace(reply.vector, digest=bytes(32))
        rehearsal.send(device, msgspec.structs.replace(reply, vector=misnamed))
        vector = rehearsal.clients[device].masked_vector
        with pytest.raises(BadBlob, match="not the vector that it has announced"):
            rehearsal.upload(device)
        changed = bytes([vector[0] ^ 1]) + vector[1:]
        with pytest.raises(BadBlob):
            assemble(misnamed, changed)
        rehearsal.server.add_vector(device, assemble(misnamed, vector))
    rehearsal.close()
    rehearsal.run_until(Unmasked)
    assert rehearsal.server.result == rehearsal.plain_sum(rehearsal.devices)


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
