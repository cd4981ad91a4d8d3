"""A lying server, broker or peer against the real device, and lying devices against the real server.

Every attack ends in a named error; the device drops its secrets, the server keeps its state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sottovoce.errors import (
    BadBlob,
    BadCertificate,
    BadShare,
    BadSignature,
    ConfigError,
    ConflictingMessage,
    CryptoError,
    Equivocation,
    LocalProtocolError,
    LowOrderPoint,
    MalformedMessage,
    PolicyRefusal,
    RemoteProtocolError,
    Replayed,
    RoundAbandoned,
    SottovoceError,
    UnexpectedMessage,
)
from sottovoce.identity import SignedContext
from sottovoce.secagg import keys, shamir
from sottovoce.secagg.client import ClientTerms
from sottovoce.secagg.client_stages import Aborted, InputMasked, Revealed
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.roster import check_advertisement
from sottovoce.secagg.server_stages import (
    Abandoned,
    Candidate,
    CheckingConsistency,
    CollectingInputs,
    CollectingShares,
    SharingKeys,
    Unmasked,
)
from sottovoce.secagg.transcript import leaf_of, survivors_digest
from sottovoce.secagg.uploads import expect, tag_vector
from sottovoce.wire.chunks import Assembly, assemble
from sottovoce.wire.codec import parse, seal
from sottovoce.wire.messages import (
    AdvertiseKeys,
    MaskedInput,
    MaskedInputRequest,
    Roster,
    SurvivorsRequest,
    SurvivorsSignature,
    Unmasking,
    UnmaskingRequest,
)

replace = msgspec.structs.replace
Change = Callable[[Any, Any], Any]


def assert_refused(client: Any, request: Any, error: type[SottovoceError], match: str | None = None) -> None:
    """The device refuses `request` by exactly this kind of error, and is then empty."""
    with pytest.raises(error, match=match) as caught:
        client.receive(request)
    assert type(caught.value) is error
    assert isinstance(client.stage, Aborted)
    assert client.masked_vector is None
    with pytest.raises(UnexpectedMessage):
        client.receive(request)


# --- the roster -------------------------------------------------------------------------------------------------------


def swap_first_two(roster: Roster, _: Any) -> Roster:
    first, second, *rest = roster.advertisements
    return replace(roster, advertisements=(second, first, *rest))


def tampered(roster: Roster, _: Any) -> Roster:
    """A broker that swaps a key inside a signed advertisement."""
    first, *rest = roster.advertisements
    key = msgspec.msgpack.decode(parse(first).body, type=AdvertiseKeys).mask_key
    return replace(roster, advertisements=(first.replace(key, b"k" * 32), *rest))


def reissued(message_changes: dict[str, Any], context_changes: dict[str, Any], *, keep_leaf: bool = True) -> Change:
    """A corrupt member that signs another advertisement for the same leaf."""

    def change(roster: Roster, rehearsal: Any) -> Roster:
        envelope = parse(roster.advertisements[0])
        advertisement = msgspec.msgpack.decode(envelope.body, type=AdvertiseKeys)
        context = {name: getattr(envelope.context, name) for name in SignedContext.__struct_fields__}
        identity = rehearsal.fleet.identities[envelope.sender]
        payload = seal(
            replace(advertisement, **message_changes), identity, SignedContext(**(context | context_changes))
        )
        return replace(roster, advertisements=(payload, *roster.advertisements[1:]))

    return change


ROSTERS: dict[str, tuple[Change, type[SottovoceError]]] = {
    "threshold lowered": (lambda r, _: replace(r, threshold=r.threshold - 1), RemoteProtocolError),
    "threshold raised": (lambda r, _: replace(r, threshold=r.threshold + 1), RemoteProtocolError),
    "fewer neighbours": (lambda r, _: replace(r, neighbours=r.neighbours - 1), RemoteProtocolError),
    "leaves not sorted": (lambda r, _: replace(r, leaves=r.leaves[32:] + r.leaves[:32]), MalformedMessage),
    "a leaf twice": (lambda r, _: replace(r, leaves=r.leaves[:32] + r.leaves), MalformedMessage),
    "half a leaf": (lambda r, _: replace(r, leaves=r.leaves[:-1]), MalformedMessage),
    "no leaves": (lambda r, _: replace(r, leaves=b""), MalformedMessage),
    "an advertisement missing": (lambda r, _: replace(r, advertisements=r.advertisements[1:]), MalformedMessage),
    "advertisements swapped": (swap_first_two, RemoteProtocolError),
    "not an envelope": (lambda r, _: replace(r, advertisements=(b"?", *r.advertisements[1:])), MalformedMessage),
    "a key swapped by the broker": (tampered, BadSignature),
    "another model for this victim": (reissued({"state": b"z" * 32}, {}), RemoteProtocolError),
    "another plan": (reissued({"plan": b"z" * 32}, {}), RemoteProtocolError),
    "other parameters": (reissued({"parameters": b"z" * 32}, {}), RemoteProtocolError),
    "an advertisement of another round": (reissued({}, {"round": 6}), Replayed),
    "an advertisement of another attempt": (reissued({}, {"attempt": 0}), Replayed),
    "an advertisement of another session": (reissued({}, {"session": b"x" * 32}), Replayed),
    "an advertisement for another coordinator": (reissued({}, {"recipient": "impostor"}), Replayed),
    "a low-order mask key": (reissued({"mask_key": bytes(32)}, {}), LowOrderPoint),
    "a low-order channel key": (reissued({"channel_key": b"\1" + bytes(31)}, {}), LowOrderPoint),
    "a short key": (reissued({"mask_key": bytes(31)}, {}), MalformedMessage),
    "a short nonce": (reissued({"nonce": bytes(31)}, {}), MalformedMessage),
    "fresh keys for an old leaf": (reissued({"mask_key": b"m" * 32}, {}), RemoteProtocolError),
}


@pytest.mark.parametrize("name", ROSTERS)
def test_a_roster_that_lies_is_refused(fleet: Any, name: str) -> None:
    change, error = ROSTERS[name]
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(SharingKeys)
    device = rehearsal.devices[0]
    assert_refused(rehearsal.clients[device], change(requests[device], rehearsal), error)


def test_an_advertisement_is_good_for_one_roster_only(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(SharingKeys)
    device = rehearsal.devices[0]
    rehearsal.answer(device, requests[device])
    other_server = fleet.server(rehearsal.devices[:5], fleet.parameters())
    for name in rehearsal.devices[:5]:
        other_server.receive(rehearsal.opened(name, rehearsal.clients[name].advertise(), session=bytes(32)))
    second = {reply.device: reply.message for reply in other_server.close_stage()}
    assert_refused(rehearsal.clients[device], second[device], UnexpectedMessage)


def test_a_roster_without_this_device_is_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(7)
    outsider = rehearsal.devices[6]
    rehearsal.clients[outsider].advertise()
    requests = rehearsal.run_until(SharingKeys, silent={"advertise_keys": [outsider]})
    assert_refused(
        rehearsal.clients[outsider], requests[rehearsal.devices[0]], RemoteProtocolError, "not in the roster"
    )


def test_sybils_below_the_devices_minimum_are_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(9)
    device = rehearsal.devices[0]
    rehearsal.clients[device] = fleet.client(device, bytearray(rehearsal.plain[device]), terms=ClientTerms())
    requests = rehearsal.run_until(SharingKeys)
    assert_refused(rehearsal.clients[device], requests[device], PolicyRefusal, "minimum_cohort")


def test_one_device_under_two_leaves_is_refused(fleet: Any) -> None:
    """A corrupt device advertises twice and the server counts it as two."""
    rehearsal = fleet.rehearse(6)
    rehearsal.advertise(rehearsal.devices)
    twin = rehearsal.devices[5]
    again = fleet.client(twin, bytearray(fleet.vector_bytes), entropy=lambda count: b"t" * count)
    server = rehearsal.server
    opened = rehearsal.opened(twin, again.advertise(), session=bytes(32))
    server.stage.answers["a twin"] = Candidate(check_advertisement(server._agreement, opened), opened.payload)
    requests = rehearsal.close()
    assert_refused(
        rehearsal.clients[rehearsal.devices[0]], requests[rehearsal.devices[0]], RemoteProtocolError, "twice"
    )


def test_an_earlier_advertisement_of_this_device_beside_its_new_one_is_refused(fleet: Any) -> None:
    """The device restarted within the round; the server keeps both advertisements."""
    rehearsal = fleet.rehearse(6)
    device = rehearsal.devices[0]
    before = fleet.client(device, bytearray(fleet.vector_bytes), entropy=lambda count: b"e" * count)
    rehearsal.advertise(rehearsal.devices)
    opened = rehearsal.opened(device, before.advertise(), session=bytes(32))
    server = rehearsal.server
    earlier = Candidate(check_advertisement(server._agreement, opened), opened.payload)
    everybody = sorted([*server.stage.answers.values(), earlier], key=lambda candidate: candidate.member.leaf)
    own = server.stage.answers[device]
    roster = Roster(
        leaves=b"".join(candidate.member.leaf for candidate in everybody),
        neighbours=6,
        threshold=5,
        advertisements=tuple(candidate.payload for candidate in everybody if candidate is not own),
    )
    assert_refused(rehearsal.clients[device], roster, RemoteProtocolError, "this device is in the roster twice")


@pytest.mark.parametrize(
    ("neighbours", "threshold", "match"),
    [
        (200, 106, "the rules give 200 and 107"),
        (20, 18, "do not protect"),
        (50, 30, "do not protect"),
        (51, 45, "a ring of 201"),
        (50, 51, "a ring of 201"),
        (50, 1, "a ring of 201"),
        (202, 150, "a ring of 201"),
        (-2, -2, "a ring of 201"),
    ],
)
def test_figures_that_do_not_protect_a_large_cohort_are_refused(
    fleet: Any, neighbours: int, threshold: int, match: str
) -> None:
    client = fleet.client("pi-000", bytearray(fleet.vector_bytes), parameters=fleet.parameters(maximum_clients=300))
    identity = fleet.identities["pi-000"]
    own = leaf_of("pi-000", identity.certificate.fingerprint, client.advertise())
    leaves = sorted([own, *(bytes([number]) * 32 for number in range(200))])
    roster = Roster(leaves=b"".join(leaves), neighbours=neighbours, threshold=threshold, advertisements=())
    assert_refused(client, roster, RemoteProtocolError, match)


def test_fewer_than_the_sessions_own_minimum_are_refused_before_masking(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(minimum_survivors=7))
    requests = rehearsal.run_until(CollectingInputs)
    device = rehearsal.devices[0]
    fewer = rehearsal.forwarding(rehearsal.forwarded(requests[device])[:5])
    assert_refused(rehearsal.clients[device], fewer, RemoteProtocolError, "needs 7")


def test_a_certificate_that_expired_or_is_a_coordinators_is_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    device = rehearsal.devices[0]
    late = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
    rehearsal.clients[device] = fleet.client(device, bytearray(rehearsal.plain[device]), at=late)
    requests = rehearsal.run_until(SharingKeys)
    assert_refused(rehearsal.clients[device], requests[device], BadCertificate)


def test_a_cohort_larger_than_the_lanes_allow_is_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(7)
    device = rehearsal.devices[0]
    small = fleet.parameters(maximum_clients=5)
    rehearsal.clients[device] = fleet.client(device, bytearray(rehearsal.plain[device]), parameters=small)
    rehearsal.advertise(rehearsal.devices[1:])
    rehearsal.clients[device].advertise()
    roster = rehearsal.close()[rehearsal.devices[1]]
    assert_refused(rehearsal.clients[device], roster, RemoteProtocolError, "at most 5")


# --- the parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "terms", "error"),
    [
        ({"mode": "curious"}, ClientTerms(), PolicyRefusal),
        ({"maximum_clients": 9}, ClientTerms(), PolicyRefusal),
        ({"corrupt_share_bp": 999}, ClientTerms(minimum_corrupt_share_bp=1000), PolicyRefusal),
        ({"corrupt_share_bp": 499}, ClientTerms(minimum_corrupt_share_bp=0), RemoteProtocolError),
        ({"corrupt_share_bp": 5000}, ClientTerms(), RemoteProtocolError),
        ({"dropout_share_bp": 499}, ClientTerms(), RemoteProtocolError),
        ({"minimum_survivors": 2}, ClientTerms(), RemoteProtocolError),
        ({"minimum_survivors": 101}, ClientTerms(), RemoteProtocolError),
        ({"maximum_clients": 2}, ClientTerms(minimum_cohort=3), RemoteProtocolError),
        ({"vector_bytes": 64}, ClientTerms(), RemoteProtocolError),
        ({"vector_bytes": 76}, ClientTerms(), RemoteProtocolError),
        ({"wide_bytes": 8}, ClientTerms(), RemoteProtocolError),
        ({"wide_bytes": 80}, ClientTerms(), RemoteProtocolError),
    ],
)
def test_parameters_against_the_rules_or_the_owner_are_refused(
    fleet: Any, changes: dict[str, Any], terms: ClientTerms, error: type[SottovoceError]
) -> None:
    vector = bytearray(b"v" * fleet.vector_bytes)
    client = fleet.client("pi-000", vector, parameters=fleet.parameters(**changes), terms=terms)
    with pytest.raises(error):
        client.advertise()
    assert isinstance(client.stage, Aborted)
    assert bytes(vector) == bytes(len(vector))


@pytest.mark.parametrize("changes", [{"minimum_cohort": 2}, {"minimum_honest_survivors": 1}, {"modes": ()}])
def test_an_owner_cannot_go_below_the_hard_floors(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ClientTerms(**changes)


# --- shares and masked input ------------------------------------------------------------------------------------------


def forwarded_as(change: Callable[[list[tuple[int, bytes]]], list[tuple[int, bytes]]]) -> Change:
    """What the server forwards, with `change` made to the pairs of sender and ciphertext."""
    return lambda request, rehearsal: rehearsal.forwarding(change(rehearsal.forwarded(request)))


def redirected(pairs: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    (first, one), (second, other), *rest = pairs
    return [(first, other), (second, one), *rest]


MASKINGS: dict[str, tuple[Change, type[SottovoceError]]] = {
    "below the threshold": (forwarded_as(lambda p: p[:2]), RemoteProtocolError),
    "no shares at all": (forwarded_as(lambda p: []), RemoteProtocolError),
    "an unknown position": (forwarded_as(lambda p: [*p, (6, p[0][1])]), MalformedMessage),
    "a negative position": (forwarded_as(lambda p: [(-1, p[0][1]), *p]), MalformedMessage),
    "a position twice": (forwarded_as(lambda p: [p[0], *p]), MalformedMessage),
    "unsorted": (forwarded_as(lambda p: p[::-1]), MalformedMessage),
    "shares swapped": (forwarded_as(redirected), BadShare),
    "another order of the ciphertexts": (
        lambda r, one: replace(r, ciphertexts=b"".join(one.cut(r.ciphertexts, 88)[::-1])), BadShare,
    ),
    "one ciphertext for all": (lambda r, _: replace(r, ciphertexts=r.ciphertexts[:88] * len(r.senders)), BadShare),
    "a byte changed": (forwarded_as(lambda p: [(p[0][0], b"\0" * len(p[0][1])), *p[1:]]), BadShare),
    "a byte moved over the border": (
        forwarded_as(lambda p: [(p[0][0], p[0][1][:-1]), (p[1][0], p[0][1][-1:] + p[1][1][1:] + b"x"), *p[2:]]),
        BadShare,
    ),
    "cut short": (forwarded_as(lambda p: [(p[0][0], b"short"), *p[1:]]), MalformedMessage),
    "a byte less": (lambda r, _: replace(r, ciphertexts=r.ciphertexts[:-1]), MalformedMessage),
    "a byte more": (lambda r, _: replace(r, ciphertexts=r.ciphertexts + b"x"), MalformedMessage),
    "no ciphertexts": (lambda r, _: replace(r, ciphertexts=b""), MalformedMessage),
    "one ciphertext less than senders": (lambda r, _: replace(r, ciphertexts=r.ciphertexts[:-88]), MalformedMessage),
    "one ciphertext more than senders": (
        lambda r, _: replace(r, ciphertexts=r.ciphertexts + r.ciphertexts[-88:]), MalformedMessage,
    ),
    "one sender less than ciphertexts": (lambda r, _: replace(r, senders=r.senders[:-1]), MalformedMessage),
    "one sender left out and the ciphertexts shifted": (
        lambda r, _: replace(r, senders=r.senders[1:], ciphertexts=r.ciphertexts[:-88]), BadShare,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKINGS)
def test_shares_that_are_not_the_neighbours_are_refused_before_masking(fleet: Any, name: str) -> None:
    change, error = MASKINGS[name]
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(CollectingInputs)
    device = rehearsal.devices[0]
    client = rehearsal.clients[device]
    vector = client.stage.vector
    assert_refused(client, change(requests[device], rehearsal), error)
    assert bytes(vector) == bytes(len(vector))


@pytest.mark.parametrize("shares", [b"\xff\xff" * 36, b"\x00\x00" * 35 + b"\xf1\xff"], ids=len)
def test_a_limb_out_of_range_is_refused_though_it_decrypts(fleet: Any, shares: bytes) -> None:
    client, request, rehearsal = masking(fleet)
    first, *rest = rehearsal.forwarded(request)
    forged = rehearsal.forwarding([(first[0], resealed(client, first[0], shares)), *rest])
    assert_refused(client, forged, BadShare)


@pytest.mark.parametrize("sizes", [(70, 72), (74, 72), (70, 74), (74, 70), (0, 144)], ids=str)
def test_a_length_out_of_range_is_refused_though_it_decrypts(fleet: Any, sizes: tuple[int, int]) -> None:
    """Two neighbours together: what the one has too few the other has too many, or else the total shows it."""
    client, request, rehearsal = masking(fleet)
    first, second, *rest = rehearsal.forwarded(request)
    contents = [
        (position, resealed(client, position, bytes(size)))
        for (position, _), size in zip((first, second), sizes, strict=True)
    ]
    expected = BadShare if sum(sizes) == 144 else MalformedMessage
    assert_refused(client, rehearsal.forwarding([*contents, *rest]), expected)


def test_shares_of_the_right_form_are_accepted_so_that_the_two_before_prove_something(fleet: Any) -> None:
    client, request, rehearsal = masking(fleet)
    first, *rest = rehearsal.forwarded(request)
    client.receive(rehearsal.forwarding([(first[0], resealed(client, first[0], bytes(72))), *rest]))
    assert isinstance(client.stage, InputMasked)


def masking(fleet: Any) -> tuple[Any, MaskedInputRequest, Any]:
    """A device that is about to mask, what it is asked, and its rehearsal."""
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(CollectingInputs)
    device = rehearsal.devices[0]
    return rehearsal.clients[device], requests[device], rehearsal


def resealed(client: Any, position: int, shares: bytes) -> bytes:
    """What the neighbour at `position` could have encrypted instead, being corrupt."""
    stage = client.stage
    sender, recipient = stage.seat.neighbours[position].device, client._setting.device
    key = keys.share_channel_key(stage.channels[position], sender=sender, recipient=recipient)
    return keys.encrypt_shares(key, shares, session=client.session_id)


def test_a_replayed_session_is_refused(fleet: Any) -> None:
    """Requests of one session mean nothing in the next, though the same devices take part."""
    first, second = fleet.rehearse(6, seed=1), fleet.rehearse(6, seed=2)
    old = first.run_until(CollectingInputs)
    second.run_until(CollectingInputs)
    device = second.devices[0]
    with pytest.raises((BadShare, MalformedMessage)):
        second.clients[device].receive(old[device])


# --- survivors and unmasking ------------------------------------------------------------------------------------------


def position_of(rehearsal: Any, device: str) -> int:
    return int(rehearsal.server.stage.inputs.cohort.position_of[device])


SURVIVORS: dict[str, tuple[Callable[[list[int], int], list[int]], type[SottovoceError]]] = {
    "without this device, which has uploaded": (lambda s, me: [p for p in s if p != me], RemoteProtocolError),
    "a member twice": (lambda s, me: sorted([*s, s[-1]]), MalformedMessage),
    "an unknown member": (lambda s, me: [*s, 8], MalformedMessage),
    "a negative member": (lambda s, me: [-1, *s], MalformedMessage),
    "unsorted": (lambda s, me: s[::-1], MalformedMessage),
    "nobody": (lambda s, me: [], RemoteProtocolError),
    "below the threshold": (lambda s, me: sorted({me, *s[:2]}), RemoteProtocolError),
    "a whole neighbourhood listed as dropped": (lambda s, me: [me], RemoteProtocolError),
    "a member that never shared keys": (lambda s, me: list(range(8)), RemoteProtocolError),
}


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("name", SURVIVORS)
def test_a_survivor_set_that_cannot_be_is_refused(fleet: Any, mode: str, name: str) -> None:
    change, error = SURVIVORS[name]
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(mode=mode))
    stage = CheckingConsistency if mode == "active" else CollectingShares
    requests = rehearsal.run_until(stage, silent={"share_keys": rehearsal.devices[7:]})
    device = rehearsal.devices[0]
    survivors = tuple(change(list(requests[device].survivors), position_of(rehearsal, device)))
    assert_refused(rehearsal.clients[device], replace(requests[device], survivors=survivors), error)


def test_nobody_can_be_listed_alive_and_dropped_at_once() -> None:
    """The request holds one set; there is no second list to contradict it (flower's ServerSecAgg had two)."""
    assert UnmaskingRequest.__struct_fields__ == ("survivors", "signatures", "inclusions")
    assert SurvivorsRequest.__struct_fields__ == ("survivors",)


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_second_different_unmasking_request_is_refused(fleet: Any, mode: str) -> None:
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(mode=mode))
    requests = rehearsal.run_until(CollectingShares)
    device = rehearsal.devices[0]
    client = rehearsal.clients[device]
    rehearsal.answer(device, requests[device])
    assert isinstance(client.stage, Revealed)
    fewer = tuple(p for p in requests[device].survivors if p != (position_of(rehearsal, device) + 1) % 8)
    assert_refused(client, replace(requests[device], survivors=fewer), UnexpectedMessage)


