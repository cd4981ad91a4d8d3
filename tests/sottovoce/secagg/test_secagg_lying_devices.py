"""Lying devices against the real server: each lie ends in a named error, and the server's state stays as it was."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sottovoce.errors import (
    BadBlob,
    BadShare,
    ConfigError,
    ConflictingMessage,
    LocalProtocolError,
    LowOrderPoint,
    MalformedMessage,
    RemoteProtocolError,
    Replayed,
    SottovoceError,
)
from sottovoce.secagg.server_stages import CheckingConsistency, CollectingInputs, SharingKeys, Unmasked
from sottovoce.secagg.uploads import expect, tag_vector
from sottovoce.wire.chunks import Assembly, assemble
from sottovoce.wire.messages import MaskedInput, SurvivorsSignature, Unmasking

replace = msgspec.structs.replace


def test_the_server_refuses_advertisements_that_are_not_for_this_session(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    device = rehearsal.devices[0]
    good = rehearsal.clients[device].advertise()
    cases: list[tuple[Any, dict[str, Any], type[SottovoceError]]] = [
        (good, {"session": b"s" * 32}, Replayed),
        (replace(good, state=b"z" * 32), {}, RemoteProtocolError),
        (replace(good, certificate=fleet.identities["pi-005"].certificate.der), {}, RemoteProtocolError),
        (replace(good, mask_key=bytes(32)), {}, LowOrderPoint),
        (replace(good, channel_key=(2**255 - 18).to_bytes(32, "little")), {}, LowOrderPoint),
        (replace(good, nonce=b""), {}, MalformedMessage),
    ]
    for message, context, error in cases:
        opened = rehearsal.opened(device, message, session=context.get("session", bytes(32)))
        with pytest.raises(error):
            rehearsal.server.receive(opened)
    assert device in rehearsal.server.waiting_for()
    rehearsal.server.receive(rehearsal.opened(device, good, session=bytes(32)))
    assert device not in rehearsal.server.waiting_for()


def test_the_server_refuses_strangers_and_second_thoughts(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    stranger = fleet.client("pi-099", bytearray(fleet.vector_bytes))
    with pytest.raises(RemoteProtocolError, match="not invited"):
        rehearsal.server.receive(fleet.opened("pi-099", stranger.advertise(), session=bytes(32)))
    requests = rehearsal.run_until(SharingKeys)
    device = rehearsal.devices[0]
    reply = rehearsal.answer(device, requests[device])
    with pytest.raises(ConflictingMessage):
        rehearsal.send(device, replace(reply, commitment=b"c" * 32))
    with pytest.raises(RemoteProtocolError, match="roster"):
        rehearsal.server.receive(fleet.opened("pi-099", reply, session=rehearsal.server.session_id))
    assert rehearsal.server.stage.answers[rehearsal.position(device)] == reply


@pytest.mark.parametrize("session", [bytes(32), b"o" * 32])
def test_an_answer_signed_for_another_session_is_refused(fleet: Any, session: bytes) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(SharingKeys)
    device = rehearsal.devices[0]
    reply = rehearsal.clients[device].receive(requests[device])
    with pytest.raises(Replayed):
        rehearsal.server.receive(rehearsal.opened(device, reply, session=session))
    assert device in rehearsal.server.waiting_for()


def test_a_renewed_certificate_does_not_take_over_a_seat(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(SharingKeys)
    device = rehearsal.devices[0]
    reply = rehearsal.clients[device].receive(requests[device])
    original, fleet.identities[device] = fleet.identities[device], fleet.issue(device, "device")
    try:
        with pytest.raises(RemoteProtocolError, match="certificate"):
            rehearsal.send(device, reply)
    finally:
        fleet.identities[device] = original


@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace(m, commitment=b"short"),
        lambda m: replace(m, ciphertexts=m.ciphertexts[88:]),
        lambda m: replace(m, ciphertexts=m.ciphertexts + m.ciphertexts[:88]),
        lambda m: replace(m, ciphertexts=m.ciphertexts[:-1]),
        lambda m: replace(m, ciphertexts=m.ciphertexts + b"x"),
        lambda m: replace(m, ciphertexts=b""),
    ],
)
def test_the_server_refuses_shares_of_the_wrong_form(fleet: Any, change: Any) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(SharingKeys)
    device = rehearsal.devices[0]
    with pytest.raises(MalformedMessage):
        rehearsal.send(device, change(rehearsal.clients[device].receive(requests[device])))
    assert device in rehearsal.server.waiting_for()


def test_the_server_adds_only_the_vector_that_was_announced_and_only_once(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(CollectingInputs, silent={"share_keys": rehearsal.devices[5:]})
    device, other, late = rehearsal.devices[0], rehearsal.devices[1], rehearsal.devices[5]
    server = rehearsal.server
    zeros, key = bytes(fleet.vector_bytes), bytes(32)
    made_up = assemble(expect(tag_vector(zeros, key, "chacha20", chunk_bytes=100), key, "chacha20"), zeros)
    with pytest.raises(LocalProtocolError):
        server.add_vector(device, made_up)
    reply = rehearsal.answer(device, requests[device], upload=False)
    expected = server.expected_vector(device)
    assert (expected.size, expected.chunk_bytes, expected.tags) == (
        fleet.vector_bytes, reply.vector.chunk_bytes, reply.vector.tags,
    )  # fmt: skip
    assert server.expected_vector(other) is server.expected_vector("nobody") is None
    with pytest.raises(BadBlob, match="not the vector that it has announced"):
        server.add_vector(device, made_up)
    with pytest.raises(BadBlob, match="1 chunks are missing"):
        server.add_vector(device, Assembly(expected))
    with pytest.raises(BadBlob):
        assemble(expected, zeros)
    assert bytes(server.stage.total) == bytes(fleet.vector_bytes)
    assert device in server.waiting_for()
    rehearsal.upload(device)
    assert device not in server.waiting_for()
    with pytest.raises(LocalProtocolError):
        server.add_vector(device, assemble(expected, rehearsal.clients[device].masked_vector))
    with pytest.raises(MalformedMessage, match="bytes"):
        rehearsal.send(other, MaskedInput(vector=tag_vector(b"too short", key, "chacha20", chunk_bytes=100)))
    rehearsal.clients[late].receive(rehearsal.requests[late][0].message)
    with pytest.raises(RemoteProtocolError, match="in time"):
        rehearsal.send(late, reply)


def test_the_server_refuses_signatures_and_shares_it_did_not_ask_for(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8)
    dropped, silent, device = rehearsal.devices[7], rehearsal.devices[6], rehearsal.devices[0]
    requests = rehearsal.run_until(CheckingConsistency, silent={"masked_input": [dropped]})
    right = rehearsal.clients[device].receive(requests[device])
    with pytest.raises(RemoteProtocolError):
        rehearsal.send(dropped, right)
    with pytest.raises(RemoteProtocolError):
        rehearsal.send(device, SurvivorsSignature(survivors=b"x" * 32))
    for name in rehearsal.devices[:6]:
        rehearsal.answer(name, requests[name])
    requests = rehearsal.close()
    shares = rehearsal.clients[device].receive(requests[device])
    assert silent not in requests
    with pytest.raises(RemoteProtocolError, match="not asked"):
        rehearsal.send(silent, shares)
    content = shares.shares
    assert len(content) == 36 * 8
    for wrong, error in [
        (content[36:], MalformedMessage),
        (content + content[:36], MalformedMessage),
        (content * 2, MalformedMessage),  # Both kinds of share for everybody have no place.
        (b"", MalformedMessage),
        (content[1:], MalformedMessage),
        (content + b"\0", MalformedMessage),
        (b"\xff" * 36 + content[36:], BadShare),
        (content[:-2] + b"\xf1\xff", BadShare),
    ]:
        with pytest.raises(error):
            rehearsal.send(device, Unmasking(wrong))
        assert device in rehearsal.server.waiting_for()
    rehearsal.send(device, shares)
    rehearsal.run_until(Unmasked)
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.devices[:7])


def test_more_devices_than_the_session_allows_cannot_be_invited(fleet: Any) -> None:
    with pytest.raises(ConfigError, match="maximum_clients is 5"):
        fleet.server([f"pi-{number}" for number in range(6)], fleet.parameters(maximum_clients=5))
    with pytest.raises(ConfigError, match="k-regular"):
        fleet.server(["pi-1"], fleet.parameters(maximum_clients=201))


@pytest.mark.parametrize("length", [0, 15, 6 * 16, 8 * 16])
def test_the_server_wants_one_token_for_every_neighbour_that_shared_keys(fleet: Any, length: int) -> None:
    rehearsal = fleet.rehearse(8)
    requests = rehearsal.run_until(CollectingInputs)
    device = rehearsal.devices[0]
    answer = rehearsal.clients[device].receive(requests[device])
    short = rehearsal.opened(device, replace(answer, inclusions=bytes(length)))
    before = rehearsal.server.waiting_for()
    with pytest.raises(MalformedMessage, match="one inclusion token for every neighbour"):
        rehearsal.server.receive(short)
    assert rehearsal.server.waiting_for() == before
    assert rehearsal.server.expected_vector(device) is None
