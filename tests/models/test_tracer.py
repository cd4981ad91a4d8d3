"""Tracing: result types, numbers, bounds, flatbuffers, and mistakes told when a function is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tracer import TensorFlowTracer, TracedFunction
from sottovoce.errors import DefinitionError
from sottovoce.language.ports import Bound, Traced
from sottovoce.runtime import open_function
from sottovoce.types import type_of
from sottovoce.values import Record

K = tf.constant(7.0)


def traced(function: Callable[..., object], parameter: str | None = "float32") -> Traced:
    return TensorFlowTracer().trace(function, None if parameter is None else type_of(parameter), name="f")


class Named(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("function", "parameter", "signature"),
    [
        (lambda x: x * 2, "float32", "f: (float32 -> float32)"),
        (lambda x: x > 0, "int32[3]", "f: (int32[3] -> bool[3])"),
        (
            lambda x: {"b": x.b[0], "a": x["a"]},
            "<a=float32,b=int32[3]>",
            "f: (<a=float32,b=int32[3]> -> <b=int32,a=float32>)",
        ),
        (lambda x: (x[0], (x[1], 1.5)), "<int32,bool>", "f: (<int32,bool> -> <int32,<bool,float32>>)"),
        (lambda x: Named(x, True), "float32", "f: (float32 -> <first=float32,second=bool>)"),
        (lambda x: Record([("a", x), (None, x)]), "float32", "f: (float32 -> <float32,float32>)"),
        (lambda x: tf.reduce_sum(x, axis=1), "float32[?,4]", "f: (float32[?,4] -> float32[?])"),
        (lambda x: tf.strings.join([x, "!"]), "str", "f: (str -> str)"),
    ],
)  # fmt: skip
def test_the_result_type_is_known_when_a_function_is_traced(
    function: Callable[..., object], parameter: str, signature: str
) -> None:
    assert repr(traced(function, parameter)) == signature


def test_a_function_without_a_parameter() -> None:
    found = traced(lambda: {"a": np.float32(1.5), "b": [1, 2]}, None)
    assert str(found.result) == "<a=float32,b=<int32,int32>>"
    assert [array.tolist() for array in found()] == [1.5, 1, 2]


def test_it_computes_leaf_by_leaf_and_keeps_what_it_closes_over() -> None:
    found = traced(lambda x: (x.a + K, tf.reduce_sum(x.b)), "<a=float32,b=int32[3]>")
    added, total = found(np.float32(1), np.array([1, 2, 3], np.int32))
    assert (added, added.dtype, total, total.dtype) == (8.0, np.float32, 6, np.int32)


def test_one_traced_function_inside_another() -> None:
    inner = traced(lambda x: x * K)
    outer = traced(lambda x: inner.symbolic(x + 1)[0])
    assert outer(np.float32(1))[0] == 14.0


def test_python_runs_once_and_never_again() -> None:
    runs: list[int] = []

    def counting(x: Any) -> Any:
        runs.append(1)
        return x + 1

    found = traced(counting)
    assert [found(np.float32(value))[0] for value in (1, 2)] == [2.0, 3.0]
    assert runs == [1]


def _if(x: Any) -> Any:
    return x if x > 3 else -x


def _prints(x: Any) -> Any:
    print(x)
    return x


def _nothing(x: Any) -> None:
    x + 1


MISTAKES: dict[str, tuple[Callable[..., object], str, str]] = {
    "Python's if": (_if, "float32", r"test_tracer.py:\d+, f: it decides with Python's if, .*; use tf.where\(cond"),
    "and": (lambda x: x and True, "bool", r"use tf.where\(condition, a, b\) or tf.logical_and"),
    "print": (_prints, "float32", r"test_tracer.py:\d+, f: it prints 'Tensor.*Python runs this function only once, "
              r"now, on tensors that have no values yet, and never on a device: remove the print"),
    ".numpy()": (lambda x: x.numpy(), "float32", r"it calls .numpy\(\) on a tensor; compute with TensorFlow op"),
    "numpy": (lambda x: np.log(x), "float32", r"it hands a tensor to numpy; use the TensorFlow function of that name"),
    "float()": (lambda x: float(x), "int32", r"it turns a tensor into a Python number; leave it a tensor"),
    "int()": (lambda x: int(x), "float32", r"it turns a tensor into a Python number; leave it a tensor"),
    "a loop": (lambda x: sum(i for i in x), "float32[?]", r"it loops over a tensor with Python; use TensorFlow's own"),
    "mixed dtypes": (lambda x: x * tf.cast(x, tf.float32), "int32", r"it mixes dtypes; cast one side, as in tf.cast"),
    "a float added to an int": (lambda x: x + 1.5, "int32", r"it mixes dtypes; cast one side"),
    "nothing": (_nothing, "float32", r"it returns nothing; end it with `return`"),
    "no tensor": (lambda x: object(), "float32", r"it returns a object; return a tensor, or a dict or tuple"),
    "a dtype that never travels": (lambda x: tf.cast(x, tf.float16), "float32", r"it returns float16; use one"),
    "randomness": (lambda x: x + tf.random.uniform([]), "float32", r"not a pure function: RandomUniform .*; draw"),
    "tf.print": (lambda x: (tf.print(x), x)[1], "float32", r"PrintV2 .*; remove tf.print: nobody sees"),
    "a sequence": (lambda x: x, "float32*", r"takes no sequence such as float32\*; write it over one element"),
    "anything else": (lambda x: x.colour, "float32", r"it cannot be traced: 'SymbolicTensor' object has no attribute"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_at_definition_with_its_line_and_cure(name: str) -> None:
    function, parameter, message = MISTAKES[name]
    with pytest.raises(DefinitionError, match=message):
        traced(function, parameter)


def test_the_line_that_is_told_is_the_one_that_failed() -> None:
    with pytest.raises(DefinitionError) as error:
        traced(_if)
    assert error.value.where == f"test_tracer.py:{_if.__code__.co_firstlineno + 1}, f"


def test_a_variable_is_refused() -> None:
    variable = tf.Variable(1.0)
    with pytest.raises(DefinitionError, match=r"ReadVariableOp .*; give the variable's value as an argument"):
        traced(lambda x: x * variable)


def test_a_flatbuffer_computes_the_same_without_tensorflow() -> None:
    function = traced(lambda x: {"a": tf.sqrt(x.a) * 2, "b": x.b + 1}, "<a=float32,b=int32[2]>")
    run = open_function(TensorFlowTracer().flatbuffer(function))
    found = run({"input_0": np.array([9], np.float32), "input_1": np.array([1, 2], np.int32)})
    assert found["output_0"].item() == 6.0
    assert found["output_1"].tolist() == [2, 3]


def test_a_flatbuffer_of_what_tflite_does_not_have_is_refused() -> None:
    function = traced(lambda x: x * 2, "float64")
    with pytest.raises(
        DefinitionError, match=r"f: devices have no Mul of these dtypes. They compute with float32 and int32"
    ):
        TensorFlowTracer().flatbuffer(function)


BOUNDED: dict[str, tuple[Callable[[Any], Any], tuple[float, float], tuple[float, float] | None]] = {
    "unknown": (lambda x: tf.atan(x), (0, 1), None),
    "clip of anything": (lambda x: tf.clip_by_value(x, -1.0, 3.0) * 2 + 1, (-9, 9), (-1, 7)),
    "minimum, maximum": (lambda x: tf.minimum(tf.maximum(x, 0.0), 2.0), (-9, 9), (0, 2)),
    "one-sided stays open": (lambda x: tf.maximum(tf.atan(x), 0.0), (0, 1), None),
    "comparison": (lambda x: tf.cast(x > 3, tf.float32) - 0.5, (-9, 9), (-0.5, 0.5)),
    "where": (lambda x: tf.where(x > 0, 2.0, -3.0), (-9, 9), (-3, 2)),
    "sigmoid": (lambda x: tf.sigmoid(x) * 4, (-90, 90), (0, 4)),
    "tanh": (tf.tanh, (-90, 90), (-1, 1)),
    "relu": (tf.nn.relu, (-2, 5), (0, 5)),
    "relu6": (tf.nn.relu6, (-2, 50), (0, 6)),
    "square": (lambda x: tf.square(x), (-2, 1), (0, 4)),
    "abs": (tf.abs, (-2, -1), (1, 2)),
    "product": (lambda x: x * (x - 1), (-2, 1), (-3, 6)),
    "division": (lambda x: 6 / x, (2, 3), (2, 3)),
    "division by what may be 0": (lambda x: 6 / x, (-2, 3), None),
    "exp, log": (lambda x: tf.math.log(tf.exp(x)), (0, 1), (0, 1)),
    "sqrt": (tf.sqrt, (4, 9), (2, 3)),
    "stack, reduce": (lambda x: tf.reduce_max(tf.stack([x, 2 * x, tf.zeros_like(x)])), (1, 2), (0, 4)),
    "mean of softmax": (lambda x: tf.reduce_mean(tf.nn.softmax(tf.stack([x, x + 1]))), (-9, 9), (0, 1)),
    "sum of a known number": (lambda x: tf.reduce_sum(tf.stack([x, x, x])), (-1, 2), (-3, 6)),
    "gather": (lambda x: tf.gather(tf.constant([1.0, 5.0, 3.0]), tf.cast(x > 0, tf.int32)), (-9, 9), (1, 5)),
    "floor": (tf.floor, (-1.5, 2.5), (-2, 2)),
    "an integer that wraps around": (lambda x: tf.cast(x, tf.int32) * 2**20, (0, 4096), None),
    "pad": (lambda x: tf.pad(tf.reshape(x, [1]), [[1, 0]]), (2, 3), (0, 3)),
    "one hot": (lambda x: tf.one_hot(tf.cast(x, tf.int32), 3), (0, 2), (0, 1)),
    "position of the largest": (lambda x: tf.argmax(tf.stack([x, 1.0, 2.0])), (0, 2), (0, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_follow_through_a_function(name: str) -> None:
    function, (low, high), expected = BOUNDED[name]
    (found,) = traced(function).output_bounds([Bound(low, high)])
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-6)


def test_what_a_function_closes_over_is_known() -> None:
    assert traced(lambda x: x * 0 + K).output_bounds([Bound(0, 1)]) == (Bound(7, 7),)


_KNOWN = {name: traced(function) for name, (function, _, _) in BOUNDED.items()}


@settings(deadline=None)
@given(name=st.sampled_from(sorted(BOUNDED)), at=st.floats(0, 1))
def test_no_value_leaves_its_bound(name: str, at: float) -> None:
    _, (low, high), _ = BOUNDED[name]
    function = _KNOWN[name]
    assert isinstance(function, TracedFunction)
    (bound,) = function.output_bounds([Bound(low, high)])
    (found,) = function(np.float32(low + at * (high - low)))
    if bound is not None:
        slack = 1e-5 * max(1, abs(bound.low), abs(bound.high))
        assert bound.low - slack <= found.min()
        assert found.max() <= bound.high + slack
