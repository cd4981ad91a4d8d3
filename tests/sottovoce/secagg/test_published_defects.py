"""Every defect that was published of, or reproduced in, another system's secure aggregation: none exists here.

Each test is named after the system, its issue number where there is one, and the defect.
"""

from __future__ import annotations

import ast
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aggregation_plans import plan_of
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

import sottovoce.secagg
from sottovoce.errors import (
    BadCertificate,
    BadShare,
    BadSignature,
    ConfigError,
    RemoteProtocolError,
    RoundAbandoned,
    UnexpectedMessage,
)
from sottovoce.identity import Identity, SignedContext, new_key
from sottovoce.plan import Aggregation, Counted, Plan
from sottovoce.secagg import keys
from sottovoce.secagg.client_stages import Aborted, InputMasked, KeysShared
from sottovoce.secagg.encoding import decode, encode
from sottovoce.secagg.lanes import Layout, layout_of
from sottovoce.secagg.segments import add_into
from sottovoce.secagg.server_stages import CollectingInputs, CollectingShares, SharingKeys, Unmasked
from sottovoce.wire.codec import open_envelope, parse, seal
from sottovoce.wire.messages import (
    AdvertiseKeys,
    MaskedInputRequest,
    ShareKeys,
    SurvivorsRequest,
    Unmasking,
    UnmaskingRequest,
)

PACKAGE = Path(sottovoce.secagg.__file__).parent
SOURCES = sorted(PACKAGE.glob("*.py"))
replace = msgspec.structs.replace


# --- flower: masks from a 32-bit seed in a Mersenne Twister (#7522) ---------------------------------------------------


def imported(source: Path) -> set[str]:
    """Every module that a file imports, and every attribute chain it uses, such as `np.random`."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = {alias.name for one in ast.walk(tree) if isinstance(one, ast.Import) for alias in one.names}
    names |= {str(one.module) for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
    return names | {ast.unparse(one) for one in ast.walk(tree) if isinstance(one, ast.Attribute)}


def test_flower_7522_masks_from_a_32_bit_seed_in_a_mersenne_twister_there_is_no_such_generator() -> None:
    assert len(SOURCES) > 10
    for source in SOURCES:
        used = imported(source)
        assert not used & {"random", "numpy.random", "np.random", "secrets"}, source.name
        assert not [name for name in used if name.startswith(("random.", "np.random."))], source.name


@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
def test_flower_7522_every_bit_of_a_256_bit_seed_changes_the_mask(cipher: Any) -> None:
    """Flower's masks depended on 32 bits of the seed: 2^32 tries unmasked anybody."""
    seed = random.Random(7522).randbytes(32)

    def key(changed: bytes) -> bytes:
        return keys.self_mask_key(changed, session=b"s" * 32, device="pi-1", cipher=cipher)

    def flipped(bit: int) -> bytes:
        return (int.from_bytes(seed, "little") ^ 1 << bit).to_bytes(32, "little")

    made = {key(flipped(bit)) for bit in range(256)} | {key(seed)}
    assert len(made) == 257
    assert len(key(seed)) * 8 >= 128
    secrets = [keys.key_pair(seed).agree(keys.key_pair(flipped(bit)).public) for bit in (4, 31, 32, 64, 200, 253)]
    assert len(set(secrets)) == len(secrets)


def test_flower_7522_the_entropy_behind_a_mask_is_drawn_whole(fleet: Any, fixed_entropy: Any) -> None:
    rehearsal = fleet.rehearse(5)
    device, asked = rehearsal.devices[0], list[int]()
    source = fixed_entropy(3)

    def entropy(count: int) -> bytes:
        asked.append(count)
        return bytes(source(count))

    rehearsal.clients[device] = fleet.client(device, bytearray(rehearsal.plain[device]), entropy=entropy)
    rehearsal.run_until(CollectingInputs)
    channel_key, mask_key, nonce, self_seed, *coefficients = asked
    assert (channel_key, mask_key, nonce, self_seed) == (32, 32, 32, 32)
    assert sum(coefficients) >= 2 * 2 * 18 * (rehearsal.server.stage.cohort.shape.threshold - 1)