def test_a_second_survivor_set_is_not_signed(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8)
    requests = rehearsal.run_until(CheckingConsistency)
    device = rehearsal.devices[0]
    rehearsal.answer(device, requests[device])
    fewer = tuple(p for p in requests[device].survivors if p != (position_of(rehearsal, device) + 1) % 8)
    assert_refused(rehearsal.clients[device], SurvivorsRequest(survivors=fewer), UnexpectedMessage)


def signed(rehearsal: Any, device: str, survivors: tuple[int, ...], **context: Any) -> bytes:
    """A corrupt member's signature on any set it is asked to sign."""
    session = rehearsal.server.session_id
    fields: dict[str, Any] = {"sender": device, "recipient": "conductor", "fleet": "choir", "round": 7, "attempt": 1}
    digest = survivors_digest(survivors, session=session)
    settings = fields | {"session": session} | context
    return seal(SurvivorsSignature(survivors=digest), rehearsal.fleet.identities[device], SignedContext(**settings))


@pytest.fixture
def agreed(fleet: Any) -> Any:
    """Eight members of which one dropped out; everybody has signed, nobody has revealed."""
    rehearsal = fleet.rehearse(8)
    rehearsal.run_until(CollectingShares, silent={"masked_input": rehearsal.devices[7:]})
    return rehearsal


