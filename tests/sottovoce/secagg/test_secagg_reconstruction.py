"""What a lying server with corrupt members makes of all that it gets: the device refuses, and the rest is noise."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from aggregation_plans import plan_of
from attacker import CORRUPT, MEMBERS, assert_noise, infiltrated, plain_vector, reading_along, room, words_of

from sottovoce.errors import (
    BadShare,
    Equivocation,
    PolicyRefusal,
    RemoteProtocolError,
    RoundAbandoned,
    UnexpectedMessage,
)
from sottovoce.plan import Aggregation, Counted
from sottovoce.secagg.client import ClientTerms
from sottovoce.secagg.lanes import layout_of
from sottovoce.secagg.server_stages import CollectingShares, Unmasked
from sottovoce.wire.messages import SurvivorsRequest, UnmaskingRequest

replace = msgspec.structs.replace


@pytest.mark.parametrize("told_all", [3, 5, 7, 9])
def test_two_survivor_sets_with_corrupt_members_that_sign_both(fleet: Any, told_all: int) -> None:
    """Some honest members are shown everybody, the others everybody but the victim: one group at most answers."""
    attacker = infiltrated(room(fleet))
    devices = attacker.honest
    victim = devices[0]
    everybody = tuple(range(MEMBERS))
    without = tuple(p for p in everybody if p != attacker.position(victim))
    groups = {everybody: devices[:told_all], without: devices[told_all:]}
    for survivors, group in groups.items():
        answers = {device: attacker.ask(device, SurvivorsRequest(survivors=survivors)) for device in group}
        for device in group:
            shown = attacker.signatures(answers, survivors, beside=device)
            request = UnmaskingRequest(survivors=survivors, signatures=shown)
            enough = len(shown) >= attacker.shape.threshold
            attacker.ask(device, request, *(() if enough else (RemoteProtocolError,)))
    both = [shares[attacker.position(victim)] for shares in (attacker.seed_shares, attacker.key_shares)]
    assert min(len(shares) for shares in both) < attacker.shape.threshold
    attacker.assert_hidden(victim)


def test_the_other_groups_signatures_are_evidence_and_end_the_session_too(fleet: Any) -> None:
    attacker = infiltrated(room(fleet))
    devices = attacker.honest
    victim, everybody = devices[0], tuple(range(MEMBERS))
    without = tuple(p for p in everybody if p != attacker.position(victim))
    shown = {d: everybody if index < 5 else without for index, d in enumerate(devices)}
    answers = {
        device: attacker.ask(device, SurvivorsRequest(survivors=survivors)) for device, survivors in shown.items()
    }
    for device, survivors in shown.items():
        request = UnmaskingRequest(
            survivors=survivors, signatures=attacker.signatures(answers, survivors, beside=device)
        )
        attacker.ask(device, request, Equivocation)
    attacker.assert_hidden(victim)


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_shares_withheld_so_that_only_corrupt_neighbours_masks_remain(fleet: Any, mode: str) -> None:
    """The victim would mask with members whose masks the attacker knows; it does not mask at all."""
    attacker = reading_along(room(fleet, mode=mode))
    rehearsal, victim = attacker.rehearsal, attacker.honest[0]
    corrupt = {attacker.position(device) for device in attacker.corrupt}
    vector = rehearsal.clients[victim].stage.vector
    only = [share for share in rehearsal.forwarded(rehearsal.requests[victim][-1].message) if share[0] in corrupt]
    attacker.ask(victim, rehearsal.forwarding(only), RemoteProtocolError)
    assert bytes(vector) == bytes(len(vector))


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_shares_withheld_as_far_as_the_device_lets_them(fleet: Any, mode: str) -> None:
    """The victim masks with as few members as it accepts, all corrupt ones among them: honest masks remain."""
    attacker = reading_along(room(fleet, mode=mode))
    rehearsal, victim = attacker.rehearsal, attacker.honest[0]
    corrupt = {attacker.position(device) for device in attacker.corrupt}
    forwarded = rehearsal.forwarded(rehearsal.requests[victim][-1].message)
    first = [share for share in forwarded if share[0] in corrupt]
    rest = [share for share in forwarded if share[0] not in corrupt]
    fewest = sorted(first + rest[: attacker.shape.threshold - 1 - CORRUPT])
    rehearsal.server._requests[victim] = rehearsal.forwarding(fewest)
    attacker.enter(deliver=False)
    attacker.assert_hidden(victim)


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("spared", ["nobody", "the corrupt"])
def test_a_whole_neighbourhood_listed_as_dropped(fleet: Any, mode: str, spared: str) -> None:
    attacker = infiltrated(room(fleet, mode=mode))
    victim = attacker.honest[0]
    left = {attacker.position(victim)}
    left |= {attacker.position(device) for device in attacker.corrupt} if spared == "the corrupt" else set()
    attacker.announce(victim, sorted(left), RemoteProtocolError)
    attacker.assert_hidden(victim)


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("whose", ["the session's", "the owner's"])
def test_survivors_below_the_minimum_though_t_are_left(fleet: Any, mode: str, whose: str) -> None:
    """Ten of twelve are enough to rebuild everything, but not enough to hide in."""
    terms = {"minimum_cohort": 3, "minimum_honest_survivors": 9 if whose == "the owner's" else 2}
    rehearsal = room(fleet, mode=mode, minimum_survivors=11 if whose == "the session's" else 3)
    victim, parameters = rehearsal.devices[0], rehearsal.server._agreement.parameters
    rehearsal.clients[victim] = rehearsal.fleet.client(
        victim, plain_vector(0), parameters=parameters, terms=ClientTerms(**terms, modes=("active", "curious"))
    )
    attacker = reading_along(rehearsal)
    attacker.enter()
    left = tuple(p for p in range(MEMBERS) if attacker.cohort.members[p].device not in attacker.corrupt)
    assert len(left) == 10 > attacker.shape.threshold
    attacker.announce(victim, left, RemoteProtocolError if whose == "the session's" else PolicyRefusal)
    attacker.assert_hidden(victim)


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_second_different_unmasking_request(fleet: Any, mode: str) -> None:
    """First everybody survives and the sum is unmasked, as it should; then the victim is said to have dropped out."""
    attacker = infiltrated(room(fleet, mode=mode))
    rehearsal, devices = attacker.rehearsal, attacker.honest
    requests = rehearsal.run_until(CollectingShares)
    for device in devices:
        attacker.ask(device, requests[device])
    everybody = attacker.best(range(MEMBERS))
    assert bytes(everybody) == rehearsal.plain_sum(rehearsal.devices)
    victim = devices[0]
    position = attacker.position(victim)
    for device in devices:
        fewer = tuple(p for p in range(MEMBERS) if p != position)
        attacker.ask(device, replace(requests[device], survivors=fewer), UnexpectedMessage)
    assert len(attacker.seed_shares[position]) >= attacker.shape.threshold
    attacker.assert_hidden(victim)


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_released_state_is_asked_for_again_after_the_round_was_abandoned(fleet: Any, mode: str) -> None:
    """Both masked vectors are of the same plain one, the worst that can be: their difference is noise as well."""
    first, second = (infiltrated(room(fleet, mode=mode, seed=seed)) for seed in (1, 2))
    victim = first.honest[0]
    assert first.shape.session != second.shape.session
    assert first.rehearsal.plain[victim] == second.rehearsal.plain[victim]
    one, other = (words_of(attacker.best([attacker.position(victim)])) for attacker in (first, second))
    for found in (one, other, one - other):
        assert_noise(found.tobytes() + bytes(16), first.rehearsal.plain[victim])


def test_another_model_for_one_victim(fleet: Any) -> None:
    """The victim starts from another state than all others; neither it nor they accept the roster."""
    rehearsal = room(fleet)
    victim, other = rehearsal.devices[:2]
    sized = rehearsal.fleet
    parameters = rehearsal.server._agreement.parameters
    vector = plain_vector(0)
    rehearsal.clients[victim] = sized.client(victim, vector, parameters=parameters, state=b"z" * 32)
    rehearsal.advertise(rehearsal.devices[1:])
    with pytest.raises(RemoteProtocolError, match="another plan, state or parameters"):
        rehearsal.advertise([victim])
    requests = rehearsal.close()
    with pytest.raises(RemoteProtocolError, match="not in the roster"):
        rehearsal.clients[victim].receive(requests[other])
    assert bytes(vector) == bytes(len(vector))


def test_a_lowered_modulus_is_not_the_plans(fleet: Any) -> None:
    """Fewer bits for the sum, with the vector as long as it should be: only the plan tells that this is wrong."""
    aggregation = Aggregation(name="update", tensors=("float32[64]",), encoding=Counted(maximum=1023), lane="dense")
    layout = layout_of(plan_of(aggregation), maximum_clients=100)
    (width, count) = layout.packed[0]
    told = {"vector_bytes": layout.vector_bytes, "wide_bytes": layout.wide_bytes, "packed": layout.packed}
    layout.require(fleet.parameters(**told))
    shorter = {"packed": ((width - 1, count),), "vector_bytes": layout.vector_bytes - count // 8}
    for changes in (shorter, {"wide_bytes": layout.wide_bytes + 8}, {"vector_bytes": layout.vector_bytes + 8}):
        with pytest.raises(PolicyRefusal, match="lanes"):
            layout.require(fleet.parameters(**(told | changes)))


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_member_whose_shares_do_not_open_ends_sessions_and_learns_nothing(fleet: Any, mode: str) -> None:
    """Refusal of service, which is not prevented; what the attacker has of the others is noise."""
    attacker = reading_along(room(fleet, mode=mode))
    rehearsal = attacker.rehearsal
    liar = attacker.position(rehearsal.devices[-1])
    for device in rehearsal.devices[:3]:
        forwarded = rehearsal.forwarded(rehearsal.requests[device][-1].message)
        shares = [(p, bytes(88) if p == liar else c) for p, c in forwarded]
        attacker.ask(device, rehearsal.forwarding(shares), BadShare)


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("stage", ["masked_input", "consistency_check", "unmasking"])
def test_an_abandoned_round_reveals_nothing(fleet: Any, mode: str, stage: str) -> None:
    """Too few stay; the server keeps everything, and has a whole session's worth of masked vectors."""
    if (mode, stage) == ("curious", "consistency_check"):
        stage = "unmasking"
    attacker = infiltrated(room(fleet, mode=mode))
    rehearsal, devices = attacker.rehearsal, attacker.honest
    enough = attacker.shape.threshold - CORRUPT - 1
    if stage == "masked_input":
        rehearsal.server.abandon("too_few_devices")
    else:
        with pytest.raises(RoundAbandoned):
            rehearsal.run_until(Unmasked, silent={stage: [*devices[enough:], *attacker.corrupt]})
    for device, given in rehearsal.shares_given():
        attacker.take(device, given, rehearsal.requests[device][-1].message.survivors)
    attacker.assert_hidden(devices[0])
    attacker.assert_hidden(*rehearsal.devices)
