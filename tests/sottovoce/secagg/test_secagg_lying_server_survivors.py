"""A lying server or peer against the real device that has masked its vector: survivors, signatures, inclusion tokens.

Every attack ends in a named error, and the device drops its secrets before it gives a share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sottovoce.errors import (
    BadSignature,
    CryptoError,
    Equivocation,
    MalformedMessage,
    RemoteProtocolError,
    Replayed,
    SottovoceError,
    UnexpectedMessage,
)
from sottovoce.secagg import keys
from sottovoce.secagg.client_stages import Aborted, Revealed
from sottovoce.secagg.server_stages import CheckingConsistency, CollectingInputs, CollectingShares
from sottovoce.wire.messages import SurvivorsRequest, UnmaskingRequest

replace = msgspec.structs.replace


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
    survivors = tuple(change(list(requests[device].survivors), rehearsal.position(device)))
    rehearsal.assert_refused(device, replace(requests[device], survivors=survivors), error)


def test_nobody_can_be_listed_alive_and_dropped_at_once() -> None:
    """The request holds one set; there is no second list to contradict it (flower's ServerSecAgg had two)."""
    assert UnmaskingRequest.__struct_fields__ == ("survivors", "signatures", "inclusions")
    assert SurvivorsRequest.__struct_fields__ == ("survivors",)


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_second_different_unmasking_request_is_refused(fleet: Any, mode: str) -> None:
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(mode=mode))
    requests = rehearsal.run_until(CollectingShares)
    device = rehearsal.devices[0]
    rehearsal.answer(device, requests[device])
    assert isinstance(rehearsal.clients[device].stage, Revealed)
    fewer = tuple(p for p in requests[device].survivors if p != (rehearsal.position(device) + 1) % 8)
    rehearsal.assert_refused(device, replace(requests[device], survivors=fewer), UnexpectedMessage)


def test_a_second_survivor_set_is_not_signed(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8)
    requests = rehearsal.run_until(CheckingConsistency)
    device = rehearsal.devices[0]
    rehearsal.answer(device, requests[device])
    fewer = tuple(p for p in requests[device].survivors if p != (rehearsal.position(device) + 1) % 8)
    rehearsal.assert_refused(device, SurvivorsRequest(survivors=fewer), UnexpectedMessage)


@pytest.fixture
def agreed(fleet: Any) -> Any:
    """Eight members of which one dropped out; everybody has signed, nobody has revealed."""
    rehearsal = fleet.rehearse(8)
    rehearsal.run_until(CollectingShares, silent={"masked_input": rehearsal.devices[7:]})
    return rehearsal


def test_another_set_than_the_signed_one_is_refused_though_the_signatures_are_on_the_signed_one(agreed: Any) -> None:
    device = agreed.devices[0]
    request = agreed.requests[device][-1].message
    dropped = next(p for p in request.survivors if p != agreed.position(device))
    fewer = tuple(p for p in request.survivors if p != dropped)
    agreed.assert_refused(device, replace(request, survivors=fewer), RemoteProtocolError, "than the one signed")


def test_another_set_than_the_signed_one_is_refused_also_when_corrupt_peers_sign_both(agreed: Any) -> None:
    device, *others = agreed.devices[:7]
    request = agreed.requests[device][-1].message
    dropped = next(p for p in request.survivors if p not in (agreed.position(device),))
    fewer = tuple(p for p in request.survivors if p != dropped)
    signatures = tuple(agreed.signed(other, fewer) for other in others)
    agreed.assert_refused(device, UnmaskingRequest(survivors=fewer, signatures=signatures), RemoteProtocolError)


def test_a_neighbour_that_signed_another_set_is_kept_as_evidence(agreed: Any) -> None:
    device, other, *_ = agreed.devices
    request = agreed.requests[device][-1].message
    lie = agreed.signed(other, request.survivors[1:])
    client = agreed.clients[device]
    with pytest.raises(Equivocation) as caught:
        client.receive(replace(request, signatures=(*request.signatures, lie)))
    assert caught.value.evidence == (lie,)
    assert client.stage == Aborted(caught.value)


