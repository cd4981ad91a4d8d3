"""Graph and thresholds: PROTOCOL's rules, and why they are enough."""

from __future__ import annotations

from fractions import Fraction
from math import comb
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.errors import ConfigError
from sottovoce.secagg import graph
from sottovoce.secagg.graph import GraphParameters


@pytest.mark.parametrize(
    ("members", "gamma", "corrupt", "curious", "active"),
    [
        (3, 500, 1, 2, 3),
        (4, 500, 1, 2, 3),
        (5, 500, 1, 3, 4),
        (12, 500, 1, 6, 7),
        (20, 500, 1, 10, 11),
        (21, 500, 2, 11, 12),
        (100, 500, 5, 50, 53),
        (100, 3333, 34, 50, 68),
        (200, 1000, 20, 100, 111),
        (9, 4999, 5, 6, 8),
    ],
)
def test_thresholds_of_the_complete_graph(members: int, gamma: int, corrupt: int, curious: int, active: int) -> None:
    assert graph.corrupt_bound(members, gamma) == corrupt
    assert graph.threshold("curious", members, gamma) == curious
    assert graph.threshold("active", members, gamma) == active


@given(st.integers(3, 200), st.integers(500, 4999))
def test_no_coalition_rebuilds_what_it_should_not(members: int, gamma: int) -> None:
    corrupt = graph.corrupt_bound(members, gamma)
    assert graph.threshold("curious", members, gamma) > corrupt
    # Two sets of answers, one for each secret of a victim: honest members answer for one, corrupt ones for both.
    assert 2 * graph.threshold("active", members, gamma) > members + corrupt


def test_survivors_needed_follow_threshold_mode_and_minimum(fleet: Any) -> None:
    assert graph.survivors_needed(fleet.parameters(mode="active"), 7) == 8
    assert graph.survivors_needed(fleet.parameters(mode="curious"), 6) == 6
    assert graph.survivors_needed(fleet.parameters(mode="curious", minimum_survivors=9), 6) == 9
    assert graph.survivors_needed(fleet.parameters(mode="curious"), 2) == 3


