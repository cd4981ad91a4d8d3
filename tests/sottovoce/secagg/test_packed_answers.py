"""What is packed without names: positions of any size, answers of any bytes, the largest cohort, long streams."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as with_fields
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sottovoce.errors import BadBlob, BadShare, MalformedMessage, RoundAbandoned
from sottovoce.secagg import shamir
from sottovoce.secagg.client_stages import Aborted
from sottovoce.secagg.graph import LARGEST_COHORT, Graph, GraphParameters
from sottovoce.secagg.mask_removal import Spread
from sottovoce.secagg.masks import MaskExpander
from sottovoce.secagg.roster import Shape
from sottovoce.secagg.server_stages import Abandoned, Cohort, CollectingInputs, CollectingShares, SharingKeys, Unmasked
from sottovoce.secagg.server_steps import close_sharing, take_unmasking
from sottovoce.secagg.unmask import rebuild_secrets
from sottovoce.secagg.uploads import expect, tag_vector
from sottovoce.wire.chunks import Assembly, VectorChunk, decode_vector_chunk, encode_vector_chunk
from sottovoce.wire.messages import MaskedInputRequest, ShareKeys, Unmasking


def over_the_wire(request: MaskedInputRequest) -> MaskedInputRequest:
    """The request as a device's codec reads it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=MaskedInputRequest)


# --- a lying server: whose shares a device takes in -------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [2**8, 2**16, 2**32, 2**63, -(2**16), -(2**63)])
def test_a_position_that_a_narrower_number_would_fold_onto_a_neighbour_is_refused(fleet: Any, beyond: int) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(CollectingInputs)
    device = rehearsal.devices[0]
    pairs = rehearsal.forwarded(requests[device])
    folded = sorted([*pairs[1:], (pairs[0][0] + beyond, pairs[0][1])])
    refused(rehearsal.clients[device], over_the_wire(rehearsal.forwarding(folded)), MalformedMessage)


def test_a_devices_own_position_is_no_senders_and_its_own_ciphertexts_are_no_answers(fleet: Any) -> None:
    """The server gives back what the device has sent: at its own place, and as if its neighbours had sent it."""
    for change, error in (("own place", MalformedMessage), ("given back", BadShare)):
        rehearsal = fleet.rehearse(6)
        requests = rehearsal.run_until(CollectingInputs)
        device = rehearsal.devices[0]
        request, own = requests[device], rehearsal.server.stage.cohort.position_of[device]
        sent = rehearsal.cut(rehearsal.answers[device][1].ciphertexts, 88)
        if change == "own place":
            lie = rehearsal.forwarding(sorted([*rehearsal.forwarded(request), (own, sent[0])]))
        else:
            lie = rehearsal.forwarding(zip(request.senders, sent, strict=True))
        refused(rehearsal.clients[device], over_the_wire(lie), error)


def refused(client: Any, request: MaskedInputRequest, error: type[Exception]) -> None:
    """Nothing is masked, and the plain vector is gone."""
    vector = client.stage.vector
    with pytest.raises(error):
        client.receive(request)
    assert isinstance(client.stage, Aborted)
    assert client.masked_vector is None
    assert bytes(vector) == bytes(len(vector))


# --- lying devices: answers of any bytes, and answers that never come -------------------------------------------------


@pytest.fixture(scope="module")
def asked(fleet: Any) -> Any:
    """A rehearsal whose server waits for the shares of eight members, of whom one has dropped out."""
    rehearsal = fleet.rehearse(8)
    rehearsal.run_until(CollectingShares, silent={"masked_input": rehearsal.devices[7:]})
    return rehearsal


