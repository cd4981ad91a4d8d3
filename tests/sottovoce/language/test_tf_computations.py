"""Functions written in TensorFlow, in the language: the example of the guide, word for word, and composition."""

from __future__ import annotations

from typing import Any

import pytest
import tensorflow as tf

import sottovoce as sv
from sottovoce.errors import DefinitionError, TypeMismatch


@sv.tf_computation("float32", "float32")
def exceeds(reading, threshold):  # type: ignore[no-untyped-def]
    return reading > threshold


@sv.federated_computation("{float32}@CLIENTS", "float32@SERVER")
def get_fraction_over_threshold(readings, threshold):  # type: ignore[no-untyped-def]
    above = sv.federated_map(exceeds, (readings, sv.federated_broadcast(threshold)))
    return sv.federated_mean(sv.federated_map(sv.cast("float32"), above))


def test_the_example_word_for_word() -> None:
    assert get_fraction_over_threshold([68.5, 70.3, 69.8], 70.0) == pytest.approx(1 / 3)
    assert str(get_fraction_over_threshold.type_signature) == (
        "(<readings={float32}@CLIENTS,threshold=float32@SERVER> -> float32@SERVER)"
    )


def test_called_with_numbers_it_computes() -> None:
    assert exceeds(3.0, 2)
    assert not exceeds(threshold=3.0, reading=2.0)
    assert repr(exceeds) == "<tf_computation exceeds (<reading=float32,threshold=float32> -> bool)>"


def test_a_function_first_and_a_function_without_parameters() -> None:
    twice = sv.tf_computation(lambda x: 2 * x, "int32")
    ten = sv.tf_computation(lambda: tf.constant([10.0, 20.0]))
    assert str(twice.type_signature) == "(int32 -> int32)"
    assert str(ten.type_signature) == "( -> float32[2])"
    assert twice(21) == 42
    assert ten().tolist() == [10.0, 20.0]


def test_one_in_another_is_one_graph() -> None:
    @sv.tf_computation("float32[?]")
    def count_above_two(x: Any) -> Any:
        above = tf.map_fn(lambda v: exceeds(v, 2.0), x, fn_output_signature=tf.bool)
        return {"above": tf.reduce_sum(tf.cast(above, tf.int32)), "largest": tf.reduce_max(x)}

    found = count_above_two([1.0, 2.5, 4.0])
    assert (found.above, found.largest) == (2, 4.0)


def test_structs_go_in_and_come_out() -> None:
    @sv.tf_computation("<mean=float32,count=int32>", "float32")
    def update(running: Any, value: Any) -> Any:
        count = running.count + 1
        mean = running["mean"] + (value - running[0]) / tf.cast(count, tf.float32)
        return {"mean": mean, "count": count}

    @sv.federated_computation("{float32*}@CLIENTS")
    def running_means(values: Any) -> Any:
        return sv.sequence_reduce(values, {"mean": 0.0, "count": 0}, update)

    assert str(update.type_signature.result) == "<mean=float32,count=int32>"
    found = running_means([[1.0, 2.0, 6.0], [5.0]])
    assert [dict(member) for member in found] == [{"mean": 3.0, "count": 3}, {"mean": 5.0, "count": 1}]


def test_closures_over_constants_are_part_of_the_graph() -> None:
    factor = 3.0
    scaled = sv.tf_computation(lambda x: x * factor, "float32")
    factor = 100.0
    assert scaled(2.0) == 6.0


def test_sequences_are_not_for_tensorflow() -> None:
    with pytest.raises(DefinitionError, match=r"x is float32\*; TensorFlow gets one element: use sv.sequence_map"):
        sv.tf_computation("float32*")(lambda x: x)


def test_placed_types_are_for_federated_computations() -> None:
    with pytest.raises(
        DefinitionError, match=r"x is \{float32\}@CLIENTS; a tf_computation sees the value of one place"
    ):
        sv.tf_computation("{float32}@CLIENTS")(lambda x: x)


def test_a_federated_computation_is_not_for_tensorflow() -> None:
    with pytest.raises(DefinitionError, match="cannot be called inside a function that TensorFlow traces"):
        sv.tf_computation("float32")(lambda x: get_fraction_over_threshold([x], x))


def test_a_wrong_element_type_is_refused_where_it_is_mapped() -> None:
    with pytest.raises(TypeMismatch) as refused:
        sv.federated_computation(lambda x: sv.federated_map(exceeds, (x, x)), "{int32}@CLIENTS")
    assert "expected: <reading=float32,threshold=float32>" in str(refused.value)
    assert "found:    <int32,int32>" in str(refused.value)


def test_python_in_a_traced_function_is_refused_with_the_authors_line() -> None:
    with pytest.raises(DefinitionError, match=r"^test_tf_computations\.py:\d+, "):
        sv.tf_computation("float32")(lambda x: float(x))