# --- flower: one id both alive and dropped ----------------------------------------------------------------------------


def test_flower_one_id_alive_and_dropped_cannot_be_said() -> None:
    """Flower's unmasking request had two lists, and a client in both was unmasked. Here there is one set."""
    assert UnmaskingRequest.__struct_fields__ == ("survivors", "signatures", "inclusions")
    assert SurvivorsRequest.__struct_fields__ == ("survivors",)
    assert MaskedInputRequest.__struct_fields__ == ("senders", "ciphertexts")
    assert Unmasking.__struct_fields__ == ("shares",), "and no place for two shares of one owner in the answer"


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_flower_one_id_alive_and_dropped_no_device_gives_both_kinds_of_share(fleet: Any, mode: str) -> None:
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(mode=mode))
    requests = rehearsal.run_until(CollectingShares, silent={"masked_input": rehearsal.devices[7:]})
    for device in rehearsal.devices[:7]:
        client, request = rehearsal.clients[device], requests[device]
        given = rehearsal.answer(device, request)
        kinds, held = rehearsal.kinds_given(device, given), rehearsal.entrusted[device]
        assert kinds == {owner: "self_seed" if owner in request.survivors else "mask_key" for owner in range(8)}
        withheld = [share for owner, both in held.items() for kind, share in both.items() if kind != kinds[owner]]
        assert len(withheld) == 7
        assert not [share for share in withheld if share in given.shares]
        other = request.survivors[1:]
        with pytest.raises((UnexpectedMessage, RemoteProtocolError)):
            client.receive(replace(request, survivors=other))
        assert isinstance(client.stage, Aborted)


# --- flower: a client lost before key sharing crashes the survivors ---------------------------------------------------


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("lost", [1, 3])
def test_flower_a_client_lost_before_key_sharing_does_not_disturb_the_survivors(
    fleet: Any, mode: str, lost: int
) -> None:
    rehearsal = fleet.rehearse(12, parameters=fleet.parameters(mode=mode))
    rehearsal.run_until(Unmasked, silent={"share_keys": rehearsal.devices[:lost]})
    assert rehearsal.server.survivors == tuple(rehearsal.devices[lost:])
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.devices[lost:])


# --- flower: keys unsigned --------------------------------------------------------------------------------------------


def in_the_middle(roster: Any, identity: Identity, **changes: Any) -> Any:
    """The first advertisement of a roster with the middleman's own mask key, signed as well as he can."""
    envelope = parse(roster.advertisements[0])
    advertisement = msgspec.msgpack.decode(envelope.body, type=AdvertiseKeys)
    own = replace(advertisement, mask_key=keys.key_pair(b"m" * 32).public, **changes)
    context = SignedContext(identity.certificate.name, "conductor", "choir", 7, 1)
    return replace(roster, advertisements=(seal(own, identity, context), *roster.advertisements[1:]))


def test_flower_unsigned_keys_a_key_swapped_on_the_way_is_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(SharingKeys)
    roster, device = requests[rehearsal.devices[0]], rehearsal.devices[0]
    key = msgspec.msgpack.decode(parse(roster.advertisements[0]).body, type=AdvertiseKeys).mask_key
    swapped = roster.advertisements[0].replace(key, keys.key_pair(b"m" * 32).public)
    with pytest.raises(BadSignature):
        rehearsal.clients[device].receive(replace(roster, advertisements=(swapped, *roster.advertisements[1:])))
    own = rehearsal.answers[device][0]
    payload = fleet.envelope(device, own, session=bytes(32)).replace(own.mask_key, b"k" * 32)
    with pytest.raises(BadSignature):
        open_envelope(parse(payload), fleet.identities[device].certificate, payload)


