"""What a lying server with corrupt members makes of all that it gets where the cohort stands on a ring: noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from attacker import Attacker, infiltrated, room

from sottovoce.errors import ConfigError, RemoteProtocolError, RoundAbandoned
from sottovoce.secagg import server_steps, shamir
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.server_stages import CheckingConsistency, CollectingShares
from sottovoce.wire.messages import SurvivorsRequest, UnmaskingRequest

RING, NEIGHBOURS, SHARES = 201, 44, 34


@pytest.fixture(scope="module")
def ring(large_fleet: Any) -> Attacker:
    """201 members on a ring, ten of them corrupt; everybody has masked. Each test lies to other devices."""
    figures = GraphParameters(NEIGHBOURS, SHARES)
    settings: dict[str, Any] = {"maximum_clients": RING, "corrupt_share_bp": 500, "graph_rule": lambda _: figures}
    attacker = infiltrated(room(large_fleet, RING, **settings), corrupt=10)
    assert isinstance(attacker.rehearsal.server.stage, CheckingConsistency)
    return attacker


def on_the_ring(attacker: Attacker, places: Iterable[int]) -> list[int]:
    order = attacker.shape.graph.order().tolist()
    return [order[place % RING] for place in places]


def test_k_half_gaps_around_an_arc_of_the_ring(ring: Attacker) -> None:
    """The members on both sides of an arc are said to have dropped out, so that the arc's sum stands alone.

    A member at the arc's edge has k/2 neighbours left, fewer than t: it refuses, and so does everybody whom its
    signature was to convince.
    """
    half = NEIGHBOURS // 2
    arc = on_the_ring(ring, range(60, 100))
    gaps = set(on_the_ring(ring, [*range(60 - half, 60), *range(100, 100 + half)]))
    survivors = tuple(position for position in range(RING) if position not in gaps)
    members, answers = ring.cohort.members, dict[str, Any]()
    refused = 0
    for position in arc:
        device = members[position].device
        left = len(set(ring.shape.neighbours(position)) - gaps)
        if device in ring.corrupt:
            continue
        if left < SHARES:
            ring.ask(device, SurvivorsRequest(survivors=survivors), RemoteProtocolError)
            refused += 1
        else:
            answers[device] = ring.ask(device, SurvivorsRequest(survivors=survivors))
    assert refused >= 10
    for device in answers:
        around = {members[p].device for p in ring.shape.neighbours(ring.position(device))}
        near = {other: answer for other, answer in answers.items() if other in around}
        shown = ring.signatures(near, survivors, beside=device)
        shown = tuple(payload for payload in shown if msgspec.msgpack.decode(payload)[2] in around)
        ring.ask(device, UnmaskingRequest(survivors=survivors, signatures=shown), RemoteProtocolError)
    ring.assert_hidden(*(members[position].device for position in arc))


def test_a_whole_neighbourhood_on_the_ring_listed_as_dropped(ring: Attacker) -> None:
    victim = next(p for p in on_the_ring(ring, range(150, 160)) if ring.cohort.members[p].device not in ring.corrupt)
    device = ring.cohort.members[victim].device
    around = {p for p in ring.shape.neighbours(victim) if ring.cohort.members[p].device not in ring.corrupt}
    survivors = tuple(position for position in range(RING) if position not in around)
    ring.ask(device, SurvivorsRequest(survivors=survivors), RemoteProtocolError)
    ring.assert_hidden(device)


def test_the_server_gives_up_when_one_neighbourhood_on_the_ring_has_too_few_left(ring: Attacker) -> None:
    """Enough members in all, but k - t + 1 of one member's neighbours are gone, before or after U3 is fixed."""
    checking, agreement = ring.rehearsal.server.stage, ring.rehearsal.server._agreement
    (victim,) = on_the_ring(ring, [5])
    gone = set(ring.shape.neighbours(victim)[: NEIGHBOURS - SHARES + 1])
    staying = set(range(RING)) - gone
    with pytest.raises(RoundAbandoned, match="too_few_shares"):
        server_steps.close_inputs(agreement, replace(checking.inputs, added=staying))
    answers, asked = dict.fromkeys(staying, shamir.parse_shares(b"")), dict.fromkeys(range(RING), NEIGHBOURS)
    collecting = CollectingShares(checking.inputs, checking.survivors, checking.alive, asked, answers)
    with pytest.raises(RoundAbandoned, match="too_few_shares"):
        server_steps.close_unmasking(agreement, collecting)


def test_not_prevented_t_neighbours_on_the_ring_rebuild_and_t_minus_one_do_not(ring: Attacker) -> None:
    """Also the proof that the two tests before this one would have seen it, had the masks come off."""
    (victim,) = on_the_ring(ring, [5])
    around = [ring.cohort.members[position].device for position in ring.shape.neighbours(victim)]
    device = ring.cohort.members[victim].device
    for count in (SHARES - 1, SHARES):
        reader = Attacker(ring.rehearsal, around[:count])
        for other in reader.corrupt:
            reader.hold(other)
        reader.masked = ring.masked
        if count < SHARES:
            reader.assert_hidden(device)
        else:
            assert reader.best([victim]) == ring.rehearsal.plain[device]


def test_the_server_abandons_the_round_when_no_graph_is_safe_for_those_who_came(fleet: Any) -> None:
    def no_graph(members: int) -> GraphParameters:
        raise ConfigError(f"no graph for {members}")

    for rule in (no_graph, lambda members: GraphParameters(members - 1, 2)):
        rehearsal = room(fleet, graph_rule=rule)
        rehearsal.advertise(rehearsal.devices)
        with pytest.raises(RoundAbandoned, match="no_graph"):
            rehearsal.close()


@pytest.mark.parametrize("came", [0, 2])
def test_the_server_asks_for_no_graph_when_too_few_came(fleet: Any, came: int) -> None:
    """A rule need not know what to do with so few: it is not called."""
    asked: list[int] = []
    rehearsal = room(fleet, graph_rule=asked.append)
    rehearsal.advertise(rehearsal.devices[:came])
    with pytest.raises(RoundAbandoned, match="too_few_devices"):
        rehearsal.close()
    assert asked == []