def test_another_set_than_the_signed_one_is_refused_though_the_signatures_are_on_the_signed_one(agreed: Any) -> None:
    device = agreed.devices[0]
    request = agreed.requests[device][-1].message
    dropped = next(p for p in request.survivors if p != position_of(agreed, device))
    fewer = tuple(p for p in request.survivors if p != dropped)
    assert_refused(
        agreed.clients[device], replace(request, survivors=fewer), RemoteProtocolError, "than the one signed"
    )


def test_another_set_than_the_signed_one_is_refused_also_when_corrupt_peers_sign_both(agreed: Any) -> None:
    device, *others = agreed.devices[:7]
    request = agreed.requests[device][-1].message
    dropped = next(p for p in request.survivors if p not in (position_of(agreed, device),))
    fewer = tuple(p for p in request.survivors if p != dropped)
    signatures = tuple(signed(agreed, other, fewer) for other in others)
    assert_refused(
        agreed.clients[device], UnmaskingRequest(survivors=fewer, signatures=signatures), RemoteProtocolError
    )


def test_a_neighbour_that_signed_another_set_is_kept_as_evidence(agreed: Any) -> None:
    device, other, *_ = agreed.devices
    request = agreed.requests[device][-1].message
    lie = signed(agreed, other, request.survivors[1:])
    client = agreed.clients[device]
    with pytest.raises(Equivocation) as caught:
        client.receive(replace(request, signatures=(*request.signatures, lie)))
    assert caught.value.evidence == (lie,)
    assert client.stage == Aborted(caught.value)


