"""(k, t): the protocol's table, Google's published values, exact arithmetic beside scipy's, and what is refused."""

from __future__ import annotations

import math
import re
import time
from dataclasses import FrozenInstanceError
from fractions import Fraction
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.graph_parameters import GraphParameters, graph_parameters
from sottovoce.errors import ConfigError
from sottovoce.secagg.graph import COMPLETE_GRAPH_LIMIT, threshold
from sottovoce.wire.messages import Mode

TABLE: tuple[tuple[Mode, int, float, float, int, int], ...] = (
    ("curious", 1000, 0.05, 0.05, 30, 17),
    ("curious", 1000, 0.05, 0.10, 36, 19),
    ("curious", 1000, 0.10, 0.10, 48, 27),
    ("curious", 1000, 0.10, 0.30, 88, 36),
    ("curious", 10_000, 0.05, 0.05, 34, 20),
    ("curious", 10_000, 0.05, 0.10, 42, 22),
    ("curious", 10_000, 0.10, 0.10, 54, 31),
    ("curious", 10_000, 0.10, 0.30, 108, 44),
    ("active", 1000, 0.05, 0.05, 70, 53),
    ("active", 1000, 0.05, 0.10, 102, 72),
    ("active", 10_000, 0.05, 0.05, 84, 63),
    ("active", 10_000, 0.05, 0.10, 126, 88),
)
"""Mode, n, gamma, delta, k, t: the whole table of the protocol."""

GOOGLE_CURIOUS = (
    (1000, 0.45, 0.45, 822, 417),
    (10_000, 0.45, 0.45, 3494, 1771),
    (1000, 0.33, 0.33, 286, 150),
    (10_000, 0.33, 0.33, 422, 221),
    (1000, 0.05, 0.33, 72, 24),
    (10_000, 0.05, 0.33, 86, 29),
    (1000, 0.33, 0.05, 78, 60),
    (10_000, 0.33, 0.05, 92, 70),
    (1000, 0.05, 0.05, 30, 17),
    (10_000, 0.05, 0.05, 34, 20),
)
"""n, gamma, delta, k, t: expectations of google-parfait/federated-compute, graph_parameter_finder_test.cc."""

MODES = st.sampled_from(("curious", "active"))


def find(mode: Mode, clients: int, corrupt: float, dropout: float) -> GraphParameters:
    return graph_parameters(clients=clients, corrupt_share=corrupt, dropout_share=dropout, mode=mode)


@cache
def exact_tail(x: int, clients: int, marked: int, drawn: int) -> Fraction:
    """Pr[more than x of `marked` among `drawn`], in whole numbers."""
    ways = sum(math.comb(marked, i) * math.comb(clients - marked, drawn - i) for i in range(max(0, x + 1), drawn + 1))
    return Fraction(ways, math.comb(clients, drawn))


def completes(clients: int, dropouts: int, k: int, t: int) -> bool:
    return clients * exact_tail(k - t, clients, dropouts, k) <= Fraction(1, 2**20)


def curious_is_safe(clients: int, corrupt: int, dropouts: int, k: int, t: int) -> bool:
    allowed = Fraction(1, 2**41)
    gaps = Fraction(clients * (clients - k - 1), 2) * exact_tail(k - 1, clients, corrupt + dropouts, k)
    return gaps <= allowed and clients * exact_tail(t - 1, clients, corrupt, k) <= allowed


