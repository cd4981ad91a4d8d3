"""What a session must do at least: counted by hand here, and measured on vectors of that session."""

from __future__ import annotations

import pytest

from simulation.secagg_bench_floor import Counts, Gauge, device_counts, server_counts
from sottovoce.wire.messages import SecAggParameters

NAMES = {"agreements", "streams", "additions", "tags"}


def parameters(entries: int, cipher: str = "aes-128-ctr") -> SecAggParameters:
    return SecAggParameters(
        mode="curious",
        cipher=cipher,  # type: ignore[arg-type]
        minimum_survivors=3,
        maximum_clients=100,
        corrupt_share_bp=500,
        dropout_share_bp=500,
        vector_bytes=4 * entries + 16,
        wide_bytes=16,
        packed=(),
    )


def test_a_device_agrees_twice_with_every_neighbour_and_once_with_the_coordinator() -> None:
    assert device_counts(neighbours=99, sharers=99) == Counts(199, 100, 100, 1)
    assert device_counts(neighbours=99, sharers=89) == Counts(189, 90, 90, 1)


def test_the_server_removes_a_mask_for_every_survivor_and_every_pair_that_was_torn_apart() -> None:
    assert server_counts(neighbours=99, members=100, sharers=100, survivors=100) == Counts(100, 100, 200, 100)
    assert server_counts(neighbours=99, members=100, sharers=100, survivors=90) == Counts(990, 990, 1080, 90)
    assert server_counts(neighbours=99, members=100, sharers=90, survivors=90) == Counts(90, 90, 180, 90)
    ring = server_counts(neighbours=30, members=1001, sharers=1001, survivors=900)
    assert ring.agreements == pytest.approx(900 + 101 * 30 * 0.9)


def test_the_floor_is_what_so_many_cost() -> None:
    assert Counts(2, 3, 5, 7).floor_s({"agreements": 1.0, "streams": 10.0, "additions": 100.0, "tags": 1000.0}) == 7532


@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
def test_primitives_are_measured_on_the_whole_vector(cipher: str) -> None:
    short, long = (Gauge(parameters(entries, cipher), every=1) for entries in (10_000, 1_000_000))
    for _ in range(5):
        short.tick()
        long.tick()
    few, many = short.medians(), long.medians()
    assert few.keys() == many.keys() == NAMES
    assert min(few.values()) > 0
    assert all(many[name] > 10 * few[name] for name in NAMES - {"agreements"})


def test_samples_are_taken_now_and_then() -> None:
    gauge = Gauge(parameters(100), every=3)
    for _ in range(7):
        gauge.tick()
    assert [len(samples) for samples in gauge._samples.values()] == [3, 3, 3, 3]