def test_signatures_must_be_t_valid_ones_of_distinct_surviving_neighbours(agreed: Any, fleet: Any) -> None:
    devices = agreed.devices
    request = agreed.requests[devices[0]][-1].message
    one = request.signatures[0]
    rest = request.signatures[1:]
    cases: list[tuple[tuple[bytes, ...], type[SottovoceError]]] = [
        (rest, RemoteProtocolError),
        ((*rest, rest[0]), MalformedMessage),
        (rest[:1] * len(request.signatures), MalformedMessage),
        ((*rest, signed(agreed, devices[2], request.survivors, session=b"o" * 32)), Replayed),
        ((*rest, signed(agreed, devices[2], request.survivors, round=6)), Replayed),
        ((*rest, signed(agreed, devices[3], request.survivors, attempt=2)), Replayed),
        ((*rest, signed(agreed, devices[4], request.survivors)[:-64] + bytes(64)), CryptoError),
        ((*rest, b"nothing"), MalformedMessage),
    ]
    sessions = [fleet.rehearse(8) for _ in cases]
    for rehearsal, (signatures, error) in zip(sessions, cases, strict=True):
        rehearsal.run_until(CollectingShares, silent={"masked_input": devices[7:]})
        assert rehearsal.server.session_id == agreed.server.session_id
        with pytest.raises(error):
            rehearsal.clients[devices[0]].receive(replace(request, signatures=signatures))
        assert isinstance(rehearsal.clients[devices[0]].stage, Aborted)
    assert one not in rest


