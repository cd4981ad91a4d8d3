"""Lanes: what a value becomes, what a sum says, and what cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from aggregation_plans import plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sottovoce.errors import ConfigError, NonFiniteUpdate, PolicyRefusal, ProgramError, RoundAbandoned
from sottovoce.plan import Aggregation, Counted, Quantised
from sottovoce.secagg.encoding import decode, encode
from sottovoce.secagg.lanes import layout_of
from sottovoce.secagg.segments import add_into

CLIENTS = 20


def quantised(name: str = "update", tensors: tuple[str, ...] = ("float32[5]",), **changes: Any) -> Aggregation:
    return Aggregation(name=name, tensors=tensors, encoding=Quantised(half_range=2.0, bits=16), **changes)


PLAN = plan_of(
    Aggregation(name="squares", tensors=("float64[2]",), encoding=Quantised(half_range=9.0, bits=40), lane="uint64"),
    quantised(tensors=("float32[3]", "float32[2,1]"), weighted=True, clip_norm=3.0),
    Aggregation(name="correct", tensors=("int32[1]",), encoding=Counted(maximum=1000)),
    Aggregation(name="seen", tensors=("float32[1]",), encoding=Counted(maximum=2**40), lane="uint64"),
)
LAYOUT = layout_of(PLAN, maximum_clients=CLIENTS)


def values(**changes: Any) -> dict[str, list[Any]]:
    given = {
        "squares": [np.array([1.5, -2.5])],
        "update": [np.array([0.1, -0.2, 0.3], np.float32), np.array([[1.0], [-1.0]], np.float32)],
        "correct": [np.array([7], np.int32)],
        "seen": [np.array([12.4], np.float32)],
    }
    return given | changes


def test_the_layout_is_the_specs(fixed_entropy: Any) -> None:
    """[5 uint32 of update][1 of correct], no padding needed, [2 uint64 of squares][1 of seen][weight][clamped]."""
    assert (LAYOUT.vector_bytes, LAYOUT.wide_bytes) == (6 * 4 + 5 * 8, 5 * 8)
    vector = encode(LAYOUT, values(), weight=30, entropy=fixed_entropy(1))
    words = np.frombuffer(vector, "<u8", offset=24)
    assert np.frombuffer(vector, "<u4")[5] == 7
    assert (words[2], words[3], words[4]) == (12, 30, 0)
    quantum = 18 / (2**40 - 1)
    assert abs(words[0] - (1.5 + 9) / quantum) <= 1
    assert bytes(LAYOUT.trailing(vector)) == bytes(vector[-16:])


def test_an_odd_number_of_narrow_entries_is_padded_with_zeros(fixed_entropy: Any) -> None:
    layout = layout_of(plan_of(quantised()), maximum_clients=CLIENTS)
    assert (layout.vector_bytes, layout.wide_bytes) == (24 + 16, 16)
    vector = encode(layout, {"update": [np.zeros(5, np.float32)]}, weight=1, entropy=fixed_entropy(1))
    assert vector[20:24] == bytes(4)
    total = bytearray(vector)
    total[20] = 1
    with pytest.raises(RoundAbandoned, match="padding"):
        decode(layout, total, survivors=1)


def test_a_plan_of_wide_lanes_only_has_no_narrow_part(fixed_entropy: Any) -> None:
    layout = layout_of(plan_of(quantised(lane="uint64")), maximum_clients=CLIENTS)
    assert layout.vector_bytes == layout.wide_bytes == 7 * 8
    vector = encode(layout, {"update": [np.full(5, 0.5, np.float32)]}, weight=1, entropy=fixed_entropy(2))
    np.testing.assert_allclose(decode(layout, vector, survivors=1).sums["update"][0], 0.5, atol=1e-4)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            npst.arrays(np.float32, 3, elements=st.floats(-3, 3, width=32)),
            npst.arrays(np.float32, (2, 1), elements=st.floats(-3, 3, width=32)),
            st.integers(-10, 1100),
            st.integers(1, 90),
        ),
        min_size=1,
        max_size=CLIENTS,
    )
)
def test_the_decoded_sum_is_the_sum_within_the_stated_error(fixed_entropy: Any, devices: list[Any]) -> None:
    total = bytearray(LAYOUT.vector_bytes)
    expected = np.zeros(5)
    clamped = counted = 0
    for index, (first, second, count, weight) in enumerate(devices):
        given = values(update=[first, second], correct=[np.array([count], np.int32)])
        add_into(total, encode(LAYOUT, given, weight=weight, entropy=fixed_entropy(index)), LAYOUT)
        update = np.concatenate([first.ravel(), second.ravel()]).astype(np.float64)
        norm = math.sqrt(update @ update)
        update *= min(1, 3.0 / norm if norm else 1) * min(weight, 50) / 50
        near_the_edge = np.abs(np.abs(update) - 2.0) < 1e-9
        clamped += int(np.count_nonzero((np.abs(update) > 2) & ~near_the_edge)) + (not 0 <= count <= 1000)
        expected += np.clip(update, -2, 2)
        counted += min(max(count, 0), 1000)
    aggregate = decode(LAYOUT, total, survivors=len(devices))
    quantum = 4 / (2**16 - 1)
    found = np.concatenate([tensor.ravel() for tensor in aggregate.sums["update"]])
    np.testing.assert_allclose(found, expected, atol=quantum * len(devices))
    assert [tensor.shape for tensor in aggregate.sums["update"]] == [(3,), (2, 1)]
    assert aggregate.sums["correct"][0][0] == counted
    assert aggregate.sums["seen"][0][0] == 12 * len(devices)
    assert aggregate.weight == sum(min(weight, 50) for *_, weight in devices)
    assert aggregate.clamped >= clamped
    mean = aggregate.mean("update")[0]
    np.testing.assert_allclose(mean, aggregate.sums["update"][0] * 50 / aggregate.weight)
    np.testing.assert_allclose(aggregate.mean("correct")[0], counted / len(devices))


def test_the_order_is_clip_then_weight_then_clamp(fixed_entropy: Any) -> None:
    """[30, 40] clips to [1.8, 2.4], weighs to [0.9, 1.2] and stays; clamping first would count two entries."""
    given = values(update=[np.array([30, 40, 0], np.float32), np.zeros((2, 1), np.float32)])
    aggregate = decode(LAYOUT, encode(LAYOUT, given, weight=25, entropy=fixed_entropy(3)), survivors=1)
    np.testing.assert_allclose(aggregate.sums["update"][0], [0.9, 1.2, 0], atol=1e-4)
    assert aggregate.clamped == 0
    aggregate = decode(LAYOUT, encode(LAYOUT, given, weight=500, entropy=fixed_entropy(3)), survivors=1)
    np.testing.assert_allclose(aggregate.sums["update"][0], [1.8, 2.0, 0], atol=1e-4)
    assert (aggregate.clamped, aggregate.weight) == (1, 50)


def test_rounding_is_unbiased_and_fresh() -> None:
    """A value a quarter above a level is rounded up a quarter of the time; two encodings differ."""
    encoding = Quantised(half_range=0.5, bits=2)
    plan = plan_of(Aggregation(name="u", tensors=("float32[40000]",), encoding=encoding))
    layout = layout_of(plan, maximum_clients=CLIENTS)
    level = (1 + 0.25) / 3 - 0.5
    given = {"u": [np.full(40_000, level, np.float32)]}
    seeds = iter([b"1" * 32, b"2" * 32])
    first, second = (encode(layout, given, weight=1, entropy=lambda count: next(seeds)) for _ in range(2))
    entries = layout.lanes[0].entries(first)
    assert set(entries.tolist()) == {1, 2}
    assert abs(np.mean(entries == 2) - 0.25) < 0.01
    assert first != second


@pytest.mark.parametrize("bits", [1, 16, 31, 40, 48])
def test_the_ends_of_the_range_stay_in_it(fixed_entropy: Any, bits: int) -> None:
    encoding = Quantised(half_range=0.1, bits=bits)
    plan = plan_of(Aggregation(name="u", tensors=("float64[70000]",), encoding=encoding, lane="uint64"))
    layout = layout_of(plan, maximum_clients=CLIENTS)
    given = np.tile([0.1, -0.1, 9.0, -9.0], 17500)
    vector = encode(layout, {"u": [given]}, weight=1, entropy=fixed_entropy(bits))
    entries = layout.lanes[0].entries(vector).reshape(-1, 4)
    assert (entries[:, [0, 2]] == encoding.maximum).all()
    assert (entries[:, [1, 3]] == 0).all()
    assert decode(layout, vector, survivors=1).clamped == 35000


@pytest.mark.parametrize(
    ("changes", "weight", "error"),
    [
        ({"update": [np.array([1, np.nan, 3], np.float32), np.zeros((2, 1), np.float32)]}, 1, NonFiniteUpdate),
        ({"seen": [np.array([np.inf], np.float32)]}, 1, NonFiniteUpdate),
        ({"squares": [np.zeros(3)]}, 1, ProgramError),
        ({"update": [np.zeros(3, np.float32)]}, 1, ProgramError),
        ({"update": [np.zeros(3, np.float32), np.zeros(2, np.float32)]}, 1, ProgramError),
        ({"correct": [np.array(["7"])]}, 1, ProgramError),
        ({"correct": [np.array([1j])]}, 1, ProgramError),
        ({"surprise": [np.zeros(1)]}, 1, ProgramError),
        ({}, 0, ProgramError),
    ],
)
def test_values_that_are_not_what_the_plan_says_are_refused(
    fixed_entropy: Any, changes: dict[str, Any], weight: int, error: type[ProgramError]
) -> None:
    with pytest.raises(error):
        encode(LAYOUT, values(**changes), weight=weight, entropy=fixed_entropy(1))


def test_a_missing_aggregation_and_an_overflowing_norm_are_refused(fixed_entropy: Any) -> None:
    given = values()
    del given["correct"]
    with pytest.raises(ProgramError, match="correct"):
        encode(LAYOUT, given, weight=1, entropy=fixed_entropy(1))
    layout = layout_of(plan_of(quantised(tensors=("float64[2]",), clip_norm=1.0)), maximum_clients=CLIENTS)
    with pytest.raises(NonFiniteUpdate, match="norm"):
        encode(layout, {"update": [np.full(2, 1e300)]}, weight=1, entropy=fixed_entropy(1))


def set_word(total: bytearray, dtype: str, index: int, value: int) -> None:
    np.frombuffer(total, dtype)[index] = value


@pytest.mark.parametrize(
    ("dtype", "index", "value", "match"),
    [
        ("<u4", 0, 2 * (2**16 - 1) + 1, "update"),
        ("<u4", 5, 2001, "correct"),
        ("<u8", 3, 2 * (2**40 - 1) + 1, "squares"),
        ("<u8", 5, 2 * 2**40 + 1, "seen"),
        ("<u8", 6, 101, "weight"),
        ("<u8", 6, 0, "add up to 0"),
        ("<u8", 7, 2 * 9 + 1, "clamped"),
    ],
)
def test_a_sum_that_cannot_be_abandons_the_round(
    fixed_entropy: Any, dtype: str, index: int, value: int, match: str
) -> None:
    total = bytearray(LAYOUT.vector_bytes)
    for seed in range(2):
        add_into(total, encode(LAYOUT, values(), weight=9, entropy=fixed_entropy(seed)), LAYOUT)
    decode(LAYOUT, total, survivors=2)
    if value:
        set_word(total, dtype, index, value - 1)
        decode(LAYOUT, total, survivors=2)
    set_word(total, dtype, index, value)
    with pytest.raises(RoundAbandoned, match=match) as caught:
        decode(LAYOUT, total, survivors=2)
    assert caught.value.reason == "impossible_sum"
    with pytest.raises(RoundAbandoned, match="bytes"):
        decode(LAYOUT, total[:-8], survivors=2)


@pytest.mark.parametrize(
    ("aggregation", "match"),
    [
        (Aggregation(name="u", tensors=("float32",), encoding=Quantised(half_range=1, bits=28)), "fewer bits"),
        (Aggregation(name="u", tensors=("float32",), encoding=Counted(maximum=2**28)), "uint64"),
        (Aggregation(name="u", tensors=("float32",), encoding=Counted(maximum=2), weighted=True), "weighted"),
        (Aggregation(name="u", tensors=("float32",), encoding=Counted(maximum=2), clip_norm=1.0), "clip_norm"),
    ],
)
def test_a_plan_whose_sum_does_not_fit_is_refused_with_what_to_change(aggregation: Aggregation, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        layout_of(plan_of(aggregation), maximum_clients=CLIENTS)
    assert "'u'" in str(caught.value)


def test_lanes_have_room_exactly_up_to_their_width() -> None:
    plan = plan_of(Aggregation(name="u", tensors=("float32",), encoding=Counted(maximum=2**28)))
    layout_of(plan, maximum_clients=15)
    with pytest.raises(ConfigError):
        layout_of(plan, maximum_clients=16)
    with pytest.raises(ConfigError, match="64-bit lane"):
        layout_of(plan_of(quantised(lane="uint64")), maximum_clients=2**50)
    with pytest.raises(ConfigError, match="weight_cap"):
        layout_of(plan_of(quantised(), weight_cap=2**60), maximum_clients=16)


def test_addition_wraps_around_word_by_word(fleet: Any) -> None:
    total = bytearray(np.array([2**32 - 1, 5], "<u4").tobytes() + np.array([2**64 - 1, 2**32 - 1], "<u8").tobytes())
    vector = np.array([2, 1], "<u4").tobytes() + np.array([3, 1], "<u8").tobytes()
    add_into(total, vector, fleet.parameters(vector_bytes=24, wide_bytes=16))
    assert np.frombuffer(total, "<u4", count=2).tolist() == [1, 6]
    assert np.frombuffer(total, "<u8", offset=8).tolist() == [2, 2**32]


def test_parameters_must_describe_the_plans_vector(fleet: Any) -> None:
    fitting = {"vector_bytes": LAYOUT.vector_bytes, "wide_bytes": LAYOUT.wide_bytes, "maximum_clients": CLIENTS}
    LAYOUT.require(fleet.parameters(**fitting))
    for wrong in ({"vector_bytes": 56}, {"wide_bytes": 48}, {"maximum_clients": CLIENTS + 1}):
        with pytest.raises(PolicyRefusal, match="lanes"):
            LAYOUT.require(fleet.parameters(**(fitting | wrong)))