def test_flower_unsigned_keys_a_middleman_with_a_certificate_of_his_own_is_refused(fleet: Any) -> None:
    """He signs properly: as another device of the fleet, or with a certificate that he made himself."""
    for chosen in ("another device", "a self-made certificate"):
        rehearsal = fleet.rehearse(6)
        requests = rehearsal.run_until(SharingKeys)
        device = rehearsal.devices[0]
        if chosen == "another device":
            identity = fleet.identities["pi-050"]
            forged = in_the_middle(requests[device], identity, certificate=identity.certificate.der)
            expected: type[Exception] = RemoteProtocolError
        else:
            forged = self_made(requests[device], fleet)
            expected = BadCertificate
        with pytest.raises(expected):
            rehearsal.clients[device].receive(forged)
        assert isinstance(rehearsal.clients[device].stage, Aborted)


def self_made(roster: Any, fleet: Any) -> Any:
    envelope = parse(roster.advertisements[0])
    real = x509.load_der_x509_certificate(fleet.identities[envelope.sender].certificate.der)
    key = new_key()
    builder = x509.CertificateBuilder().subject_name(real.subject).issuer_name(real.issuer).public_key(key.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(real.not_valid_before_utc).not_valid_after(real.not_valid_after_utc)
    )
    der = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    advertisement = msgspec.msgpack.decode(envelope.body, type=AdvertiseKeys)
    body = msgspec.msgpack.encode(replace(advertisement, certificate=der, mask_key=keys.key_pair(b"m" * 32).public))
    payload = msgspec.msgpack.encode(msgspec.structs.replace(envelope, body=body, fingerprint=b"f" * 32))
    return replace(roster, advertisements=(payload, *roster.advertisements[1:]))


# --- flower: silent wrap-around above 1024 clients --------------------------------------------------------------------


def song(*, lane: Any, maximum: int, size: int = 5) -> Plan:
    encoding, tensors = Counted(maximum=maximum), (f"int64[{size}]",)
    both = (Aggregation(name=name, tensors=tensors, encoding=encoding, lane=lane) for name in ("first", "second"))
    return plan_of(*both, weight_cap=1)


def sum_of_equals(layout: Layout, value: int, devices: int, size: int = 5) -> dict[str, Any]:
    """The decoded sum of `devices` devices that all give `value` first and nothing second."""
    values = {"first": [np.full(size, value)], "second": [np.zeros(size, np.int64)]}
    vector = encode(layout, values, weight=1, entropy=bytes)
    total = bytearray(layout.unpacked_bytes)
    for _ in range(devices):
        add_into(total, vector, layout)
    return decode(layout, total, survivors=devices).sums


@pytest.mark.parametrize("devices", [1024, 1025, 2000])
@pytest.mark.parametrize("lane", ["uint16", "3x21", "uint32", "dense", "uint64"])
def test_flower_wrap_around_above_1024_clients_the_sum_stays_exact_or_the_plan_is_refused(
    lane: str, devices: int
) -> None:
    width = {"uint16": 16, "3x21": 21, "uint32": 32, "dense": 32, "uint64": 48}[lane]
    largest = (2**width - 1) // devices
    layout = layout_of(song(lane=lane, maximum=largest), maximum_clients=devices)
    sums = sum_of_equals(layout, largest, devices)
    assert sums["first"][0].tolist() == [devices * largest] * 5
    assert sums["second"][0].tolist() == [0] * 5
    if lane != "uint64":
        with pytest.raises(ConfigError, match="does not fit"):
            layout_of(song(lane=lane, maximum=largest + 1), maximum_clients=devices)
        with pytest.raises(ConfigError, match="does not fit"):
            layout_of(song(lane=lane, maximum=largest), maximum_clients=devices + devices)


# --- flower: training inside the masked stage -------------------------------------------------------------------------