Sign = Callable[..., bytes]
SIGNATURES: dict[str, tuple[Callable[[list[bytes], Sign], list[bytes]], type[SottovoceError]]] = {
    "one too few": (lambda rest, sign: rest, RemoteProtocolError),
    "one twice": (lambda rest, sign: [*rest, rest[0]], MalformedMessage),
    "all of one": (lambda rest, sign: [rest[0], *rest[:1] * len(rest)], MalformedMessage),
    "of another session": (lambda rest, sign: [*rest, sign(2, session=b"o" * 32)], Replayed),
    "of another round": (lambda rest, sign: [*rest, sign(2, round=6)], Replayed),
    "of another attempt": (lambda rest, sign: [*rest, sign(3, attempt=2)], Replayed),
    "a wrong one": (lambda rest, sign: [*rest, sign(4)[:-64] + bytes(64)], BadSignature),
    "not an envelope": (lambda rest, sign: [*rest, b"nothing"], MalformedMessage),
    "its own": (lambda rest, sign: [*rest, sign(0)], MalformedMessage),
    "of a dropped member": (lambda rest, sign: [*rest, sign(7)], MalformedMessage),
}
"""Instead of t signatures: what becomes of all but one of them, and of a made-up one of any member."""


def refuse_signatures(agreed: Any, name: str, match: str | None = None) -> None:
    change, error = SIGNATURES[name]
    device = agreed.devices[0]
    request = agreed.requests[device][-1].message
    one, *rest = request.signatures
    assert one not in rest

    def sign(number: int, **changes: Any) -> bytes:
        return bytes(agreed.signed(agreed.devices[number], request.survivors, **changes))

    agreed.assert_refused(device, replace(request, signatures=tuple(change(rest, sign))), error, match)


@pytest.mark.parametrize("name", [*SIGNATURES][:-2])
def test_signatures_must_be_t_valid_ones_of_distinct_surviving_neighbours(agreed: Any, name: str) -> None:
    refuse_signatures(agreed, name)


@pytest.mark.parametrize("name", [*SIGNATURES][-2:])
def test_the_own_and_a_dropped_members_signature_do_not_count(agreed: Any, name: str) -> None:
    refuse_signatures(agreed, name, "not a surviving neighbour")


def test_signatures_in_curious_mode_are_refused(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6, parameters=fleet.parameters(mode="curious"))
    requests = rehearsal.run_until(CollectingShares)
    device = rehearsal.devices[0]
    rehearsal.assert_refused(device, replace(requests[device], signatures=(b"x",)), MalformedMessage)


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
    rehearsal.assert_refused(device, replace(requests[device], inclusions=changed), CryptoError)


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
                signatures.append(rehearsal.signed(device, survivors))
    others = [cohort.members[p].device for p in survivors if cohort.members[p].device != left_out]
    told = b"".join(tokens[device] or bytes(16) for device in others)
    request = UnmaskingRequest(survivors=survivors, signatures=tuple(signatures), inclusions=told)
    rehearsal.assert_refused(left_out, request, CryptoError, "has not masked with this device")


def test_in_curious_mode_there_are_no_tokens(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(mode="curious"))
    requests = rehearsal.run_until(CollectingShares)
    device = rehearsal.devices[0]
    assert requests[device].inclusions == b""
    rehearsal.assert_refused(device, replace(requests[device], inclusions=bytes(16)), MalformedMessage)


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_fewer_survivors_than_the_sessions_own_minimum_are_refused(fleet: Any, mode: str) -> None:
    """Enough neighbours are left to rebuild every secret, yet fewer than the plan has promised."""
    rehearsal = fleet.rehearse(10, parameters=fleet.parameters(mode=mode, minimum_survivors=9))
    requests = rehearsal.run_until(CheckingConsistency if mode == "active" else CollectingShares)
    device = rehearsal.devices[0]
    own = rehearsal.position(device)
    fewer = tuple(sorted({own, *(p for p in range(10) if p != own)} - {(own + 1) % 10, (own + 2) % 10}))
    assert len(fewer) == 8 > rehearsal.server.stage.inputs.cohort.shape.threshold
    refused = replace(requests[device], survivors=fewer)
    rehearsal.assert_refused(device, refused, RemoteProtocolError, "8 members are left where the session needs 9")
