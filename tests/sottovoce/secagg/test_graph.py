"""Graph and thresholds: PROTOCOL's rules, and why they are enough."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.errors import ConfigError
from sottovoce.secagg import graph


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
    assert graph.survivors_needed(fleet.parameters(mode="active"), 12) == 8
    assert graph.survivors_needed(fleet.parameters(mode="curious"), 12) == 6
    assert graph.survivors_needed(fleet.parameters(mode="curious", minimum_survivors=9), 12) == 9
    assert graph.survivors_needed(fleet.parameters(mode="curious"), 3) == 3


def test_everybody_is_everybodys_neighbour_and_holds_one_share_of_its_own() -> None:
    for members in (3, 7, 200):
        for position in (0, members // 2, members - 1):
            around = graph.neighbours(position, members, members - 1, bytes(32))
            assert around == tuple(other for other in range(members) if other != position)
            assert graph.share_holders(position, members, members - 1, bytes(32)) == tuple(range(members))
            assert graph.evaluation_point(position, members, members - 1, bytes(32)) == position + 1


@pytest.mark.parametrize("members", [0, 1, 2, 201, 10_000])
def test_cohorts_outside_the_complete_graph_are_refused(members: int) -> None:
    with pytest.raises(ConfigError):
        graph.degree(members)


def test_another_degree_than_the_complete_graphs_is_refused() -> None:
    for call in (graph.neighbours, graph.share_holders, graph.evaluation_point):
        with pytest.raises(ConfigError, match="neighbours each"):
            call(0, 10, 8, bytes(32))
