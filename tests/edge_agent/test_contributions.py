"""What may go into a sum: the plan's bounds, held by the device whatever its program gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_agent.contributions import bounded
from sottovoce.blobs import blob_ref
from sottovoce.plan import Aggregation, Counted, LocalWork, Plan, PrivacyTerms, Quantised, check_plan

COUNTS = Aggregation(name="counts", tensors=("int32[2,3]",), encoding=Counted(maximum=9), entries=3)
DEVICES = Aggregation(
    name="devices", tensors=("int32[2,3]",), encoding=Counted(maximum=1), presence_of="counts", lane="dense"
)
SUMS = Aggregation(
    name="sums", tensors=("float32[2,3]",), encoding=Quantised(half_range=50.0, bits=16), follows="counts"
)


def plan(*aggregations: Aggregation) -> Plan:
    made = Plan(
        fleet="choir",
        name="words",
        collection="messages",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=aggregations,
        privacy=PrivacyTerms(purpose="to count", minimum_cohort=3, weight_cap=10),
    )
    check_plan(made)
    return made


def table(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values).reshape(2, 3)


def test_only_the_largest_entries_stay_and_equal_ones_by_the_lowest_index() -> None:
    found = bounded(plan(COUNTS, DEVICES), {"counts": [table(4, 2, 0, 2, 7, 2)]})
    np.testing.assert_array_equal(found["counts"][0], table(4, 2, 0, 0, 7, 0))
    np.testing.assert_array_equal(found["devices"][0], table(1, 1, 0, 0, 1, 0))


def test_what_follows_keeps_the_same_entries() -> None:
    values = {"counts": [table(4, 2, 0, 2, 7, 2)], "sums": [table(0, -30, 12, 40, 5, 6)]}
    found = bounded(plan(COUNTS, DEVICES, SUMS), values)
    np.testing.assert_array_equal(found["sums"][0], table(0, -30, 0, 0, 5, 0))


def test_counts_are_compared_and_present_as_they_are_summed() -> None:
    found = bounded(plan(COUNTS, DEVICES), {"counts": [table(2.4, 1.6, 2.0, 0.4, -5, 300)]})
    np.testing.assert_array_equal(found["counts"][0], table(2.4, 1.6, 0, 0, 0, 300))
    np.testing.assert_array_equal(found["devices"][0], table(1, 1, 0, 0, 0, 1))


def test_of_real_numbers_the_largest_magnitudes_stay() -> None:
    reals = Aggregation(name="reals", tensors=("float32[4]",), encoding=Quantised(half_range=9.0, bits=16), entries=2)
    found = bounded(plan(reals), {"reals": [np.array([1.0, -3.0, 0.0, 2.0])]})
    np.testing.assert_array_equal(found["reals"][0], [0.0, -3.0, 0.0, 2.0])


def test_the_bound_holds_over_all_tensors_together() -> None:
    two = Aggregation(name="two", tensors=("int32[2]", "int32[3]"), encoding=Counted(maximum=9), entries=2)
    found = bounded(plan(two), {"two": [np.array([1, 5]), np.array([5, 6, 1])]})
    np.testing.assert_array_equal(np.concatenate(found["two"]), [0, 5, 0, 6, 0])
    assert [len(tensor) for tensor in found["two"]] == [2, 3]


def test_without_a_bound_everything_stays_and_what_no_plan_names_does_not() -> None:
    free = Aggregation(name="counts", tensors=("int32[2,3]",), encoding=Counted(maximum=9))
    values = table(4, 2, 0, 2, 7, 2)
    found = bounded(plan(free), {"counts": [values], "loss": [np.ones(1)]})
    assert list(found) == ["counts"]
    np.testing.assert_array_equal(found["counts"][0], values)


@given(
    values=arrays.arrays(np.int32, (2, 3), elements=st.integers(-3, 20)),
    entries=st.integers(1, 6),
)
def test_no_program_gets_more_out_than_the_plan_allows(values: Any, entries: int) -> None:
    counts = Aggregation(name="counts", tensors=("int32[2,3]",), encoding=Counted(maximum=9), entries=entries)
    found = bounded(plan(counts, DEVICES), {"counts": [values], "devices": [np.full((2, 3), 1000)]})
    kept = found["counts"][0]
    assert np.count_nonzero(kept) == min(entries, np.count_nonzero(values > 0))
    assert set(np.unique(found["devices"][0])) <= {0, 1}
    np.testing.assert_array_equal(found["devices"][0], kept > 0)
    dropped = values[(kept == 0) & (values > 0)]
    if dropped.size:
        assert kept[kept > 0].min() >= dropped.max()


@pytest.mark.parametrize("entries", [1, 4])
def test_the_same_values_always_give_the_same(entries: int) -> None:
    counts = Aggregation(name="counts", tensors=("int32[1000]",), encoding=Counted(maximum=9), entries=entries)
    found = bounded(plan(counts), {"counts": [np.ones(1000, np.int32)]})
    np.testing.assert_array_equal(np.flatnonzero(found["counts"][0]), np.arange(entries))