def test_the_own_and_a_dropped_members_signature_do_not_count(agreed: Any) -> None:
    device, dropped = agreed.devices[0], agreed.devices[7]
    request = agreed.requests[device][-1].message
    for signer in (device, dropped):
        payload = signed(agreed, signer, request.survivors)
        client = agreed.clients[device]
        if isinstance(client.stage, Aborted):
            client = agreed.clients[agreed.devices[1]]
            payload = signed(agreed, agreed.devices[1] if signer == device else signer, request.survivors)
        with pytest.raises(MalformedMessage, match="not a surviving neighbour"):
            client.receive(replace(request, signatures=(*request.signatures[1:], payload)))


def test_signatures_in_curious_mode_are_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6, parameters=fleet.parameters(mode="curious"))
    requests = rehearsal.run_until(CollectingShares)
    device = rehearsal.devices[0]
    assert_refused(rehearsal.clients[device], replace(requests[device], signatures=(b"x",)), MalformedMessage)


# --- lying devices against the server ---------------------------------------------------------------------------------


def test_the_server_refuses_advertisements_that_are_not_for_this_session(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    device = rehearsal.devices[0]
    good = rehearsal.clients[device].advertise()
    cases: list[tuple[Any, dict[str, Any], type[SottovoceError]]] = [
        (good, {"session": b"s" * 32}, Replayed),
        (replace(good, state=b"z" * 32), {}, RemoteProtocolError),
        (replace(good, certificate=fleet.identities["pi-005"].certificate.der), {}, RemoteProtocolError),
        (replace(good, mask_key=bytes(32)), {}, LowOrderPoint),
        (replace(good, channel_key=b"\xff" * 32), {}, CryptoError),
        (replace(good, nonce=b""), {}, MalformedMessage),
    ]
    cases[4] = (replace(good, channel_key=(2**255 - 18).to_bytes(32, "little")), {}, LowOrderPoint)
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
    assert rehearsal.server.stage.answers[position_in(rehearsal, device)] == reply


def position_in(rehearsal: Any, device: str) -> int:
    return int(rehearsal.server.stage.cohort.position_of[device])


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
    made_up = assemble(expect(tag_vector(zeros, key, chunk_bytes=100), key), zeros)
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
        rehearsal.send(other, MaskedInput(vector=tag_vector(b"too short", key, chunk_bytes=100)))
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


def cut(shares: bytes) -> list[bytes]:
    return [shares[at : at + 36] for at in range(0, len(shares), 36)]


def wrong_shares(answer: Unmasking, liar: int = 0) -> Unmasking:
    """Other shares that are in range, wrong in another way for every liar."""
    return Unmasking(b"".join(wrong_share(share, liar) for share in cut(answer.shares)))


def wrong_share(content: bytes, liar: int = 0) -> bytes:
    # Hashed, for errors that lie on a polynomial of low degree can vanish at 0 and leave the secret right.
    error = 1 + int.from_bytes(hashlib.sha256(bytes([liar])).digest(), "little") % (shamir.PRIME - 1)
    limb = (int.from_bytes(content[:2], "little") + error) % shamir.PRIME
    return limb.to_bytes(2, "little") + content[2:]


@pytest.mark.parametrize("liars", [1, 2, 3])
def test_a_few_wrong_shares_are_survived(fleet: Any, liars: int) -> None:
    rehearsal = fleet.rehearse(14, parameters=fleet.parameters(mode="curious"))
    requests = rehearsal.run_until(CollectingShares, silent={"masked_input": rehearsal.devices[12:]})
    for index, device in enumerate(rehearsal.devices[:12]):
        answer = rehearsal.clients[device].receive(requests[device])
        if index % 3 == 0 and index < 3 * liars:
            answer = wrong_shares(answer)
        rehearsal.send(device, answer)
    rehearsal.close()
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.devices[:12])


