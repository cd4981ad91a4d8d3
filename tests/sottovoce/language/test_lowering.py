"""A lowered computation gives on devices what it gives in process, within the error that its plan declares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import sottovoce as sv
from sottovoce.bundle import decode_bundle
from sottovoce.errors import ConfigError, DefinitionError
from sottovoce.language.builtins import identity
from sottovoce.language.computations import Computation
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.language.lowering import lower
from sottovoce.language.ports import Bound
from sottovoce.plan import Counted, LocalWork, Quantised
from sottovoce.types import Type
from sottovoce.values import flatten


@sv.tf_computation("float32", "float32")
def exceeds(reading, threshold):
    return reading > threshold


@sv.tf_computation("float32")
def square(x):
    return x * x


@sv.tf_computation("float32", "float32")
def decayed(total, x):
    return total * 0.5 + x


@sv.tf_computation("float32", "float32")
def minus(a, b):
    return a - b


@sv.tf_computation("float32[4]", "int32")
def row(table, key):
    return tf.gather(table, key)


@sv.tf_computation("int32", "int32")
def plus(a, b):
    return a + b


@sv.federated_computation("{float32}@CLIENTS", "float32@SERVER")
def fraction_over(readings, threshold):
    """Which part of the devices reads more than the threshold."""
    above = sv.federated_map(exceeds, (readings, sv.federated_broadcast(threshold)))
    return sv.federated_mean(sv.federated_map(sv.cast("float32"), above))


def agree(executor: FleetExecutor, computation: Computation, *arguments: Any) -> Any:
    """Run in both executors, hold the results against each other within the declared error, and return the fleet's."""
    expected = computation(*arguments)
    with sv.use(executor):
        found = computation(*arguments)
    kind: Type = computation.type_signature.result
    named = dict(zip((name for name, _ in computation.body.parameters), arguments, strict=True))
    lowered = executor.lowered(computation, named)
    devices = max([len(value) for value in arguments if isinstance(value, list)], default=0)
    errors = lowered.errors(devices)
    for wanted, got, error in zip(flatten(kind, expected), flatten(kind, found), errors, strict=True):
        assert got.dtype == wanted.dtype
        assert np.shape(got) == np.shape(wanted)
        assert error is not None, "this test's results are all bounded"
        np.testing.assert_allclose(got, wanted, rtol=0, atol=error)
    return found


def test_the_talks_example(fleet: FleetExecutor) -> None:
    assert agree(fleet, fraction_over, [68.5, 70.3, 69.8], 70.0) == pytest.approx(1 / 3)
    assert agree(fleet, fraction_over, [68.5, 70.3, 69.8], 69.0) == pytest.approx(2 / 3)


