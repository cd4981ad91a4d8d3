"""Client programs of computations: their self-test, their ports, and what devices could not compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import sottovoce as sv
from sottovoce.bundle import Bundle, decode_bundle, encode_bundle
from sottovoce.errors import ConfigError, DefinitionError, SelfTestFailed
from sottovoce.language.lowering import lower
from sottovoce.runtime import open_program, run_self_test
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array


def bundle_of(function: Any, *types: str) -> Bundle:
    return decode_bundle(lower(sv.federated_computation(*types)(function)).bundle)


over = sv.tf_computation("float32", "float32")(lambda x, t: tf.where(x > t, x, t))


def _sum_over(x: Any, t: Any) -> Any:
    return sv.federated_sum(sv.federated_map(over, (x, sv.federated_broadcast(t))), bound=(-9, 9))


@pytest.fixture(scope="module")
def newest() -> Bundle:
    return bundle_of(_sum_over, "{float32}@CLIENTS", "float32@SERVER")


def test_every_scalar_travels_as_shape_1(newest: Bundle) -> None:
    ports = (newest.broadcast, newest.state, newest.batch, newest.result_ports)
    assert [[(port.name, port.type) for port in group] for group in ports] == [
        [("broadcast_0_0", "float32[1]")],
        [("kept_0_0", "float32[1]")],
        [("x", "float32[?]")],
        [("sum_0", "float32[1]")],
    ]


def test_the_newest_row_of_a_batch_counts(newest: Bundle) -> None:
    program = open_program(newest)
    broadcast: dict[str, Array] = {"broadcast_0_0": np.array([2], np.float32)}
    state = program.begin(broadcast)
    for rows, expected in (([1.0], 2.0), ([5.0, 3.0], 3.0)):
        state, metrics = program.step(state, {"x": np.array(rows, np.float32)})
        assert metrics == {}
        assert program.finish(state, broadcast)["sum_0"].tolist() == [expected]


def test_the_self_test_notices_another_program(newest: Bundle) -> None:
    run_self_test(newest, open_program(newest))
    other = bundle_of(
        lambda x, t: sv.federated_sum(sv.federated_map(lambda a, b: b, (x, sv.federated_broadcast(t))), bound=(-9, 9)),
        "{float32}@CLIENTS",
        "float32@SERVER",
    )
    with pytest.raises(SelfTestFailed):
        run_self_test(newest, open_program(other))


def test_two_computations_over_the_same_types_share_begin_and_step(newest: Bundle) -> None:
    other = bundle_of(lambda x, t: sv.federated_sum(x, bound=(0, 1)), "{float32}@CLIENTS", "float32@SERVER")
    assert other.flatbuffers["step"] == newest.flatbuffers["step"]
    assert other.flatbuffers["finish"] != newest.flatbuffers["finish"]


def test_the_self_test_of_a_collection_has_batches_of_several_lengths() -> None:
    bundle = bundle_of(lambda x: sv.federated_sum(sv.sequence_sum(x), bound=(0, 9)), "{float32*}@CLIENTS")
    assert [len(decode_tensors(batch)["x"]) for batch in bundle.self_test.batches] == [3, 1, 4]
    assert encode_bundle(bundle)


def test_the_self_test_finds_numbers_for_which_the_results_are_finite() -> None:
    narrow = sv.tf_computation("float32")(lambda x: tf.sqrt(x - 1) + tf.math.log(x))
    bundle = bundle_of(lambda x: sv.federated_sum(sv.federated_map(narrow, x), bound=(0, 9)), "{float32}@CLIENTS")
    (batch,) = bundle.self_test.batches
    assert 1 <= decode_tensors(batch)["x"].item() <= 2


def test_a_program_without_finite_results_is_refused() -> None:
    never = sv.tf_computation("float32")(lambda x: tf.sqrt(-1 - x * x))
    with pytest.raises(DefinitionError, match=r"its results are not finite numbers .*; guard divisions, logarithms"):
        bundle_of(lambda x: sv.federated_sum(sv.federated_map(never, x), bound=(0, 9)), "{float32}@CLIENTS")


def test_client_state_has_ports_of_its_own() -> None:
    slot = sv.client_state("seen", "<a=float32,b=int32[2]>", version=3)

    def remember(x: Any) -> Any:
        slot.write(sv.federated_zip({"a": x, "b": slot.read().b}))
        return sv.federated_sum(x, bound=(0, 1))

    bundle = bundle_of(remember, "{float32}@CLIENTS")
    kept = bundle.client_state
    assert kept is not None
    assert (kept.slot, kept.version) == ("seen", 3)
    assert [(port.name, port.type) for port in kept.ports] == [
        ("client_state_0_0", "float32[1]"),
        ("client_state_0_1", "int32[2]"),
    ]
    zeros = {"client_state_0_0": np.zeros(1, np.float32), "client_state_0_1": np.zeros(2, np.int32)}
    assert kept.initial == encode_tensors(zeros)


# --- what is no number ------------------------------------------------------------------------------------------------

shares = sv.tf_computation("float32")(lambda x: 1 / x)
added = sv.tf_computation("int32", "int32")(lambda total, x: total + x)


@sv.federated_computation("float32")
def whole_share(x: Any) -> Any:
    return sv.cast("int32")(shares(x))


@sv.federated_computation("int32", "float32")
def count_up(total: Any, x: Any) -> Any:
    return added(total, whole_share(x))


NEWEST: dict[str, Any] = {
    "symmetric": lambda x: sv.federated_sum(sv.federated_map(shares, x), bound=(-9, 9)),
    "one-sided": lambda x: sv.federated_sum(sv.federated_map(shares, x), bound=(0, 9)),
    "weight": lambda x: sv.federated_mean(
        sv.federated_map(sv.clip(0, 1), x), sv.federated_map(shares, x), bound=(0, 1), weight_cap=5
    ),
    "cast": lambda x: sv.federated_sum(sv.federated_map(whole_share, x), bound=(0, 9)),
    "cast to bool": lambda x: sv.federated_sum(
        sv.federated_map(sv.cast("int32"), sv.federated_map(sv.cast("bool"), sv.federated_map(shares, x)))
    ),
}
COLLECTED: dict[str, Any] = {
    "mapped": lambda x: sv.federated_sum(sv.sequence_sum(sv.sequence_map(whole_share, x)), bound=(0, 9)),
    "reduced": lambda x: sv.federated_sum(sv.sequence_reduce(x, 0, count_up), bound=(0, 9)),
}


def finds_no_number(bundle: Bundle, batches: list[list[float]]) -> bool:
    """Say whether a device takes no part: a metric or a result is not finite (`edge_agent.work`)."""
    program = open_program(bundle)
    state, found = program.begin({}), []
    for rows in batches:
        state, metrics = program.step(state, {"x": np.array(rows, np.float32)})
        found += metrics.values()
    found += program.finish(state, {}).values()
    return not all(np.isfinite(value).all() for value in found)


@pytest.mark.parametrize("kind", NEWEST)
def test_nan_and_infinity_are_not_summed_under_any_bound(kind: str) -> None:
    bundle = bundle_of(NEWEST[kind], "{float32}@CLIENTS")
    meant = sv.federated_computation("{float32}@CLIENTS")(NEWEST[kind])
    for example, wrong in ((4.0, False), (1e-30, False), (0.0, True), (-0.0, True), (np.nan, True)):
        assert finds_no_number(bundle, [[example]]) is wrong, example
        if wrong:
            with pytest.raises(ConfigError, match=r"takes no part|weights are finite"):
                meant([4.0, example])
        else:
            meant([4.0, example])


@pytest.mark.parametrize("kind", COLLECTED)
def test_a_cast_of_what_is_no_number_is_noticed_in_every_batch(kind: str) -> None:
    bundle = bundle_of(COLLECTED[kind], "{float32*}@CLIENTS")
    meant = sv.federated_computation("{float32*}@CLIENTS")(COLLECTED[kind])
    assert not finds_no_number(bundle, [[0.5, 4.0], [1.0, 1e-30]])
    assert finds_no_number(bundle, [[1.0, 0.0], [1.0]])
    assert finds_no_number(bundle, [[1.0], [2.0, 2.0], [np.nan]])
    with pytest.raises(ConfigError, match=r"takes no part; guard what makes it, as by tf.math.divide_no_nan"):
        meant([[1.0, 0.0], [1.0]])


def test_without_such_casts_a_program_has_no_further_output(newest: Bundle) -> None:
    assert [result.name for result in newest.results] == ["sum"]
    whole = bundle_of(COLLECTED["reduced"], "{float32*}@CLIENTS")
    assert [port.name for port in whole.metrics] == ["casts_in_step"]
    assert [result.name for result in whole.results] == ["sum"]
