"""A lying server, broker or peer against the real device before it shares keys: parameters, coordinator's key, roster.

Every attack ends in a named error, and the device drops its secrets.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sottovoce.errors import (
    BadCertificate,
    BadShare,
    BadSignature,
    ConfigError,
    LowOrderPoint,
    MalformedMessage,
    PolicyRefusal,
    RemoteProtocolError,
    Replayed,
    SottovoceError,
    UnexpectedMessage,
)
from sottovoce.identity import SignedContext
from sottovoce.secagg import keys
from sottovoce.secagg.client import ClientTerms
from sottovoce.secagg.client_stages import Aborted
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.roster import check_advertisement
from sottovoce.secagg.server_stages import Candidate, SharingKeys
from sottovoce.secagg.transcript import leaf_of
from sottovoce.wire.codec import parse, seal
from sottovoce.wire.messages import AdvertiseKeys, Roster

replace = msgspec.structs.replace
Change = Callable[[Any, Any], Any]


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
    rehearsal.assert_refused(device, change(requests[device], rehearsal), error)


def test_an_advertisement_is_good_for_one_roster_only(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(SharingKeys)
    device = rehearsal.devices[0]
    rehearsal.answer(device, requests[device])
    other_server = fleet.server(rehearsal.devices[:5], fleet.parameters())
    for name in rehearsal.devices[:5]:
        other_server.receive(rehearsal.opened(name, rehearsal.clients[name].advertise(), session=bytes(32)))
    second = {reply.device: reply.message for reply in other_server.close_stage()}
    rehearsal.assert_refused(device, second[device], UnexpectedMessage)


def test_a_roster_without_this_device_is_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(7)
    outsider = rehearsal.devices[6]
    rehearsal.clients[outsider].advertise()
    requests = rehearsal.run_until(SharingKeys, silent={"advertise_keys": [outsider]})
    rehearsal.assert_refused(outsider, requests[rehearsal.devices[0]], RemoteProtocolError, "not in the roster")


def test_sybils_below_the_devices_minimum_are_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(9)
    device = rehearsal.devices[0]
    rehearsal.clients[device] = fleet.client(device, bytearray(rehearsal.plain[device]), terms=ClientTerms())
    requests = rehearsal.run_until(SharingKeys)
    rehearsal.assert_refused(device, requests[device], PolicyRefusal, "minimum_cohort")


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
    rehearsal.assert_refused(rehearsal.devices[0], requests[rehearsal.devices[0]], RemoteProtocolError, "twice")


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
    rehearsal.assert_refused(device, roster, RemoteProtocolError, "this device is in the roster twice")


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
    parameters, told = fleet.parameters(maximum_clients=300), GraphParameters(neighbours, threshold)
    rehearsal = fleet.rehearse(1, parameters=parameters, graph_rule=lambda _: told)
    identity = fleet.identities["pi-000"]
    own = leaf_of("pi-000", identity.certificate.fingerprint, rehearsal.clients["pi-000"].advertise())
    leaves = sorted([own, *(bytes([number]) * 32 for number in range(200))])
    roster = Roster(leaves=b"".join(leaves), neighbours=neighbours, threshold=threshold, advertisements=())
    rehearsal.assert_refused("pi-000", roster, RemoteProtocolError, match)


def test_a_certificate_that_expired_or_is_a_coordinators_is_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    device = rehearsal.devices[0]
    late = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
    rehearsal.clients[device] = fleet.client(device, bytearray(rehearsal.plain[device]), at=late)
    requests = rehearsal.run_until(SharingKeys)
    rehearsal.assert_refused(device, requests[device], BadCertificate)


def test_a_cohort_larger_than_the_lanes_allow_is_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(7)
    device = rehearsal.devices[0]
    small = fleet.parameters(maximum_clients=5)
    rehearsal.clients[device] = fleet.client(device, bytearray(rehearsal.plain[device]), parameters=small)
    rehearsal.advertise(rehearsal.devices[1:])
    rehearsal.clients[device].advertise()
    roster = rehearsal.close()[rehearsal.devices[1]]
    rehearsal.assert_refused(device, roster, RemoteProtocolError, "at most 5")


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
    rehearsal.assert_refused(peer, rehearsal.forwarding(told), BadShare)
    for_victim = sorted(
        (
            position[d],
            rehearsal.cut(shared[d].ciphertexts, 88)[[p for p in range(7) if p != position[d]].index(position[victim])],
        )
        for d in devices[1:]
    )
    rehearsal.assert_refused(victim, rehearsal.forwarding(for_victim), BadShare)
    assert bytes(vector) == bytes(len(vector)), "nothing was masked, nothing is left"