def test_too_many_wrong_shares_abandon_the_round_and_no_garbage_comes_out(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(mode="curious"))
    requests = rehearsal.run_until(CollectingShares)
    for index, device in enumerate(rehearsal.devices):
        answer = rehearsal.clients[device].receive(requests[device])
        if index < 5:
            answer = wrong_shares(answer, index)
        rehearsal.send(device, answer)
    with pytest.raises(RoundAbandoned) as caught:
        rehearsal.close()
    assert caught.value.reason == "bad_shares"
    assert rehearsal.server.stage == Abandoned("bad_shares")


def reordered(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Any, str, Unmasking], Unmasking]:
    return lambda _rehearsal, _device, answer: Unmasking(b"".join(change(cut(answer.shares))))


def of_the_other_kind(rehearsal: Any, device: str, answer: Unmasking) -> Unmasking:
    """The shares that nobody asked for: of a survivor's mask key, of a dropped member's self seed."""
    kinds = rehearsal.kinds_given(device, answer)
    shares = []
    for owner, both in rehearsal.entrusted[device].items():
        others = [content for kind, content in both.items() if kind != kinds[owner]]
        shares.append(others[0] if others else both[kinds[owner]])  # Of its own mask key it holds no share.
    return Unmasking(b"".join(shares))


LIES: dict[str, Callable[[Any, str, Unmasking], Unmasking]] = {
    "backwards": reordered(lambda shares: shares[::-1]),
    "the first two swapped": reordered(lambda shares: [shares[1], shares[0], *shares[2:]]),
    "all one place further": reordered(lambda shares: [*shares[1:], shares[0]]),
    "one share for everybody": reordered(lambda shares: shares[:1] * len(shares)),
    "of the other kind": of_the_other_kind,
}


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("liars", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("lie", LIES)
def test_shares_in_the_wrong_order_or_of_the_wrong_kind_never_make_a_wrong_sum(
    fleet: Any, mode: str, liars: int, lie: str
) -> None:
    """An answer does not name whose share is which: such a lie shows only in what is rebuilt from it.

    When all twelve tell the same one, every subset agrees on a secret, of somebody else or of the other kind.
    """
    rehearsal = fleet.rehearse(14, parameters=fleet.parameters(mode=mode))
    devices, silent = rehearsal.devices, {"share_keys": rehearsal.devices[3:4], "masked_input": rehearsal.devices[8:9]}
    alive = [device for device in devices if device not in (devices[3], devices[8])]
    requests = rehearsal.run_until(CollectingShares, silent=silent)
    assert len(alive) == len(requests) == 12
    for index, device in enumerate(alive):
        answer = rehearsal.clients[device].receive(requests[device])
        lying = LIES[lie](rehearsal, device, answer)
        assert len(lying.shares) == len(answer.shares)
        assert lying != answer
        rehearsal.send(device, lying if index < liars else answer)
    if liars <= 2:
        rehearsal.close()
    elif liars <= 4:
        with contextlib.suppress(RoundAbandoned):
            rehearsal.close()
    else:
        with pytest.raises(RoundAbandoned, match="bad_shares"):
            rehearsal.close()
    if isinstance(rehearsal.server.stage, Unmasked):
        assert bytes(rehearsal.server.result) == rehearsal.plain_sum(alive)
    else:
        assert rehearsal.server.stage == Abandoned("bad_shares")
        with pytest.raises(LocalProtocolError):
            _ = rehearsal.server.result


@pytest.mark.parametrize("one_in", [20, 1])
def test_on_a_ring_shares_in_the_wrong_order_never_make_a_wrong_sum(fleet: Any, one_in: int) -> None:
    """There every member has other neighbours, in another order: a few liars are survived, all end the round."""
    names = [f"pi-{number:03}" for number in range(201)]
    identities = {name: fleet.identities.get(name) or fleet.issue(name, "device") for name in names}
    parameters = fleet.parameters(mode="curious", maximum_clients=201)
    rehearsal = dataclasses.replace(fleet, identities=identities).rehearse(
        201, parameters=parameters, graph_rule=lambda _: GraphParameters(24, 12)
    )
    requests = rehearsal.run_until(CollectingShares, silent={"share_keys": names[5:7], "masked_input": names[40:43]})
    alive = [name for name in names if name in requests]
    assert len(alive) == 196
    for index, device in enumerate(alive):
        answer = rehearsal.clients[device].receive(requests[device])
        lying = LIES["backwards"](rehearsal, device, answer)
        rehearsal.send(device, answer if index % one_in else lying)
    if one_in == 1:
        with pytest.raises(RoundAbandoned, match="bad_shares"):
            rehearsal.close()
        return
    rehearsal.close()
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(alive)


def test_a_member_that_committed_to_another_seed_abandons_the_round(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(SharingKeys)
    liar = rehearsal.devices[0]
    rehearsal.send(liar, replace(rehearsal.clients[liar].receive(requests[liar]), commitment=b"c" * 32))
    for device in rehearsal.devices[1:]:
        rehearsal.answer(device, requests[device])
    rehearsal.close()
    with pytest.raises(RoundAbandoned, match="bad_shares"):
        rehearsal.run_until(Unmasked)


def test_more_devices_than_the_session_allows_cannot_be_invited(fleet: Any) -> None:
    with pytest.raises(ConfigError, match="maximum_clients is 5"):
        fleet.server([f"pi-{number}" for number in range(6)], fleet.parameters(maximum_clients=5))
    with pytest.raises(ConfigError, match="k-regular"):
        fleet.server(["pi-1"], fleet.parameters(maximum_clients=201))


# --- masked vectors on their way --------------------------------------------------------------------------------------


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
            assemble(replace_tags(expected, earlier.tags), content)
    with pytest.raises(BadBlob):
        assemble(expected, before)
    message = second.answers[device][-1]
    with pytest.raises(ConflictingMessage):
        second.send(device, replace(message, vector=first.answers[device][-1].vector))


def test_a_tag_of_another_device_is_refused(fleet: Any) -> None:
    """A member announces another's vector and tags as its own: whoever copies does not know the key."""
    rehearsal, device, vector = announced_vector(fleet)
    copier = rehearsal.devices[1]
    request = next(reply.message for reply in rehearsal.server.outstanding() if reply.device == copier)
    own = rehearsal.clients[copier].receive(request)
    rehearsal.send(copier, replace(own, vector=rehearsal.answers[device][-1].vector))
    with pytest.raises(BadBlob, match="does not match its tag"):
        assemble(rehearsal.server.expected_vector(copier), vector)
    assert copier in rehearsal.server.waiting_for()


@pytest.mark.parametrize(
    ("vector_bytes", "chunk_bytes", "taken"),
    [(72, 1, False), (64 * 1023, 1023, True), (65 * 1023 + 1, 1023, False), (65 * 1024, 1024, True)],
)
def test_a_vector_in_many_tiny_chunks_is_refused_before_anything_is_kept_of_it(
    fleet: Any, vector_bytes: int, chunk_bytes: int, taken: bool
) -> None:
    """Every chunk is answered with a bitmap of all: 65,000 of them would cost the coordinator 6 ms and 8 kB each."""
    rehearsal = dataclasses.replace(fleet, vector_bytes=vector_bytes).rehearse(6)
    device = rehearsal.devices[0]
    requests = rehearsal.run_until(CollectingInputs)
    right = rehearsal.clients[device].receive(requests[device])
    key = rehearsal.server.stage.upload_keys[rehearsal.server.stage.cohort.position_of[device]]
    cut = tag_vector(rehearsal.clients[device].masked_vector, key, chunk_bytes=chunk_bytes)
    if taken:
        rehearsal.send(device, replace(right, vector=cut))
    else:
        with pytest.raises(MalformedMessage, match="each too small"):
            rehearsal.send(device, replace(right, vector=cut))
        assert rehearsal.server.expected_vector(device) is None
        rehearsal.send(device, right)
    rehearsal.upload(device)
    assert device not in rehearsal.server.waiting_for()


def replace_tags(expected: Any, tags: bytes) -> Any:
    return dataclasses.replace(expected, tags=tags)


@pytest.mark.parametrize("key", [bytes(32), b"\1" + bytes(31), (2**255 - 20).to_bytes(32, "little")])
def test_a_low_order_coordinator_key_is_refused_before_any_key_is_made(fleet: Any, key: bytes) -> None:
    def none_left(count: int) -> bytes:
        raise AssertionError("entropy was drawn")

    client = fleet.client("pi-000", bytearray(fleet.vector_bytes), upload_key=key, entropy=none_left)
    with pytest.raises(LowOrderPoint):
        client.advertise()
    assert isinstance(client.stage, Aborted)


def test_a_device_shown_another_coordinator_key_than_the_others_is_in_another_session(fleet: Any) -> None:
    """Nobody opens its shares, it opens nobody's, and the coordinator's own session refuses what it says."""
    rehearsal = fleet.rehearse(7)
    devices, victim = rehearsal.devices, rehearsal.devices[0]
    vector, other = bytearray(rehearsal.plain[victim]), keys.key_pair(b"o" * 32).public
    rehearsal.clients[victim] = fleet.client(victim, vector, upload_key=other)
    requests = rehearsal.run_until(SharingKeys)
    shared = {device: rehearsal.clients[device].receive(request) for device, request in requests.items()}
    assert rehearsal.clients[victim].session_id != rehearsal.server.session_id
    with pytest.raises(Replayed):
        rehearsal.send(victim, shared[victim])
    for device in devices[1:]:
        assert rehearsal.clients[device].session_id == rehearsal.server.session_id
        rehearsal.send(device, shared[device])
    # It forwards the victim's shares all the same: signed for another session, to members of this one.
    position = rehearsal.server.stage.cohort.position_of
    neighbours = [p for p in range(7) if p != position[victim]]
    peer = devices[1]
    for_peer = rehearsal.cut(shared[victim].ciphertexts, 88)[neighbours.index(position[peer])]
    asked = rehearsal.close()
    told = sorted((*rehearsal.forwarded(asked[peer]), (position[victim], for_peer)))
    assert_refused(rehearsal.clients[peer], rehearsal.forwarding(told), BadShare)
    for_victim = sorted(
        (
            position[d],
            rehearsal.cut(shared[d].ciphertexts, 88)[[p for p in range(7) if p != position[d]].index(position[victim])],
        )
        for d in devices[1:]
    )
    assert_refused(rehearsal.clients[victim], rehearsal.forwarding(for_victim), BadShare)
    assert bytes(vector) == bytes(len(vector)), "nothing was masked, nothing is left"


# --- "I masked with you": the inclusion tokens of active mode ---------------------------------------------------------


@pytest.mark.parametrize("change", ["none", "one missing", "one bit", "two swapped"])
def test_a_device_answers_only_for_neighbours_that_masked_with_it(fleet: Any, change: str) -> None:
    rehearsal = fleet.rehearse(8)
    requests = rehearsal.run_until(CollectingShares)
    device = rehearsal.devices[0]
    told = requests[device].inclusions
    assert len(told) == 7 * keys.INCLUSION_BYTES
    changed = {
        "none": b"",
        "one missing": told[16:],
        "one bit": bytes([told[0] ^ 1]) + told[1:],
        "two swapped": told[16:32] + told[:16] + told[32:],
    }[change]
    assert_refused(rehearsal.clients[device], replace(requests[device], inclusions=changed), CryptoError)


def test_a_member_told_another_list_of_sharers_gets_no_answer_from_those_it_left_out(fleet: Any) -> None:
    """The server hides one honest sharer from another; the hidden one does not answer once the other survives."""
    rehearsal = fleet.rehearse(9)
    requests = rehearsal.run_until(CollectingInputs)
    left_out, misled = rehearsal.devices[:2]
    cohort = rehearsal.server.stage.cohort
    shown = [share for share in rehearsal.forwarded(requests[misled]) if share[0] != cohort.position_of[left_out]]
    requests[misled] = rehearsal.forwarding(shown)
    tokens: dict[str, bytes] = {}
    for device, request in requests.items():
        answer, partners = rehearsal.clients[device].receive(request), request.senders
        at = partners.index(cohort.position_of[left_out]) if cohort.position_of[left_out] in partners else None
        tokens[device] = b"" if at is None else answer.inclusions[16 * at : 16 * at + 16]
    survivors = tuple(range(9))
    signatures = []
    for device in rehearsal.devices:
        if device != misled:  # It would refuse: one of the survivors never shared keys, as it was told.
            rehearsal.clients[device].receive(SurvivorsRequest(survivors=survivors))
            if device != left_out:
                signatures.append(signed(rehearsal, device, survivors))
    others = [cohort.members[p].device for p in survivors if cohort.members[p].device != left_out]
    told = b"".join(tokens[device] or bytes(16) for device in others)
    request = UnmaskingRequest(survivors=survivors, signatures=tuple(signatures), inclusions=told)
    assert_refused(rehearsal.clients[left_out], request, CryptoError, "has not masked with this device")


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


def test_in_curious_mode_there_are_no_tokens(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(mode="curious"))
    requests = rehearsal.run_until(CollectingShares)
    device = rehearsal.devices[0]
    assert requests[device].inclusions == b""
    assert_refused(rehearsal.clients[device], replace(requests[device], inclusions=bytes(16)), MalformedMessage)


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_fewer_survivors_than_the_sessions_own_minimum_are_refused(fleet: Any, mode: str) -> None:
    """Enough neighbours are left to rebuild every secret, yet fewer than the plan has promised."""
    rehearsal = fleet.rehearse(10, parameters=fleet.parameters(mode=mode, minimum_survivors=9))
    requests = rehearsal.run_until(CheckingConsistency if mode == "active" else CollectingShares)
    device = rehearsal.devices[0]
    own = position_of(rehearsal, device)
    fewer = tuple(sorted({own, *(p for p in range(10) if p != own)} - {(own + 1) % 10, (own + 2) % 10}))
    assert len(fewer) == 8 > rehearsal.server.stage.inputs.cohort.shape.threshold
    refused = replace(requests[device], survivors=fewer)
    assert_refused(
        rehearsal.clients[device], refused, RemoteProtocolError, "8 members are left where the session needs 9"
    )
