"""The threshold: what too few devices have said is out of the sums before anything knows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.requests import SingleRound, for_everybody
from coordinator.threshold import thresholded
from sottovoce.blobs import blob_ref
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.plan import Aggregation, Counted, LocalWork, Plan, PrivacyTerms, Quantised
from sottovoce.tensors import decode_tensors, encode_tensors

COUNTS = Aggregation(name="counts", tensors=("int32[4]",), encoding=Counted(maximum=9))
DEVICES = Aggregation(name="devices", tensors=("int32[4]",), encoding=Counted(maximum=1), presence_of="counts")
SUMS = Aggregation(name="sums", tensors=("float32[4]",), encoding=Quantised(half_range=9.0, bits=16), follows="counts")
SKETCH = Aggregation(name="sketch", tensors=("int32[2]", "int32[2]"), encoding=Counted(maximum=1))
TOTAL = Aggregation(name="total", tensors=("int32[1]",), encoding=Counted(maximum=9))
BROUGHT: dict[str, list[Any]] = {
    "counts": [np.array([9.0, 18.0, 5.0, 0.0])],
    "devices": [np.array([1.0, 2.0, 5.0, 0.0])],
    "sums": [np.array([-1.5, 2.5, 3.5, 0.01])],
    "sketch": [np.array([1.0, 4.0]), np.array([3.0, 2.0])],
    "total": [np.array([1.0])],
}


def brought() -> RoundSums:
    return RoundSums(sums=BROUGHT, weight=30, survivors=6, clamped=2, round=4)


def plan(threshold: int, *aggregations: Aggregation) -> Plan:
    return Plan(
        fleet="choir",
        name="words",
        collection="messages",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=aggregations or (COUNTS, DEVICES, SUMS, SKETCH, TOTAL),
        privacy=PrivacyTerms(purpose="to count", minimum_cohort=3, weight_cap=10, threshold=threshold),
    )


@pytest.mark.parametrize(
    ("threshold", "counts", "devices", "sums"),
    [
        (1, [9, 18, 5, 0], [1, 2, 5, 0], [-1.5, 2.5, 3.5, 0]),
        (2, [0, 18, 5, 0], [0, 2, 5, 0], [0, 2.5, 3.5, 0]),
        (3, [0, 0, 5, 0], [0, 0, 5, 0], [0, 0, 3.5, 0]),
        (6, [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_takes_an_entry_out_of_all_that_tell_of_it(threshold: int, counts: Any, devices: Any, sums: Any) -> None:
    found = thresholded(brought(), plan(threshold))
    np.testing.assert_array_equal(found.sums["counts"][0], counts)
    np.testing.assert_array_equal(found.sums["devices"][0], devices)
    np.testing.assert_array_equal(found.sums["sums"][0], sums)
    np.testing.assert_array_equal(found.sums["total"][0], [1.0])
    assert (found.weight, found.survivors, found.clamped, found.round) == (30, 6, 2, 4)


def test_counts_up_to_one_count_devices_themselves() -> None:
    found = thresholded(brought(), plan(3)).sums["sketch"]
    np.testing.assert_array_equal(np.stack(found), [[0, 4], [3, 0]])


def test_without_a_threshold_everything_stays() -> None:
    assert thresholded(brought(), plan(0)).sums is BROUGHT


def test_what_everybody_gets_is_whole_numbers_where_it_counts() -> None:
    named = decode_tensors(encode_tensors(for_everybody(BROUGHT, plan(0).aggregations)))
    assert {name: str(tensor.dtype) for name, tensor in named.items()} == {
        "counts": "int32",
        "devices": "int32",
        "sums": "float64",
        "sketch.0": "int32",
        "sketch.1": "int32",
        "total": "int32",
    }
    large = for_everybody({"counts": [np.array([2.0**40])]}, [COUNTS])["counts"]
    assert large.dtype == np.int64
    assert large[0] == 2**40


@pytest.mark.parametrize("publish", [True, False])
def test_a_request_gives_its_sums_to_everybody_only_if_it_says_so(publish: bool) -> None:
    request = RoundRequest(
        key="",
        name="words",
        purpose="to count",
        collection="messages",
        bundle=b"",
        work=LocalWork(),
        aggregations=(COUNTS, DEVICES, SUMS, SKETCH, TOTAL),
        weight_cap=10,
        broadcast=encode_tensors({"start": np.zeros(1, np.int32)}),
        publish=publish,
    )
    program = SingleRound(request)
    advance = program.apply(0, program.first_state, brought())
    after = program.broadcast_at(1, advance.state)
    assert list(after) == (["counts", "devices", "sums", "sketch.0", "sketch.1", "total"] if publish else ["start"])
    assert advance.metrics == {"examples": 30.0, "clamped": 2.0}
