"""A lying server or peer against the real device that is to mask its vector: the shares that it is given.

Every attack ends in a named error before anything is masked, and the device drops its secrets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sottovoce.errors import BadShare, MalformedMessage, RemoteProtocolError, SottovoceError
from sottovoce.secagg import keys
from sottovoce.secagg.client_stages import InputMasked
from sottovoce.secagg.server_stages import CollectingInputs
from sottovoce.wire.messages import MaskedInputRequest

replace = msgspec.structs.replace
Change = Callable[[Any, Any], Any]


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
    vector = rehearsal.clients[device].stage.vector
    rehearsal.assert_refused(device, change(requests[device], rehearsal), error)
    assert bytes(vector) == bytes(len(vector))


@pytest.mark.parametrize("shares", [b"\xff\xff" * 36, b"\x00\x00" * 35 + b"\xf1\xff"], ids=len)
def test_a_limb_out_of_range_is_refused_though_it_decrypts(fleet: Any, shares: bytes) -> None:
    rehearsal, device, request = masking(fleet)
    first, *rest = rehearsal.forwarded(request)
    forged = rehearsal.forwarding([(first[0], resealed(rehearsal, first[0], shares)), *rest])
    rehearsal.assert_refused(device, forged, BadShare)


@pytest.mark.parametrize("sizes", [(70, 72), (74, 72), (70, 74), (74, 70), (0, 144)], ids=str)
def test_a_length_out_of_range_is_refused_though_it_decrypts(fleet: Any, sizes: tuple[int, int]) -> None:
    """Two neighbours together: what the one has too few the other has too many, or else the total shows it."""
    rehearsal, device, request = masking(fleet)
    first, second, *rest = rehearsal.forwarded(request)
    contents = [
        (position, resealed(rehearsal, position, bytes(size)))
        for (position, _), size in zip((first, second), sizes, strict=True)
    ]
    expected = BadShare if sum(sizes) == 144 else MalformedMessage
    rehearsal.assert_refused(device, rehearsal.forwarding([*contents, *rest]), expected)


def test_shares_of_the_right_form_are_accepted_so_that_the_two_before_prove_something(fleet: Any) -> None:
    rehearsal, device, request = masking(fleet)
    first, *rest = rehearsal.forwarded(request)
    client = rehearsal.clients[device]
    client.receive(rehearsal.forwarding([(first[0], resealed(rehearsal, first[0], bytes(72))), *rest]))
    assert isinstance(client.stage, InputMasked)


def masking(fleet: Any) -> tuple[Any, str, MaskedInputRequest]:
    """A rehearsal whose first device is about to mask: it, the device's name and what it is asked."""
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(CollectingInputs)
    device = rehearsal.devices[0]
    return rehearsal, device, requests[device]


def resealed(rehearsal: Any, position: int, shares: bytes) -> bytes:
    """What the first device's neighbour at `position` could have encrypted instead, being corrupt."""
    recipient = rehearsal.devices[0]
    client = rehearsal.clients[recipient]
    stage = client.stage
    sender = stage.seat.neighbours[position].device
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


def test_fewer_than_the_sessions_own_minimum_are_refused_before_masking(fleet: Any) -> None:
    rehearsal = fleet.rehearse(8, parameters=fleet.parameters(minimum_survivors=7))
    requests = rehearsal.run_until(CollectingInputs)
    device = rehearsal.devices[0]
    fewer = rehearsal.forwarding(rehearsal.forwarded(requests[device])[:5])
    rehearsal.assert_refused(device, fewer, RemoteProtocolError, "needs 7")