def test_flower_training_inside_the_masked_stage_there_is_no_place_for_it() -> None:
    """A session is made with the finished vector, and nothing that runs a program can be reached from secagg."""
    reachable = {name for source in SOURCES for name in imported(source)}
    assert not [name for name in reachable if name.startswith(("sottovoce.runtime", "sottovoce.bundle", "edge_agent"))]


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_flower_training_inside_the_masked_stage_a_device_lost_while_training_costs_nothing(
    fleet: Any, mode: str
) -> None:
    """Five of sixteen never come to the rendezvous: they are in no roster, nobody rebuilds a key of theirs."""
    rehearsal = fleet.rehearse(16, parameters=fleet.parameters(mode=mode))
    rehearsal.run_until(Unmasked, silent={"advertise_keys": rehearsal.devices[11:]})
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.devices[:11])
    assert len(rehearsal.requests[rehearsal.devices[0]][0].message.leaves) == 32 * 11
    kinds = [rehearsal.kinds_given(device, given) for device, given in rehearsal.shares_given()]
    assert kinds == [dict.fromkeys(range(11), "self_seed")] * 11


# --- FedML: LightSecAgg sends mask shares in the clear ----------------------------------------------------------------


def test_fedml_lightsecagg_shares_in_the_clear_no_share_is_in_any_message_that_the_server_sees(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8)
    rehearsal.run_until(CollectingInputs)
    secrets: set[bytes] = set()
    for client in rehearsal.clients.values():
        assert isinstance(client.stage, KeysShared)
        secrets |= {client.stage.self_seed, client.stage.mask.secret, client.stage.own_share}
    requests = {reply.device: reply.message for reply in rehearsal.server.outstanding()}
    for device, request in requests.items():
        rehearsal.answer(device, request)
        assert isinstance(rehearsal.clients[device].stage, InputMasked)
        secrets |= {share for both in rehearsal.holdings(device).values() for share in both.values()}
    assert len(secrets) == 8 * 3 + 8 * 7 * 2
    seen = [msgspec.msgpack.encode(m) for answers in rehearsal.answers.values() for m in answers]
    seen += [msgspec.msgpack.encode(reply.message) for sent in rehearsal.requests.values() for reply in sent]
    assert not [secret for secret in secrets for message in seen if secret in message]


def test_fedml_lightsecagg_shares_in_the_clear_nobody_but_the_neighbour_opens_them(fleet: Any) -> None:
    rehearsal = fleet.rehearse(5)
    requests = rehearsal.run_until(CollectingInputs)
    sent = [message for answers in rehearsal.answers.values() for message in answers if isinstance(message, ShareKeys)]
    ciphertexts = [ciphertext for message in sent for ciphertext in rehearsal.cut(message.ciphertexts, 88)]
    assert len(set(ciphertexts)) == 5 * 4
    reader_name = rehearsal.devices[0]
    reader = rehearsal.clients[reader_name]
    assert isinstance(reader.stage, KeysShared)
    own = {ciphertext for _, ciphertext in rehearsal.forwarded(requests[reader_name])}
    incoming = [
        keys.share_channel_key(channel, sender=reader.stage.seat.neighbours[position].device, recipient=reader_name)
        for position, channel in reader.stage.channels.items()
    ]
    opened = 0
    for ciphertext in ciphertexts:
        for key in incoming:
            try:
                keys.decrypt_shares(key, ciphertext, session=reader.session_id)
                opened += 1
                assert ciphertext in own
            except BadShare:
                pass
    assert opened == len(own) == 4


# --- Fed-BioMed: no dropout tolerated, overflow at 4 and at 10 nodes (#1056, #1210) -----------------------------------


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("stage", ["advertise_keys", "share_keys", "masked_input", "unmasking"])
def test_fed_biomed_no_dropout_tolerated_here_every_stage_survives_one(fleet: Any, mode: str, stage: str) -> None:
    rehearsal = fleet.rehearse(10, parameters=fleet.parameters(mode=mode))
    rehearsal.run_until(Unmasked, silent={stage: rehearsal.devices[:1]})
    alive = rehearsal.devices if stage == "unmasking" else rehearsal.devices[1:]
    assert rehearsal.server.survivors == tuple(alive)
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(alive)