CASES: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[Any, ...]]] = {
    "sum of floats": (lambda x: sv.federated_sum(x, bound=(15, 45)), ("{float32}@CLIENTS",), ([20.5, 21.25, 30.0],)),
    "sum of integers that may be negative": (
        lambda x: sv.federated_sum(x, bound=(-5, 20)), ("{int32}@CLIENTS",), ([3, -4, 7, 19],),
    ),
    "values outside of a bound are clamped": (
        lambda x: sv.federated_sum(x, bound=(-5, 20)), ("{int32}@CLIENTS",), ([3, -400, 2**31 - 1, -(2**31)],),
    ),
    "sum of int64": (
        lambda x: sv.federated_sum(x, bound=(-(10**12), 10**12)), ("{int64}@CLIENTS",), ([3, -4, 10**11, 19],),
    ),
    "count of truths": (
        lambda x: sv.federated_sum(sv.federated_map(sv.cast("int32"), x)), ("{bool}@CLIENTS",), ([True, False, True],),
    ),
    "uint8 is bounded by itself": (
        lambda x: sv.federated_sum(sv.federated_map(sv.cast("int64"), x)), ("{uint8}@CLIENTS",), ([255, 255, 7],),
    ),
    "mean of a vector": (
        lambda x: sv.federated_mean(x, bound=(-1, 1)), ("{float32[3]}@CLIENTS",),
        ([np.ones(3), np.zeros(3), np.full(3, -0.5)],),
    ),
    "a struct of both, and its part": (
        lambda x: {"s": sv.federated_sum(x, bound=(0, 10)), "m": sv.federated_mean(x.a, bound=(0, 10))},
        ("{<a=float32,b=int32[2]>}@CLIENTS",), ([(1.0, [1, 2]), (2.5, [3, 4]), (2.0, [0, 0])],),
    ),
    "a mean weighted by whole numbers, one above its cap": (
        lambda x, w: sv.federated_mean(x, weight=sv.federated_map(sv.clip(1, 500), w), bound=(0, 10), weight_cap=100),
        ("{float32}@CLIENTS", "{int32}@CLIENTS"), ([1.0, 2.0, 3.0], [1, 10, 200]),
    ),
    "a mean weighted by fractions": (
        lambda x, w: sv.federated_mean(x, weight=sv.federated_map(sv.clip(0.5, 2), w), bound=(0, 10)),
        ("{float32}@CLIENTS", "{float32}@CLIENTS"), ([1.0, 2.0, 3.0], [0.5, 1.25, 2.0]),
    ),
    "secure sum": (lambda x: sv.federated_secure_sum(x, 100), ("{int32}@CLIENTS",), ([3, 4, 700],)),
    "a constant at every client counts them": (
        lambda x: (sv.federated_sum(sv.federated_value(1, sv.CLIENTS)), sv.federated_sum(x, bound=(0, 9))),
        ("{int32}@CLIENTS",), ([3, 4, 7],),
    ),
    "a value that every client evaluates": (
        lambda x: sv.federated_sum(
            sv.federated_map(minus, (x, sv.federated_eval(sv.tf_computation(lambda: tf.constant(2.0)), sv.CLIENTS))),
            bound=(-9, 9),
        ),
        ("{float32}@CLIENTS",), ([1.0, 2.5, 3.0],),
    ),
    "a parameter that is the same for all clients": (
        lambda x, t: sv.federated_sum(sv.federated_map(minus, (x, t)), bound=(-9, 9)),
        ("{float32}@CLIENTS", "float32@CLIENTS"), ([1.0, 2.5, 3.0], 0.5),
    ),
    "sum of squares of a sequence": (
        lambda x: sv.federated_sum(
            sv.federated_map(lambda s: sv.sequence_sum(sv.sequence_map(square, s)), x), bound=(0, 1000)
        ),
        ("{float32*}@CLIENTS",), ([[1.0, 2.0], [3.0], [0.25] * 700],),
    ),
    "a reduction in order, over more than one batch": (
        lambda x: sv.federated_sum(
            sv.federated_map(lambda s: sv.sequence_reduce(s, 1.0, decayed), x), bound=(0, 1000)
        ),
        ("{float32*}@CLIENTS",), ([[1.0, 2.0], [3.0], list(np.arange(600.0))],),
    ),
    "a reduction that starts from a broadcast value": (
        lambda x, z: sv.federated_sum(
            sv.federated_map(lambda s, first: sv.sequence_reduce(s, first, decayed), (x, sv.federated_broadcast(z))),
            bound=(0, 1000),
        ),
        ("{float32*}@CLIENTS", "float32@SERVER"), ([[1.0, 2.0], [3.0], [4.0]], 8.0),
    ),
    "a placed sequence of structs": (
        lambda x: sv.federated_sum(sv.sequence_sum(x), bound=(0, 1000)),
        ("{<a=float32,b=int32>*}@CLIENTS",), ([[(1.0, 2)], [(2.0, 3), (4.0, 5)], [(1.0, 1)]],),
    ),
    "two reductions of two sequences of one collection": (
        lambda x, y: (sv.federated_sum(sv.sequence_sum(x), bound=(0, 99)),
                      sv.federated_sum(sv.sequence_sum(y), bound=(0, 99))),
        ("{float32*}@CLIENTS", "{int32*}@CLIENTS"), ([[1.0, 2.0], [3.0], [4.0]], [[1, 2], [3], [4]]),
    ),
    "slices that the clients choose": (
        lambda k, t: sv.federated_sum(sv.sequence_sum(sv.federated_select(k, 3, t, row)), bound=(0, 100)),
        ("{int32[2]}@CLIENTS", "float32[4]@SERVER"), ([[0, 1], [2, 3], [3, 3]], [1.0, 2.0, 3.0, 4.0]),
    ),
    "a clip is a bound": (
        lambda x: sv.federated_sum(sv.federated_map(sv.clip(-1, 2), x)), ("{float32}@CLIENTS",), ([1.0, 2.5, 3.0],),
    ),
    "more numbers than fit fine steps": (
        lambda x: sv.federated_mean(x, bound=(19, 21)), ("{float32[2000]}@CLIENTS",),
        ([np.linspace(19, 21, 2000), np.full(2000, 20.0), np.full(2000, 20.5)],),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_executors_agree_within_the_declared_error(fleet: FleetExecutor, name: str) -> None:
    function, types, arguments = CASES[name]
    agree(fleet, sv.federated_computation(*types)(function), *arguments)


# --- What the plan says


def test_a_single_value_is_the_newest_example_and_a_sequence_all_of_them() -> None:
    latest = lower(fraction_over)
    assert latest.work == LocalWork(epochs=1, batch_size=1, max_examples=1, order="stored")
    assert latest.columns == (("readings", sv.type_of("float32")),)
    assert [port.type for port in decode_bundle(latest.bundle).batch] == ["float32[?]"]
    total = sv.federated_computation("{<a=float32,b=int32[2]>*}@CLIENTS")(
        lambda x: sv.federated_sum(sv.sequence_sum(x), bound=(0, 1))
    )
    lowered = lower(total)
    assert lowered.work == LocalWork(epochs=1, batch_size=256, max_examples=0, order="stored")
    assert [(name, str(kind)) for name, kind in lowered.columns] == [("a", "float32"), ("b", "int32[2]")]


def test_whole_numbers_are_counted_from_the_low_end_of_their_bound() -> None:
    lowered = lower(sv.federated_computation("{int32}@CLIENTS")(lambda x: sv.federated_sum(x, bound=(-5, 20))))
    (aggregation,) = lowered.aggregations
    assert (aggregation.encoding, aggregation.lane, aggregation.tensors) == (
        Counted(maximum=25),
        "uint32",
        ("int32[1]",),
    )
    assert lowered.errors(1000) == (0.0,)


def test_a_wide_bound_of_whole_numbers_takes_the_wide_lane() -> None:
    lowered = lower(sv.federated_computation("{int32}@CLIENTS")(lambda x: sv.federated_sum(x, bound=(0, 10**6))))
    assert lowered.aggregations[0].lane == "uint64"


@pytest.mark.parametrize(("size", "bits", "lane", "offset"), [(1024, 32, "uint64", 0.0), (1025, 16, "uint32", 20.0)])
def test_a_few_floats_take_fine_steps_and_many_take_16_bits_around_the_middle(
    size: int, bits: int, lane: str, offset: float
) -> None:
    lowered = lower(
        sv.federated_computation(f"{{float32[{size}]}}@CLIENTS")(lambda x: sv.federated_sum(x, bound=(19, 21)))
    )
    (aggregation,) = lowered.aggregations
    half_range = 21.0 if offset == 0 else 1.0
    assert aggregation.encoding == Quantised(half_range=half_range, bits=bits)
    assert aggregation.lane == lane
    (summand,) = lowered.recipes[0].summands
    assert summand.offset == offset
    quantum = 2 * half_range / (2**bits - 1)
    (error,) = lowered.errors(10)
    assert error is not None
    assert 10 * quantum < error <= 10 * (quantum + 21 * 2**-21) * 1.001


def test_the_authors_terms_decide_bits_and_lane() -> None:
    lowered = lower(
        sv.federated_computation("{float32}@CLIENTS")(
            lambda x: sv.federated_sum(x, bound=(0, 1), bits=8, lane="uint16")
        )
    )
    assert (lowered.aggregations[0].encoding, lowered.aggregations[0].lane) == (
        Quantised(half_range=0.5, bits=8),
        "uint16",
    )


def test_the_bound_of_a_collection_is_that_of_its_argument(fleet: FleetExecutor) -> None:
    mean = sv.federated_computation("{float32}@CLIENTS")(lambda x: sv.federated_mean(x))
    lowered = lower(mean, {"x": sv.latest("temperature", low=-20, high=60)})
    assert lowered.recipes[0].summands[0].bound == Bound(-20, 60)
    again = fleet.lowered(mean, {"x": sv.latest("temperature", low=-20, high=60)})
    assert fleet.lowered(mean, {"x": sv.latest("elsewhere", low=-20, high=60)}) is again
    assert fleet.lowered(mean, {"x": sv.latest("temperature", low=-20, high=61)}) is not again


def test_all_sums_of_a_computation_are_one_round(fleet: FleetExecutor, plain_rounds: Any) -> None:
    several = sv.federated_computation("{float32}@CLIENTS")(
        lambda x: tuple(sv.federated_sum(x, bound=(0, high)) for high in (1, 2, 3))
    )
    with sv.use(fleet):
        assert several([1.0, 2.0, 3.0]) == pytest.approx((3.0, 5.0, 6.0))
    (request,) = plain_rounds.requests
    assert [aggregation.name for aggregation in request.aggregations] == ["sum", "sum2", "sum3"]


def test_a_computation_at_the_server_alone_asks_no_device(fleet: FleetExecutor, plain_rounds: Any) -> None:
    squared = sv.federated_computation("float32@SERVER")(lambda x: sv.federated_map(square, x))
    with sv.use(fleet):
        assert squared(3.0) == 9.0
    assert plain_rounds.requests == []


def test_a_value_at_the_server_is_prepared_before_and_used_after_the_round(fleet: FleetExecutor) -> None:
    @sv.federated_computation("{float32}@CLIENTS", "float32@SERVER")
    def deviation(readings, guess):
        centre = sv.federated_map(square, guess)
        shifted = sv.federated_map(minus, (readings, sv.federated_broadcast(centre)))
        return sv.federated_map(minus, (sv.federated_mean(shifted, bound=(-50, 50)), guess))

    expected = deviation([9.5, 10.0, 12.0], 3.0)
    with sv.use(fleet):
        assert deviation([9.5, 10.0, 12.0], 3.0) == pytest.approx(expected, abs=1e-5)


def test_client_state_is_read_written_and_starts_from_its_initial_value(fleet: FleetExecutor) -> None:
    slot = sv.client_state("visits", "int32", initial=100)

    @sv.federated_computation("{int32}@CLIENTS")
    def visit(more):
        now = sv.federated_map(plus, (slot.read(), more))
        slot.write(now)
        return sv.federated_sum(now, bound=(0, 1000))

    with sv.use(fleet):
        assert visit([1, 2, 3]) == 306
        assert visit([1, 1, 1]) == 309


def test_a_sum_that_its_dtype_cannot_hold_is_refused_as_in_process(fleet: FleetExecutor) -> None:
    total = sv.federated_computation("{int32}@CLIENTS")(lambda x: sv.federated_sum(x, bound=(0, 2**31 - 1)))
    advice = r"a sum does not fit int32 .*; sum a wider type: map sv.cast\('int64'\) over the values first"
    for executor in (fleet, sv.reference_executor()):
        with sv.use(executor), pytest.raises(ConfigError, match=advice):
            total([2**31 - 1, 1, 0])


def test_weights_that_are_all_zero_have_no_mean(fleet: FleetExecutor) -> None:
    mean = sv.federated_computation("{float32}@CLIENTS", "{int32}@CLIENTS")(
        lambda x, w: sv.federated_mean(x, weight=w, bound=(0, 1), weight_cap=10)
    )
    for executor in (fleet, sv.reference_executor()):
        with sv.use(executor), pytest.raises(ConfigError, match="all weights are 0, so there is no mean"):
            mean([1.0, 1.0, 1.0], [0, 0, 0])


# --- What a fleet cannot do: each refusal names the operator and its line, and says what to write instead

REFUSED: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
    "a sum without a bound": (
        lambda x: sv.federated_sum(x), ("{float32}@CLIENTS",),
        r"test_lowering.py:\d+, federated_sum: the value has no bound, and a fleet can only add up what is bounded: "
        r".*sv.federated_sum\(value, bound=\(low, high\)\), or sv.latest\(name, low=..., high=...\) for the "
        r"collection, or map sv.clip\(low, high\) over the value first",
    ),
    "a mean without a bound": (
        lambda x: sv.federated_mean(x), ("{<a=float32>}@CLIENTS",), r"federated_mean: the value at a has no bound",
    ),
    "a minimum": (
        lambda x: sv.federated_min(x), ("{float32}@CLIENTS",),
        r"test_lowering.py:\d+, federated_min: the smallest value is one device's own, and a fleet only tells sums of "
        r"many. Count with sv.federated_sum how many values lie in each of a few buckets",
    ),
    "a maximum": (
        lambda x: sv.federated_max(x), ("{float32}@CLIENTS",), r"federated_max: the largest value is one device's own",
    ),
    "an aggregate": (
        lambda x: sv.federated_aggregate(x, 0, plus, plus, identity), ("{int32}@CLIENTS",),
        r"test_lowering.py:\d+, federated_aggregate: this aggregate is code of its own, and a fleet only adds up",
    ),
    "a sum of what a mean brought": (
        lambda x: sv.federated_sum(
            sv.federated_map(minus, (x, sv.federated_broadcast(sv.federated_mean(x, bound=(0, 1))))), bound=(0, 1)
        ),
        ("{float32}@CLIENTS",),
        r"federated_sum: what is summed here needs the result of test_lowering.py:\d+, federated_mean, and one "
        r"computation is one round. Write a federated program: one computation a round",
    ),
    "single values as a result": (
        lambda x: sv.federated_map(square, x), ("{float32}@CLIENTS",),
        r"the result is \{float32\}@CLIENTS, and single values never leave their devices",
    ),
    "nothing to read": (
        lambda: sv.federated_sum(sv.federated_value(1, sv.CLIENTS)), (),
        r"federated_sum: it reads no values of the devices, .*add a parameter \{T\}@CLIENTS",
    ),
    "the newest example and all of them": (
        lambda x, y: (sv.federated_sum(x, bound=(0, 1)), sv.federated_sum(sv.sequence_sum(y), bound=(0, 1))),
        ("{float32}@CLIENTS", "{float32*}@CLIENTS"), r"a round reads either; declare all parameters as \{T\*\}@CLIENTS",
    ),
    "a sequence in a struct": (
        lambda x: sv.federated_sum(sv.sequence_sum(x.a), bound=(0, 1)), ("{<a=float32*,b=int32>}@CLIENTS",),
        r"has a sequence inside; declare a sequence of structs, <a=T,b=U>\*",
    ),
    "a shape that is not known": (
        lambda x: sv.federated_sum(
            sv.federated_map(sv.tf_computation("float32[?]")(tf.reduce_sum), x), bound=(0, 1)
        ),
        ("{float32[?]}@CLIENTS",), r"x is float32\[\?\]; a fleet needs shapes without \?",
    ),
    "float64": (
        lambda x: sv.federated_sum(x, bound=(0, 1)), ("{float64}@CLIENTS",),
        r"x is float64; devices compute with float32, int32, int64 and bool: declare one of those",
    ),
    "a weight without a bound": (
        lambda x, w: sv.federated_mean(x, weight=w, bound=(0, 1)), ("{float32}@CLIENTS", "{float32}@CLIENTS"),
        r"federated_mean: the weight has no bound; give the largest weight of one device: weight_cap=",
    ),
    "two columns of one name": (
        lambda x, y: sv.federated_sum(x.a, bound=(0, 1)), ("{<a=int32>}@CLIENTS", "{<a=int32>}@CLIENTS"),
        r"two columns would be called 'a'; rename one element or parameter",
    ),
    "a clip norm with a weight of the author's own": (
        lambda x, w: sv.federated_mean(x, weight=w, clip_norm=1.0, weight_cap=3),
        ("{float32}@CLIENTS", "{float32}@CLIENTS"), r"clip_norm= needs the weight of a client program",
    ),
    "an operation that devices do not have": (
        lambda x: sv.federated_sum(
            sv.federated_map(sv.tf_computation("float32[2,2]")(tf.linalg.det), x), bound=(0, 1)
        ),
        ("{float32[2,2]}@CLIENTS",), r"devices have no MatrixDeterminant .*; cast\s*first, or write it with other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_fleet_cannot_do_is_refused_with_a_cure(name: str) -> None:
    function, types, message = REFUSED[name]
    with pytest.raises(DefinitionError, match=message):
        lower(sv.federated_computation(*types)(function))


def test_a_python_function_at_clients_is_refused_when_it_is_defined() -> None:
    @sv.server_computation("float32", result="float32")
    def host(x):
        return x

    with pytest.raises(DefinitionError, match="host is Python code of this process, and no Python travels"):
        sv.federated_computation("{float32}@CLIENTS")(lambda x: sv.federated_sum(sv.federated_map(host, x)))


def test_two_collections_in_one_computation_are_refused(fleet: FleetExecutor) -> None:
    both = sv.federated_computation("{float32}@CLIENTS", "{float32}@CLIENTS")(
        lambda x, y: sv.federated_sum(sv.federated_map(minus, (x, y)), bound=(-1, 1))
    )
    with sv.use(fleet), pytest.raises(ConfigError, match="would read the collections 'indoors' and 'outdoors'; a comp"):
        both(sv.latest("indoors"), sv.latest("outdoors"))
    with sv.use(fleet), pytest.raises(ConfigError, match="y is given as a list and x as values of the devices"):
        both(sv.latest("indoors"), [1.0, 2.0, 3.0])
    with sv.use(fleet), pytest.raises(ConfigError, match="different numbers of devices"):
        both([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_member_without_values_is_refused(fleet: FleetExecutor) -> None:
    total = sv.federated_computation("{float32*}@CLIENTS")(lambda x: sv.federated_sum(sv.sequence_sum(x), bound=(0, 1)))
    with sv.use(fleet), pytest.raises(ConfigError, match=r"device 1 has no values; .* leave it out"):
        total([[1.0], [], [2.0]])