@given(
    shares=st.binary(max_size=40)
    | st.binary(min_size=8 * 36, max_size=8 * 36)
    | st.builds(
        lambda word, count: word.to_bytes(2, "little") * count, st.integers(65515, 65535), st.integers(142, 146)
    )
)
def test_an_answer_of_any_bytes_is_recorded_whole_or_refused_by_name(asked: Any, shares: bytes) -> None:
    rehearsal, device = asked, asked.devices[0]
    stage = with_fields(rehearsal.server.stage, answers={})
    opened = replace(rehearsal.opened(device, Unmasking(b"")), message=Unmasking(shares))
    in_range = (np.frombuffer(shares[: len(shares) // 2 * 2], "<u2") < 65521).all()
    if len(shares) != 8 * 36 or not in_range:
        with pytest.raises(BadShare if len(shares) == 8 * 36 else MalformedMessage):
            take_unmasking(rehearsal.server._agreement, stage, opened)
        assert stage.answers == {}
        return
    take_unmasking(rehearsal.server._agreement, stage, opened)
    (taken,) = stage.answers.values()
    assert taken.tobytes() == shares
    assert taken.shape == (8, 18)


@pytest.mark.parametrize("seed", range(4))
def test_on_a_ring_missing_and_wrong_answers_together_never_make_a_wrong_sum(large_fleet: Any, seed: int) -> None:
    """Every owner then has other holders left, at other points, in rows of other lengths."""
    dice = random.Random(seed)
    parameters = large_fleet.parameters(mode="curious", maximum_clients=201)
    rehearsal = large_fleet.rehearse(201, parameters=parameters, graph_rule=lambda _: GraphParameters(24, 12))
    names = rehearsal.devices
    silent = {"share_keys": dice.sample(names, 4), "masked_input": dice.sample(names, 4)}
    requests = rehearsal.run_until(CollectingShares, silent=silent)
    alive = rehearsal.server.survivors
    missing = dice.sample(sorted(requests), 8)
    liars = dice.sample(sorted(requests.keys() - missing), 5 if seed < 3 else 120)
    for device in sorted(requests.keys() - missing):
        answer = rehearsal.clients[device].receive(requests[device])
        shares = rehearsal.cut(answer.shares, 36)
        if device in liars:
            dice.shuffle(shares)
        rehearsal.send(device, Unmasking(b"".join(shares)))
    assert rehearsal.server.waiting_for() == set(missing)
    if seed < 3:
        rehearsal.close()
        assert bytes(rehearsal.server.result) == rehearsal.plain_sum(alive)
        return
    with pytest.raises(RoundAbandoned, match="bad_shares"):
        rehearsal.close()
    assert rehearsal.server.stage == Abandoned("bad_shares")


# --- the largest cohort: its positions just fit into 16 bits ----------------------------------------------------------


def test_in_the_largest_cohort_everybody_gets_what_was_made_for_it(fleet: Any) -> None:
    graph = Graph(LARGEST_COHORT, 4, b"g" * 32)
    members = tuple(
        SimpleNamespace(device=f"{number}", channel_key=b"\x09" + bytes(31)) for number in range(LARGEST_COHORT)
    )
    around = graph.all_neighbours()
    shape = Shape(b"s" * 32, graph, threshold=2, corrupt=1)
    cohort = Cohort(shape, members, {}, around)  # type: ignore[arg-type]
    ends = (0, 1, LARGEST_COHORT - 2, LARGEST_COHORT - 1)
    sharing = sorted({*ends, *around[list(ends)].ravel().tolist()})

    def ciphertext(sender: int, recipient: int) -> bytes:
        return (sender.to_bytes(4, "little") + recipient.to_bytes(4, "little")) * 11

    answers = {
        sender: ShareKeys(bytes(32), b"".join(ciphertext(sender, other) for other in around[sender].tolist()))
        for sender in sharing
    }
    agreement = fleet.rehearse(3).server._agreement
    keys = SimpleNamespace(agree=lambda _: bytes(32))
    following, requests = close_sharing(agreement, SharingKeys(cohort, keys, answers))  # type: ignore[arg-type]
    assert [*requests] == [f"{position}" for position in sharing]
    for position in sharing:
        senders = [other for other in around[position].tolist() if other in answers]
        expected = MaskedInputRequest(tuple(senders), b"".join(ciphertext(other, position) for other in senders))
        assert requests[f"{position}"] == expected
    assert [*following.commitments] == sharing


def test_the_secrets_of_the_first_and_the_last_member_of_the_largest_cohort_are_not_mixed_up(
    fixed_entropy: Any,
) -> None:
    entropy, points = fixed_entropy(1), (1, 2, LARGEST_COHORT - 1, LARGEST_COHORT)
    secrets = {owner: entropy(32) for owner in (0, 1, LARGEST_COHORT - 2, LARGEST_COHORT - 1)}
    rows = shamir.split([*secrets.values()], points=points, threshold=3, entropy=entropy)

    def verify(owner: int, secret: bytes) -> None:
        if secret != secrets[owner]:
            raise BadShare("not it")

    for spoilt in (False, True):
        limbs = np.concatenate([shamir.parse_shares(row) for row in rows])
        if spoilt:  # One at the lowest point: the first subset of every owner is wrong.
            limbs[:4] = (limbs[:4].astype(int) + 1 + np.arange(18) ** 2) % shamir.PRIME
        rebuilt = rebuild_secrets(
            owner_of=np.tile([*secrets], 4),
            point_of=np.repeat(points, 4),
            limbs=limbs,
            owners=[*secrets],
            threshold=3,
            verify=verify,
            session=b"s" * 32,
        )
        assert rebuilt == secrets


# --- mask streams -----------------------------------------------------------------------------------------------------


def stream(cipher: str, key: bytes, start: int, length: int) -> bytes:
    """The stream by its definition, from byte `start` on, a multiple of 64."""
    if cipher == "chacha20":
        nonce = (start // 64).to_bytes(8, "little") + bytes(8)
        return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(length))
    counter = (start // 16).to_bytes(16, "big")
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(length))


@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
def test_streams_of_every_short_length_begin_anew_in_every_expander(
    fleet: Any, fixed_entropy: Any, cipher: str
) -> None:
    """Two expanders in turn, each of them twice, and once more after it was erased."""
    entropy = fixed_entropy(7)
    for length in range(16, 1100, 8):
        parameters = fleet.parameters(cipher=cipher, vector_bytes=length, wide_bytes=16)
        expanders = [MaskExpander(parameters), MaskExpander(parameters)]
        for expander in (*expanders, *expanders, expanders[0]):
            key, vector = entropy(16 if cipher == "aes-128-ctr" else 32), bytearray(length)
            expander.add(vector, key)
            assert vector == stream(cipher, key, 0, length)
            if expander is expanders[0]:
                expander.erase()


@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
def test_the_end_of_a_long_stream_counts_on(fleet: Any, fixed_entropy: Any, cipher: str) -> None:
    """Two million counters, the last of them half used."""
    length = 2**25 + 8
    key, vector = fixed_entropy(8)(16 if cipher == "aes-128-ctr" else 32), bytearray(length)
    MaskExpander(fleet.parameters(cipher=cipher, vector_bytes=length, wide_bytes=16)).add(vector, key)
    for start in (2**20, 2**24 - 2**16, 2**25 - 2**18):
        assert vector[start : start + 2**18] == stream(cipher, key, start, min(2**18, length - start))
    assert vector[-8:] == stream(cipher, key, 2**25, 8)


@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
def test_threads_that_take_off_masks_of_several_blocks_do_not_share_them(fleet: Any, cipher: str) -> None:
    """More parts than members, too: some have nothing to do."""
    rehearsal = with_fields(fleet, vector_bytes=3 * 2**17 + 40, wide_bytes=24).rehearse(
        7, parameters=fleet.parameters(cipher=cipher, vector_bytes=3 * 2**17 + 40, wide_bytes=24)
    )
    with ThreadPoolExecutor(4) as pool:
        rehearsal.server._spread = Spread(9, pool.map)
        rehearsal.run_until(Unmasked, silent={"masked_input": rehearsal.devices[6:]})
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.devices[:6])


# --- chunks of a masked vector ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda payload: memoryview(bytearray(payload))])
@pytest.mark.parametrize("length", [64, 2048])
def test_a_payload_that_the_transport_uses_again_changes_nothing_that_was_verified(kind: Any, length: int) -> None:
    content, key = hashlib.shake_128(b"content").digest(length), bytes(32)
    upload = Assembly(expect(tag_vector(content, key, "chacha20", chunk_bytes=length), key, "chacha20"))
    payload = kind(encode_vector_chunk(VectorChunk(b"s" * 32, 0, content)))
    chunk = decode_vector_chunk(payload)
    assert upload.add(chunk.index, chunk.content)
    if isinstance(payload, bytearray) or (isinstance(payload, memoryview) and not payload.readonly):
        payload[40:] = bytes(length)
        assert bytes(chunk.content) == bytes(length)
    assert bytes(upload.chunks()[0]) == content


@pytest.mark.parametrize("index", [1, 2**16, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("content", [b"", b"c" * 64])
def test_a_chunk_of_an_index_that_the_vector_does_not_have_is_refused_before_and_after_it_is_whole(
    index: int, content: bytes
) -> None:
    vector, key = b"v" * 64, bytes(32)
    upload = Assembly(expect(tag_vector(vector, key, "chacha20", chunk_bytes=64), key, "chacha20"))
    chunk = decode_vector_chunk(encode_vector_chunk(VectorChunk(b"s" * 32, index, content)))
    for _ in range(2):
        with pytest.raises(BadBlob):
            upload.add(chunk.index, chunk.content)
        upload.add(0, vector)
    assert upload.chunks() == [vector]
