"""What secure aggregation does not prevent (SPEC, section 10), shown: each ends with the attacker in possession.

On a ring it is the same, `test_secagg_reconstruction_ring.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from aggregation_plans import plan_of
from attacker import MEMBERS, assert_noise, infiltrated, room, words_of

from sottovoce.errors import RoundAbandoned
from sottovoce.plan import Aggregation, Counted
from sottovoce.secagg.encoding import decode, encode
from sottovoce.secagg.lanes import layout_of
from sottovoce.secagg.segments import add_into
from sottovoce.secagg.server_stages import Unmasked
from sottovoce.wire.messages import UnmaskingRequest


def test_not_prevented_the_sum_itself_with_everybody_else_corrupt(fleet: Any) -> None:
    """A CA that makes everybody else a sybil: the sum of one is that one's update."""
    rehearsal = room(fleet)
    rehearsal.run_until(Unmasked)
    victim, *others = rehearsal.devices
    total = words_of(bytes(rehearsal.server.result)).copy()
    for device in others:
        total -= words_of(rehearsal.plain[device])
    assert total.tobytes() == words_of(rehearsal.plain[victim]).tobytes()


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_not_prevented_t_colluding_members_rebuild_and_t_minus_one_do_not(fleet: Any, mode: str) -> None:
    """More corrupt members than c: with the server they open any other member's vector, before anybody answers."""
    threshold = {"active": 8, "curious": 6}[mode]
    for colluding in (threshold, threshold - 1):
        attacker = infiltrated(room(fleet, mode=mode), colluding)
        assert attacker.shape.threshold == threshold
        victim = attacker.honest[0]
        found = attacker.best([attacker.position(victim)])
        if colluding == threshold:
            assert found == attacker.rehearsal.plain[victim]
        else:
            assert_noise(found, attacker.rehearsal.plain[victim])


def test_not_prevented_differencing_two_rounds(fleet: Any) -> None:
    """Two rounds whose survivors differ in one device, which gave the same in both: the difference is its update."""
    sums = []
    for seed, absent in ((1, 0), (2, 1)):
        rehearsal = room(fleet, seed=seed)
        rehearsal.run_until(Unmasked, silent={"advertise_keys": rehearsal.devices[:absent]})
        sums.append(words_of(bytes(rehearsal.server.result)))
    assert (sums[0] - sums[1]).tobytes() == words_of(rehearsal.plain[rehearsal.devices[0]]).tobytes()


def test_not_prevented_a_server_that_lies_in_curious_mode(fleet: Any) -> None:
    """Half the members are told that the victim survived, half that it dropped out: both secrets can be rebuilt."""
    attacker = infiltrated(room(fleet, mode="curious"))
    devices = attacker.honest
    victim = devices[0]
    position = attacker.position(victim)
    without = tuple(p for p in range(MEMBERS) if p != position)
    for index, device in enumerate(devices):
        survivors = tuple(range(MEMBERS)) if index < 6 else without
        attacker.ask(device, UnmaskingRequest(survivors=survivors, signatures=()))
    assert attacker.best([position]) == attacker.rehearsal.plain[victim]


def test_not_prevented_poisoning_within_the_lanes(fleet: Any) -> None:
    """A member that does not clip moves the sum by its plan's maximum, and no further without being noticed."""
    layout = layout_of(
        plan_of(Aggregation(name="update", tensors=("int64[4]",), encoding=Counted(maximum=1000))), maximum_clients=100
    )
    honest_vector = encode(layout, {"update": [np.full(4, 10)]}, weight=5, entropy=bytes)
    total = bytearray(layout.unpacked_bytes)
    for _ in range(9):
        add_into(total, honest_vector, layout)
    poison = encode(layout, {"update": [np.full(4, 1000)]}, weight=5, entropy=bytes)
    add_into(total, poison, layout)
    assert decode(layout, total, survivors=10).sums["update"][0].tolist() == [1090] * 4
    beyond = bytearray(poison)
    words_beyond = np.frombuffer(beyond, "<u4", 4)
    words_beyond[:] = 10_000
    add_into(total, beyond, layout)
    with pytest.raises(RoundAbandoned, match="impossible_sum"):
        decode(layout, total, survivors=11)
