"""The fleet executor: one round a call, the same plan every time, a key inside a federated program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sottovoce as sv
from sottovoce.blobs import digest_of
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.tensors import decode_tensors


@sv.federated_computation("{float32}@CLIENTS", "float32@SERVER")
def shifted_mean(readings, by):
    """The average of the readings and a number."""
    both = sv.federated_map(
        sv.tf_computation("float32", "float32")(lambda a, b: a + b), (readings, sv.federated_broadcast(by))
    )
    return sv.federated_mean(both, bound=(-100, 100))


@sv.federated_computation("{float32}@CLIENTS")
def mean(readings):
    return sv.federated_mean(readings)


def test_every_call_is_one_round_of_the_same_plan(fleet: FleetExecutor, plain_rounds: Any) -> None:
    with sv.use(fleet):
        for by in (1.0, 2.0):
            assert shifted_mean([1.0, 2.0, 6.0], by) == pytest.approx(3 + by, abs=1e-6)
    first, second = plain_rounds.requests
    assert digest_of(first.bundle) == digest_of(second.bundle)
    assert (first.aggregations, first.work, first.name) == (second.aggregations, second.work, second.name)
    assert [decode_tensors(request.broadcast)["broadcast_0_0"].item() for request in (first, second)] == [1.0, 2.0]
    assert first.purpose == "The average of the readings and a number."
    assert first.key == ""


def test_values_that_live_on_the_devices_are_read_there(fleet: FleetExecutor, plain_rounds: Any) -> None:
    plain_rounds.collections = {
        "temperature": [{"celsius": np.array([9.0, newest], np.float32)} for newest in (19.0, 20.0, 24.0, 99.0)]
    }
    with sv.use(fleet):
        assert mean(sv.latest("temperature", low=-20, high=45)) == pytest.approx((19 + 20 + 24 + 45) / 4, abs=1e-5)
    (request,) = plain_rounds.requests
    assert (request.collection, request.members) == ("temperature", ())


def test_a_round_inside_a_federated_program_has_a_key(fleet: FleetExecutor, plain_rounds: Any, tmp_path: Path) -> None:
    with sv.use(fleet), sv.federated_program("averages", tmp_path) as program:
        program.restore(0)
        for _ in program.rounds(2):
            shifted_mean([1.0, 2.0, 6.0], 0.0)
            program.commit(0)
    keys = [request.key for request in plain_rounds.requests]
    assert all(keys)
    assert len(set(keys)) == 2