@pytest.mark.parametrize("devices", [4, 10])
@pytest.mark.parametrize("lane", ["uint16", "3x21", "uint32", "dense", "uint64"])
def test_fed_biomed_1056_1210_overflow_at_4_and_10_nodes_the_largest_values_add_up(
    fleet: Any, fixed_entropy: Any, lane: str, devices: int
) -> None:
    """Whole sessions of the largest values that the plan allows for exactly so many devices."""
    width = {"uint16": 16, "3x21": 21, "uint32": 32, "dense": 32, "uint64": 48}[lane]
    largest = (2**width - 1) // devices
    layout = layout_of(song(lane=lane, maximum=largest), maximum_clients=devices)
    shape = {name: getattr(layout, name) for name in ("vector_bytes", "wide_bytes", "packed")}
    parameters = fleet.parameters(maximum_clients=devices, **shape)
    rehearsal = fleet.rehearse(devices, parameters=parameters)
    values = {"first": [np.full(5, largest)], "second": [np.full(5, largest)]}
    for index, device in enumerate(rehearsal.devices):
        vector = encode(layout, values, weight=1, entropy=bytes)
        rehearsal.clients[device] = fleet.client(device, vector, parameters=parameters, entropy=fixed_entropy(index))
    rehearsal.run_until(Unmasked)
    found = decode(layout, rehearsal.server.result, survivors=devices)
    for name in ("first", "second"):
        assert found.sums[name][0].tolist() == [devices * largest] * 5


# --- one packed lane carrying into the next (#789) --------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["uint16", "3x21", "dense"])
def test_789_one_packed_lane_carrying_into_the_next_no_largest_sum_touches_its_neighbours(lane: str) -> None:
    """Every other entry at its maximum, on 100 devices: the entries between stay zero."""
    maximum = {"uint16": 655, "3x21": 20971, "dense": 1023}[lane]
    layout = layout_of(song(lane=lane, maximum=maximum, size=130), maximum_clients=100)
    pattern = np.where(np.arange(130) % 2, maximum, 0)
    values = {"first": [pattern], "second": [pattern[::-1].copy()]}
    vector = encode(layout, values, weight=1, entropy=bytes)
    total = bytearray(layout.unpacked_bytes)
    for _ in range(100):
        add_into(total, vector, layout)
    sums = decode(layout, total, survivors=100).sums
    assert sums["first"][0].tolist() == (100 * pattern).tolist()
    assert sums["second"][0].tolist() == (100 * pattern[::-1]).tolist()


@pytest.mark.parametrize("lane", ["uint16", "3x21", "dense", "uint32"])
def test_789_one_packed_lane_carrying_into_the_next_a_device_that_overflows_on_purpose_is_noticed(lane: str) -> None:
    """It puts the largest word there is where an entry belongs; the sum is refused and no garbage comes out."""
    layout = layout_of(song(lane=lane, maximum=100), maximum_clients=100)
    honest = encode(layout, {name: [np.full(5, 50)] for name in ("first", "second")}, weight=1, entropy=bytes)
    total = bytearray(layout.unpacked_bytes)
    for _ in range(9):
        add_into(total, honest, layout)
    word = layout.lanes[0].start
    liar = bytearray(honest)
    liar[word : word + 2] = b"\xff\x3f"
    add_into(total, liar, layout)
    with pytest.raises(RoundAbandoned, match="impossible_sum"):
        decode(layout, total, survivors=10)


def test_the_list_of_defects_is_complete() -> None:
    """One test at least for each published defect; the names are what a reader searches for."""
    names = " ".join(name for name in globals() if name.startswith("test_"))
    for words in (
        "mersenne_twister", "alive_and_dropped", "lost_before_key_sharing", "unsigned_keys", "above_1024_clients",
        "training_inside_the_masked_stage", "lightsecagg", "no_dropout_tolerated", "overflow_at_4_and_10", "789",
    ):  # fmt: skip
        assert words in names