def active_is_safe(clients: int, corrupt: int, k: int, t: int) -> bool:
    allowed = Fraction(1, 2**81)
    if clients * exact_tail(2 * t - k - 1, clients, corrupt, k) > allowed:
        return False
    gaps = Fraction(clients**2, 2) * exact_tail(t - k // 2 - 1, clients, corrupt, k // 2) ** 2
    return gaps <= allowed


def is_good(mode: Mode, clients: int, corrupt: int, dropouts: int, k: int, t: int) -> bool:
    if not completes(clients, dropouts, k, t):
        return False
    if mode == "active":
        return active_is_safe(clients, corrupt, k, t)
    return curious_is_safe(clients, corrupt, dropouts, k, t)


@pytest.mark.parametrize(("mode", "clients", "corrupt", "dropout", "k", "t"), TABLE)
def test_the_protocols_table(mode: Mode, clients: int, corrupt: float, dropout: float, k: int, t: int) -> None:
    assert find(mode, clients, corrupt, dropout) == GraphParameters(neighbours=k, threshold=t)


@pytest.mark.parametrize(("clients", "corrupt", "dropout", "k", "t"), GOOGLE_CURIOUS)
def test_curious_values_are_those_of_googles_finder(
    clients: int, corrupt: float, dropout: float, k: int, t: int
) -> None:
    assert find("curious", clients, corrupt, dropout) == GraphParameters(neighbours=k, threshold=t)


@pytest.mark.parametrize(("mode", "clients", "corrupt", "dropout", "k", "t"), TABLE)
def test_the_table_satisfies_the_conditions_in_exact_arithmetic_and_nothing_cheaper_does(
    mode: Mode, clients: int, corrupt: float, dropout: float, k: int, t: int
) -> None:
    bad, lost = round(clients * corrupt), round(clients * dropout)
    assert is_good(mode, clients, bad, lost, k, t)
    assert not any(is_good(mode, clients, bad, lost, k - 2, fewer) for fewer in range(2, k - 1))
    if mode == "active":
        assert not completes(clients, lost, k, t + 1)
    else:
        assert not curious_is_safe(clients, bad, lost, k, t - 1)


@pytest.mark.parametrize(
    ("mode", "clients", "corrupt", "dropout"),
    [
        ("curious", 201, 0.05, 0.05),
        ("curious", 207, 0.05, 0.9),  # here the gaps decide
        ("curious", 333, 0.05, 0.1),
        ("active", 201, 0.05, 0.05),
        ("active", 240, 0.1, 0.05),
        ("active", 266, 0.05, 0.08),  # here one bit less would do with fewer
        ("active", 333, 0.05, 0.1),
    ],
)
def test_the_degree_is_the_smallest_of_all_in_exact_arithmetic(
    mode: Mode, clients: int, corrupt: float, dropout: float
) -> None:
    bad, lost = math.ceil(clients * corrupt), math.floor(clients * dropout)
    smallest = next(
        (k, t) for k in range(2, clients, 2) for t in range(2, k + 1) if is_good(mode, clients, bad, lost, k, t)
    )
    found = find(mode, clients, corrupt, dropout)
    assert found.neighbours == smallest[0]
    assert is_good(mode, clients, bad, lost, found.neighbours, found.threshold)


@settings(deadline=None, max_examples=40)
@given(
    mode=MODES,
    clients=st.integers(201, 3000),
    corrupt=st.floats(0.0, 0.15),
    dropout=st.floats(0.0, 0.2),
)
def test_every_ring_is_even_and_smaller_than_the_cohort(
    mode: Mode, clients: int, corrupt: float, dropout: float
) -> None:
    found = find(mode, clients, corrupt, dropout)
    assert found.neighbours % 2 == 0
    assert found.neighbours <= clients - 2
    assert 2 <= found.threshold <= found.neighbours
    assert found.threshold > corrupt * found.neighbours
    if mode == "active":
        assert 2 * found.threshold > found.neighbours * (1 + corrupt)


@settings(deadline=None, max_examples=30)
@given(
    mode=MODES,
    clients=st.integers(201, 3000),
    corrupt=st.tuples(st.floats(0.05, 0.15), st.floats(0.05, 0.15)).map(sorted),
    dropout=st.tuples(st.floats(0.05, 0.2), st.floats(0.05, 0.2)).map(sorted),
)
def test_worse_assumptions_never_need_fewer_neighbours(
    mode: Mode, clients: int, corrupt: list[float], dropout: list[float]
) -> None:
    best = find(mode, clients, corrupt[0], dropout[0]).neighbours
    assert best <= find(mode, clients, corrupt[1], dropout[0]).neighbours
    assert best <= find(mode, clients, corrupt[0], dropout[1]).neighbours


@pytest.mark.parametrize("mode", ["curious", "active"])
def test_more_bits_and_more_clients_never_need_fewer_neighbours(mode: Mode) -> None:
    def degree(clients: int = 1000, security_bits: int = 40, correctness_bits: int = 20) -> int:
        return graph_parameters(
            clients=clients,
            corrupt_share=0.05,
            dropout_share=0.1,
            mode=mode,
            security_bits=security_bits,
            correctness_bits=correctness_bits,
        ).neighbours

    by_security = [degree(security_bits=bits) for bits in (20, 40, 60, 80, 100)]
    by_correctness = [degree(correctness_bits=bits) for bits in (10, 20, 30, 40)]
    by_clients = [degree(clients=clients) for clients in (300, 1000, 3000, 10_000, 65_520)]
    for degrees in (by_security, by_correctness, by_clients):
        assert degrees == sorted(degrees)
        assert degrees[0] < degrees[-1]


@pytest.mark.parametrize("clients", [250, 1000, 10_000])
def test_an_active_server_costs_more_neighbours_and_a_higher_threshold(clients: int) -> None:
    curious, active = find("curious", clients, 0.05, 0.1), find("active", clients, 0.05, 0.1)
    assert active.neighbours > curious.neighbours
    assert active.threshold / active.neighbours > curious.threshold / curious.neighbours


@pytest.mark.parametrize(("mode", "t"), [("curious", 50), ("active", 53)])
def test_a_hundred_clients_have_the_complete_graph(mode: Mode, t: int) -> None:
    assert find(mode, 100, 0.05, 0.05) == GraphParameters(neighbours=99, threshold=t)


@pytest.mark.parametrize("mode", ["curious", "active"])
def test_the_ring_begins_after_the_limit_of_the_complete_graph(mode: Mode) -> None:
    last = find(mode, COMPLETE_GRAPH_LIMIT, 0.05, 0.05)
    first = find(mode, COMPLETE_GRAPH_LIMIT + 1, 0.05, 0.05)
    assert last == GraphParameters(COMPLETE_GRAPH_LIMIT - 1, threshold(mode, COMPLETE_GRAPH_LIMIT, 500))
    assert first.neighbours < COMPLETE_GRAPH_LIMIT // 2


@pytest.mark.parametrize("mode", ["curious", "active"])
@pytest.mark.parametrize("clients", [100, 1000])
def test_neither_share_is_taken_below_five_percent(mode: Mode, clients: int) -> None:
    floor = find(mode, clients, 0.05, 0.05)
    assert find(mode, clients, 0.0, 0.0) == find(mode, clients, 0.01, 0.05) == find(mode, clients, 0.05, 0.01) == floor


def test_a_fraction_of_a_basis_point_is_rounded_up_and_float_noise_is_not() -> None:
    assert find("curious", 10_000, 0.05, 0.097).neighbours == 40
    assert find("curious", 10_000, 0.05, 0.09701).neighbours == 42
    assert 0.1637 * 10_000 > 1637
    assert find("curious", 10_000, 0.05, 0.1637).neighbours == 52
    assert find("curious", 10_000, 0.05, 0.1638).neighbours == 54


@pytest.mark.parametrize(
    ("clients", "corrupt", "dropout", "name"),
    [
        (2, 0.05, 0.05, "clients"),
        (65_521, 0.05, 0.05, "clients"),
        (1000, -0.01, 0.05, "corrupt_share"),
        (1000, 0.5, 0.05, "corrupt_share"),
        (1000, math.nan, 0.05, "corrupt_share"),
        (1000, 0.05, -0.01, "dropout_share"),
        (1000, 0.05, 1.0, "dropout_share"),
        (1000, 0.05, math.nan, "dropout_share"),
    ],
)
def test_an_argument_out_of_range_is_named(clients: int, corrupt: float, dropout: float, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        find("active", clients, corrupt, dropout)


@pytest.mark.parametrize("name", ["security_bits", "correctness_bits"])
@pytest.mark.parametrize("bits", [0, 129])
def test_bits_out_of_range_are_named(name: str, bits: int) -> None:
    assumed = {"security_bits": 40, "correctness_bits": 20} | {name: bits}
    with pytest.raises(ConfigError, match=name):
        graph_parameters(clients=1000, corrupt_share=0.05, dropout_share=0.05, mode="curious", **assumed)


@pytest.mark.parametrize(
    ("mode", "clients", "corrupt", "dropout"),
    [
        ("active", 1000, 0.3, 0.3),
        ("active", 300, 0.1, 0.4),
        ("curious", 250, 0.45, 0.55),
        ("active", 150, 0.3, 0.4),
    ],
)
def test_infeasible_assumptions_name_the_most_that_would_do(
    mode: Mode, clients: int, corrupt: float, dropout: float
) -> None:
    with pytest.raises(ConfigError, match=f"{mode} mode") as refused:
        find(mode, clients, corrupt, dropout)
    cures = {name: float(value) for name, value in re.findall(r"lower (\w+_share) to ([\d.]+)", str(refused.value))}
    assert set(cures) == {"corrupt_share", "dropout_share"}
    for name, share in cures.items():
        assumed = {"corrupt_share": corrupt, "dropout_share": dropout}
        graph_parameters(clients=clients, mode=mode, **(assumed | {name: share}))
        with pytest.raises(ConfigError, match="no graph"):
            graph_parameters(clients=clients, mode=mode, **(assumed | {name: share + 0.01}))


def test_a_large_corrupt_share_alone_cannot_be_cured_by_itself() -> None:
    with pytest.raises(ConfigError, match=r"lower dropout_share to 0\.13$"):
        find("active", 201, 0.45, 0.45)


def test_a_smaller_cohort_is_offered_only_where_its_complete_graph_would_do() -> None:
    with pytest.raises(ConfigError, match="lower the cohort to 200 clients"):
        find("active", 201, 0.3, 0.3)
    assert find("active", 200, 0.3, 0.3).neighbours == 199


def test_three_clients_cannot_check_an_active_server() -> None:
    with pytest.raises(ConfigError, match="gather more clients"):
        find("active", 3, 0.05, 0.05)
    assert find("curious", 3, 0.05, 0.05) == GraphParameters(neighbours=2, threshold=2)
    assert find("active", 4, 0.05, 0.05) == GraphParameters(neighbours=3, threshold=3)


def test_ten_thousand_active_clients_take_under_two_cpu_seconds() -> None:
    before = time.process_time()
    graph_parameters(clients=10_000, corrupt_share=0.0517, dropout_share=0.1017, mode="active")
    assert time.process_time() - before < 2.0


def test_a_second_call_is_answered_from_memory_and_cannot_be_changed() -> None:
    first = find("active", 1000, 0.05, 0.05)
    assert find("active", 1000, 0.05, 0.05) is first
    with pytest.raises(FrozenInstanceError):
        first.threshold = 2  # type: ignore[misc]