def test_everybody_is_everybodys_neighbour_and_holds_one_share_of_its_own() -> None:
    for members in (3, 7, 200):
        complete = graph.Graph(members, members - 1, bytes(32))
        assert complete.complete
        for position in (0, members // 2, members - 1):
            around = complete.neighbours(position)
            assert around == tuple(other for other in range(members) if other != position)
            assert tuple(complete.all_neighbours()[position]) == around
            assert complete.share_holders(position) == tuple(range(members))
            assert complete.evaluation_points([position]) == (position + 1,)


@pytest.mark.parametrize("members", [0, 1, 2, 201, 10_000])
def test_cohorts_outside_the_complete_graph_are_refused(members: int) -> None:
    with pytest.raises(ConfigError):
        graph.degree(members)


# --- the ring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("members", "count"), [(5, 2), (201, 26), (1000, 30), (1001, 70)])
def test_on_a_ring_neighbours_are_mutual_and_next_to_each_other(members: int, count: int) -> None:
    ring = graph.Graph(members, count, b"r" * 32)
    around = [tuple(own) for own in ring.all_neighbours().tolist()]
    assert sorted(ring.order().tolist()) == list(range(members))
    for position in range(members):
        own = around[position]
        assert own == ring.neighbours(position) == ring.share_holders(position) == tuple(sorted(set(own)))
        assert len(own) == count
        assert all(position in around[other] for other in own)
    points = ring.evaluation_points(range(members))
    assert sorted(points) == list(range(1, members + 1))
    first = points.index(1)
    near = {*range(2, 2 + count // 2), *range(members - count // 2 + 1, members + 1)}
    assert {points[other] for other in around[first]} == near


def test_the_order_on_the_ring_follows_from_the_seed_alone() -> None:
    words = Cipher(algorithms.ChaCha20(b"s" * 32, bytes(16)), mode=None).encryptor().update(bytes(8 * 300))
    expected = sorted(range(300), key=lambda position: int.from_bytes(words[8 * position :][:8], "little"))
    assert graph.Graph(300, 10, b"s" * 32).order().tolist() == expected
    assert graph.Graph(300, 10, b"t" * 32).order().tolist() != expected


@given(st.integers(3, 400), st.data())
def test_tails_are_those_of_the_hypergeometric_distribution(members: int, data: st.DataObject) -> None:
    marked, drawn = data.draw(st.integers(0, members)), data.draw(st.integers(0, members))
    smallest = data.draw(st.integers(-1, drawn + 1))
    exact = Fraction(
        sum(comb(marked, x) * comb(members - marked, drawn - x) for x in range(max(smallest, 0), drawn + 1)),
        comb(members, drawn),
    )
    found = graph.hypergeometric_tail(smallest, members=members, marked=marked, drawn=drawn)
    assert found == pytest.approx(float(exact), rel=1e-9, abs=0)


def ring_parameters(fleet: Any, mode: str, corrupt: int, dropout: int) -> Any:
    return fleet.parameters(mode=mode, maximum_clients=10_000, corrupt_share_bp=corrupt, dropout_share_bp=dropout)


@pytest.mark.parametrize(
    ("mode", "members", "corrupt", "dropout", "k", "t"),
    [
        ("curious", 1000, 500, 500, 30, 17),
        ("curious", 1000, 500, 1000, 36, 19),
        ("curious", 1000, 1000, 3000, 88, 36),
        ("curious", 10_000, 500, 500, 34, 20),
        ("curious", 10_000, 1000, 3000, 108, 44),
        ("active", 1000, 500, 500, 70, 53),
        ("active", 1000, 500, 1000, 102, 72),
        ("active", 10_000, 500, 500, 84, 63),
        ("active", 10_000, 500, 1000, 126, 88),
    ],
)
def test_the_protocols_table_is_safe_and_what_is_a_little_cheaper_is_not(
    fleet: Any, mode: str, members: int, corrupt: int, dropout: int, k: int, t: int
) -> None:
    parameters = ring_parameters(fleet, mode, corrupt, dropout)
    graph.check_graph(parameters, members, GraphParameters(k, t))
    # Curious rows have the smallest t; active ones the largest t that completes, so a few less may still be safe.
    with pytest.raises(ConfigError, match="do not protect"):
        graph.check_graph(parameters, members, GraphParameters(k, t - 1 if mode == "curious" else (k + 2) // 2))
    with pytest.raises(ConfigError, match="do not protect"):
        graph.check_graph(parameters, members, GraphParameters(k // 2 // 2 * 2, t // 2))


def test_a_device_that_assumes_more_corrupt_members_wants_a_larger_graph(fleet: Any) -> None:
    for mode, k, t in (("curious", 30, 17), ("active", 70, 53)):
        graph.check_graph(ring_parameters(fleet, mode, 500, 500), 1000, GraphParameters(k, t))
        with pytest.raises(ConfigError, match="20 % corrupt"):
            graph.check_graph(ring_parameters(fleet, mode, 2000, 500), 1000, GraphParameters(k, t))


def test_the_connection_of_a_curious_ring_counts_dropouts(fleet: Any) -> None:
    figures = GraphParameters(30, 17)
    graph.check_graph(ring_parameters(fleet, "curious", 500, 500), 1000, figures)
    with pytest.raises(ConfigError, match="do not protect"):
        graph.check_graph(ring_parameters(fleet, "curious", 500, 9999), 1000, figures)


def test_a_large_complete_graph_is_safe_with_its_own_threshold_only(fleet: Any) -> None:
    parameters = ring_parameters(fleet, "active", 500, 500)
    graph.check_graph(parameters, 1000, GraphParameters(999, 526))
    for threshold in (525, 527):
        with pytest.raises(ConfigError, match="the rules give 999 and 526"):
            graph.check_graph(parameters, 1000, GraphParameters(999, threshold))
    with pytest.raises(ConfigError):
        graph.check_graph(parameters, 10_000, GraphParameters(9999, 5251))  # beyond exact arithmetic


@pytest.mark.parametrize("members", [2, 3, 100, 200])
def test_small_cohorts_are_complete_or_refused(fleet: Any, members: int) -> None:
    parameters = fleet.parameters()
    right = GraphParameters(members - 1, graph.threshold("active", members, 500))
    if members >= 3:
        graph.check_graph(parameters, members, right)
        assert graph.complete_graph(parameters, members) == right
    for wrong in (GraphParameters(members - 3, right.threshold), GraphParameters(members - 1, right.threshold - 1)):
        with pytest.raises(ConfigError):
            graph.check_graph(parameters, members, wrong)
    if members < 3:
        with pytest.raises(ConfigError):
            graph.check_graph(parameters, members, right)
