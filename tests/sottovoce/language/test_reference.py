"""The reference executor says what is meant: plain arithmetic, exact integers, float32 that stays float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sottovoce as sv
from sottovoce.errors import ConfigError

FLOATS = "{float32}@CLIENTS"
INTS = "{int32}@CLIENTS"
floats = st.floats(-1e6, 1e6, width=32)
small = st.integers(-(2**20), 2**20)


def defined(function: Any, *types: Any) -> Any:
    return sv.federated_computation(function, *types)


mean = defined(lambda x: sv.federated_mean(x), FLOATS)
weighted_mean = defined(lambda x, w: sv.federated_mean(x, w), FLOATS, INTS)
total = defined(lambda x: sv.federated_sum(x), INTS)


@given(st.lists(small))
def test_sums_of_integers_are_exact(values: list[int]) -> None:
    found = total(values)
    assert type(found) is np.int32
    assert int(found) == sum(values)


def test_a_sum_that_does_not_fit_is_refused_with_a_cure() -> None:
    with pytest.raises(ConfigError, match=r"a sum does not fit int32 .* map sv\.cast\('int64'\)"):
        total([2**30, 2**30])
    wide = defined(lambda x: sv.federated_sum(sv.federated_map(sv.cast("int64"), x)), INTS)
    assert wide([2**30, 2**30]) == 2**31


def test_sums_of_floats_are_rounded_once_and_may_be_infinite() -> None:
    summed = defined(lambda x: sv.federated_sum(x), FLOATS)
    assert summed([1e8, 1.0, -1e8]) == 1.0
    assert summed([3e38, 3e38]) == np.inf


@given(st.lists(st.integers(-(2**60), 2**60), max_size=6))
def test_sums_of_64_bits_are_exact(values: list[int]) -> None:
    wide = defined(lambda x: sv.federated_sum(x), "{int64}@CLIENTS")
    assert int(wide(values)) == sum(values)


def test_a_sum_of_nothing_is_zero_and_a_mean_of_nothing_is_an_error() -> None:
    assert total([]) == 0
    with pytest.raises(ConfigError, match=r"federated_mean: there are no members, so there is no mean"):
        mean([])


@given(st.lists(floats, min_size=1))
def test_a_mean_is_rounded_once_to_float32(values: list[float]) -> None:
    found = mean(values)
    assert type(found) is np.float32
    assert found == np.float32(np.sum(np.array(values, np.float64)) / len(values))


@given(st.lists(st.tuples(floats, st.integers(0, 1000)), min_size=1))
def test_a_weighted_mean(pairs: list[tuple[float, int]]) -> None:
    values, weights = zip(*pairs, strict=True)
    if not any(weights):
        with pytest.raises(ConfigError, match="all weights are 0, so there is no mean"):
            weighted_mean(values, weights)
        return
    expected = sum(v * w for v, w in pairs) / sum(weights)
    assert weighted_mean(values, weights) == pytest.approx(expected, rel=1e-5, abs=1e-2)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_none_is_named(weight: float) -> None:
    mean = sv.federated_computation("{float32}@CLIENTS", "{float32}@CLIENTS")(sv.federated_mean)
    with pytest.raises(ConfigError, match=f"a weight is {weight:g}; weights are finite and not negative"):
        mean([1.0, 2.0], [weight, 1.0])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint32"])
def test_a_cast_to_whole_numbers_ends_where_they_end(dtype: str) -> None:
    limits = np.iinfo(dtype)
    cast = sv.federated_computation(lambda x: sv.federated_map(sv.cast(dtype), x), "{float32}@CLIENTS")
    assert cast([1e30, -1e30, 3.9, -0.9]) == (limits.max, limits.min, 3, 0)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_not_cast_to_one(dtype: str, wrong: float) -> None:
    cast = sv.federated_computation(lambda x: sv.federated_map(sv.cast(dtype), x), "{float32[2]}@CLIENTS")
    with pytest.raises(ConfigError, match=rf"cast: NaN and infinity are no {dtype}, and a device that meets one takes"):
        cast([[1.0, 2.0], [1.0, wrong]])


@pytest.mark.parametrize("bound", [None, (-9, 9), (0, 9)])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("summed", [sv.federated_sum, sv.federated_mean])
def test_what_is_no_number_is_not_summed(summed: Any, wrong: float, bound: tuple[float, float] | None) -> None:
    ask = sv.federated_computation(lambda x: summed(x, bound=bound), "{<a=float32,b=float32[2]>}@CLIENTS")
    with pytest.raises(
        ConfigError, match=rf"{summed.__name__}: the value of member 1 holds NaN or infinity, and a dev"
    ):
        ask([{"a": 1, "b": [1.0, 2.0]}, {"a": 1, "b": [wrong, 2.0]}])


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a weight is -1; weights are finite and not negative"):
        weighted_mean([1.0, 2.0], [1, -1])


def test_arguments_need_one_number_of_members() -> None:
    with pytest.raises(ConfigError, match=r"x has 2, w has 3"):
        weighted_mean([1.0, 2.0], [1, 2, 3])


def test_without_an_argument_at_clients_somebody_must_say_how_many_there_are() -> None:
    ones = defined(lambda: sv.federated_sum(sv.federated_value(1, sv.CLIENTS)))
    with pytest.raises(ConfigError, match=r"federated_sum: nothing says how many members there are"):
        ones()
    with sv.use(sv.reference_executor(members=7)):
        assert ones() == 7
    with pytest.raises(ConfigError, match="not -1"):
        sv.reference_executor(members=-1)


def test_values_on_devices_need_devices() -> None:
    with pytest.raises(ConfigError) as refused:
        mean(sv.latest("temperature"))
    assert str(refused.value) == (
        "argument x of lambda: sv.latest('temperature') lives on devices, and the reference executor has none. Give a "
        "list with one value a device ({float32}@CLIENTS), or run it on a fleet: `with simulation.fleet(devices=20):` "
        "or `with coordinator.connect(...):`"
    )


@given(st.lists(floats, min_size=1))
def test_declared_bounds_clamp_as_devices_do(values: list[float]) -> None:
    bounded = defined(lambda x: (sv.federated_sum(x, bound=(0, 40)), sv.federated_mean(x, bound=(0, 40))), FLOATS)
    summed, averaged = bounded(values)
    expected = np.clip(np.array(values, np.float64), 0, 40)
    assert summed == pytest.approx(expected.sum(), rel=1e-6)
    assert averaged == pytest.approx(expected.mean(), rel=1e-6)


def test_a_secure_sum_clamps_at_its_largest_input() -> None:
    secure = defined(lambda x: sv.federated_secure_sum(x, 100), INTS)
    assert secure([1, 99, 1000, -5]) == 200


def test_the_terms_of_a_mean_are_applied_in_the_order_of_a_fleet() -> None:
    terms = defined(
        lambda x, w: sv.federated_mean(x, w, clip_norm=5.0, half_range=2.0, weight_cap=10), "{float32[2]}@CLIENTS", INTS
    )
    found = terms([[30.0, 40.0], [1.0, -1.0]], [1000, 5])
    # (30, 40) has norm 50, clipped to (3, 4), clamped to (2, 2); (1, -1) has half the weight.
    assert found == pytest.approx(np.array([2 + 0.5, 2 - 0.5]) / 1.5)


@given(st.lists(st.tuples(floats, small), min_size=1))
def test_structs_are_aggregated_leaf_by_leaf(rows: list[tuple[float, int]]) -> None:
    extremes = defined(
        lambda x: {"low": sv.federated_min(x), "high": sv.federated_max(x), "sum": sv.federated_sum(x).b},
        "{<a=float32,b=int32>}@CLIENTS",
    )
    found = extremes(rows)
    assert dict(found.low) == {"a": min(r[0] for r in rows), "b": min(r[1] for r in rows)}
    assert dict(found.high) == {"a": max(r[0] for r in rows), "b": max(r[1] for r in rows)}
    assert found.sum == sum(r[1] for r in rows)


def test_an_extreme_of_nothing_is_an_error() -> None:
    smallest = defined(lambda x: sv.federated_min(x), INTS)
    with pytest.raises(ConfigError, match=r"federated_min: there are no members"):
        smallest([])


def test_broadcast_zip_and_eval() -> None:
    @sv.federated_computation(FLOATS, "int32@SERVER")
    def together(x: Any, n: Any) -> Any:
        shared = sv.federated_broadcast(n)
        ones = sv.federated_eval(lambda: 1, sv.CLIENTS)
        at_server = sv.federated_eval(lambda: {"one": 1}, sv.SERVER)
        return sv.federated_zip({"x": x, "rest": (shared, ones)}), sv.federated_zip((n, at_server)), shared

    assert str(together.type_signature.result) == (
        "<{<x=float32,rest=<int32,int32>>}@CLIENTS,<int32,<one=int32>>@SERVER,int32@CLIENTS>"
    )
    clients, server, shared = together([0.5, 1.5], 3)
    assert [dict(member) for member in clients] == [{"x": 0.5, "rest": (3, 1)}, {"x": 1.5, "rest": (3, 1)}]
    assert (server[0], dict(server[1]), shared) == (3, {"one": 1}, 3)


def test_a_value_for_all_clients_stays_one_value() -> None:
    same = defined(lambda n: sv.federated_map(sv.cast("float32"), sv.federated_broadcast(n)), "int32@SERVER")
    assert str(same.type_signature.result) == "float32@CLIENTS"
    assert same(3) == 3.0


add = sv.server_computation("int32", "int32", result="int32")(lambda a, b: a + b)
count_true = sv.server_computation("int32", "bool", result="int32")(lambda a, b: a + int(b))


@given(st.lists(st.booleans()))
def test_federated_aggregate_accumulates_merges_and_reports(values: list[bool]) -> None:
    halve = sv.server_computation("int32", result="float32")(lambda a: a / 2)
    halved = defined(lambda x: sv.federated_aggregate(x, 0, count_true, add, halve), "{bool}@CLIENTS")
    assert str(halved.type_signature) == "({bool}@CLIENTS -> float32@SERVER)"
    assert halved(values) == sum(values) / 2


def test_federated_aggregate_needs_accumulators_of_one_type() -> None:
    to_float = sv.server_computation("int32", "int32", result="float32")(lambda a, b: a)
    with pytest.raises(ConfigError, match=r"the result of merge \(lambda\)"):
        defined(lambda x: sv.federated_aggregate(x, 0, add, to_float, lambda whole: whole), INTS)


def test_federated_select_slices_what_each_client_asks_for() -> None:
    row = sv.federated_computation(lambda table, key: (table, key), "float32[3]", "int32")
    chosen = defined(
        lambda keys, table: sv.federated_select(keys, 2, table, row), "{int32[2]}@CLIENTS", "float32[3]@SERVER"
    )
    assert str(chosen.type_signature.result) == "{<float32[3],int32>*}@CLIENTS"
    found = chosen([[0, 2], [1, 1]], [1.0, 2.0, 3.0])
    assert [[int(key) for _, key in member] for member in found] == [[0, 2], [1, 1]]
    with pytest.raises(ConfigError, match=r"federated_select: the key 3 is not one of 0 to 2"):
        chosen([[0, 3]], [1.0, 2.0, 3.0])


def test_sequences_of_each_client() -> None:
    @sv.federated_computation("{float32*}@CLIENTS")
    def readings(x: Any) -> Any:
        counts = sv.sequence_sum(sv.sequence_map(lambda v: 1, x))
        pairs = sv.sequence_reduce(x, (0.0, 0.0), lambda accumulator, element: (element, accumulator[0]))
        return sv.federated_sum(counts), sv.federated_sum(sv.sequence_sum(x)), pairs

    counts, sums, last_two = readings([[1.0, 2.0, 3.0], np.array([4.0, 5.0], np.float32), []])
    assert (counts, sums) == (5, 15.0)
    assert last_two == ((3.0, 2.0), (5.0, 4.0), (0.0, 0.0))


def test_sequences_without_a_placement_and_at_the_server() -> None:
    local = defined(lambda x: sv.sequence_sum(x), "<a=int32,b=float32[2]>*")
    found = local({"a": [1, 2], "b": [[1, 2], [3, 4]]})
    assert (found.a, found.b.tolist()) == (3, [4.0, 6.0])
    server = defined(lambda x: sv.sequence_sum(x), "int32*@SERVER")
    assert server([1, 2, 3]) == 6


@given(st.lists(st.floats(-1e9, 1e9, width=32)))
def test_casts_and_clips(values: list[float]) -> None:
    clipped = defined(lambda x: sv.federated_map(sv.cast("int32"), sv.federated_map(sv.clip(-5, 5), x)), FLOATS)
    assert clipped(values) == tuple(int(max(-5.0, min(5.0, v))) for v in values)


def test_builtins_inside_a_mapped_function() -> None:
    both = defined(lambda x: sv.federated_map(lambda v: sv.clip(0, 1)(sv.cast("int64")(v.a)), x), "{<a=int32>}@CLIENTS")
    assert str(both.type_signature.result) == "{int64}@CLIENTS"
    assert both([{"a": -3}, {"a": 1}, {"a": 9}]) == (0, 1, 1)


def test_client_state_is_kept_by_each_member_in_each_executor() -> None:
    slot = sv.client_state("visits", "int32", initial=10)
    increment = sv.federated_computation(lambda n: n, "int32")

    @sv.federated_computation(INTS)
    def visit(x: Any) -> Any:
        before = slot.read()
        slot.write(sv.federated_map(increment, x))
        return before

    with sv.use(sv.reference_executor()):
        assert visit([1, 2, 3]) == (10, 10, 10)
        assert visit([4, 5]) == (1, 2)
        assert visit([0, 0, 0]) == (4, 5, 3)
    with sv.use(sv.reference_executor()):
        assert visit([1]) == (10,)


def test_a_dict_of_values_is_written_to_a_slot_as_one_struct() -> None:
    slot = sv.client_state("two-values", {"total": "float32", "count": "int32"})

    @sv.federated_computation("{float32}@CLIENTS", "{int32}@CLIENTS")
    def keep(total, count):
        kept = slot.read()
        slot.write({"total": total, "count": count})
        return sv.federated_sum(kept.total), sv.federated_sum(kept.count)

    with sv.use(sv.reference_executor()):
        assert keep([1.0, 2.0], [3, 4]) == (0, 0)
        assert keep([0.0, 0.0], [0, 0]) == (3.0, 7)


def test_client_state_of_a_run_that_fails_is_not_kept() -> None:
    slot = sv.client_state("kept", "int32")

    @sv.federated_computation(INTS)
    def failing(x: Any) -> Any:
        slot.write(x)
        return slot.read(), sv.federated_sum(x)

    with sv.use(sv.reference_executor()):
        with pytest.raises(ConfigError, match="does not fit int32"):
            failing([2**30, 2**30])
        assert failing([1, 2]) == ((0, 0), 3)


def test_client_state_is_checked_when_it_is_defined() -> None:
    slot = sv.client_state("state", "<a=float32[2],b=int32>", initial={"a": [1, 2], "b": 3})
    with pytest.raises(ConfigError, match=r"the new value of 'state'"):
        defined(lambda x: slot.write(x) or x, FLOATS)
    with pytest.raises(ConfigError, match=r"'state' is written at .* already; write it once a round"):
        defined(lambda: (slot.write(slot.read()), slot.write(slot.read())) and slot.read())
    with pytest.raises(ConfigError, match="is not at CLIENTS"):
        defined(lambda x: slot.write(x) or x, "<a=float32[2],b=int32>@SERVER")
    for arguments in ({"name": "a b"}, {"version": 0}, {"type": "float32[?]"}, {"maximum_bytes": 3}):
        with pytest.raises(ConfigError, match=r"client state '"):
            sv.client_state(**{"name": "x", "type": "float32", **arguments})
