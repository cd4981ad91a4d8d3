"""Devices that give wrong shares, or right ones in the wrong place: few are survived, many end the round.

Nothing in the answer tells that it is wrong; no such lie ever makes a wrong sum.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sottovoce.errors import LocalProtocolError, RoundAbandoned
from sottovoce.secagg import shamir
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.server_stages import Abandoned, CollectingShares, SharingKeys, Unmasked
from sottovoce.wire.messages import Unmasking

replace = msgspec.structs.replace


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
def test_on_a_ring_shares_in_the_wrong_order_never_make_a_wrong_sum(large_fleet: Any, one_in: int) -> None:
    """There every member has other neighbours, in another order: one or two liars in every neighbourhood are survived.

    They are counted off along the ring, whose order is another in every run. All of them end the round.
    """
    parameters = large_fleet.parameters(mode="curious", maximum_clients=201)
    rehearsal = large_fleet.rehearse(201, parameters=parameters, graph_rule=lambda _: GraphParameters(24, 12))
    names = rehearsal.devices
    requests = rehearsal.run_until(CollectingShares, silent={"share_keys": names[5:7], "masked_input": names[40:43]})
    around = [rehearsal.cohort.members[position].device for position in rehearsal.cohort.shape.graph.order().tolist()]
    alive = [name for name in around if name in requests]
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
