"""What the TFLite converter gets wrong without saying so comes out right: on the runtime, held against TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.conversion import flatbuffer_of
from models.converter_defects import with_rectifiers_kept
from models.convolutions import Slide, convolved
from models.keras_quantised import rounded
from sottovoce.runtime import open_function
from sottovoce.types import TensorType

_RANDOM = np.random.default_rng(0)
_KERNEL = rounded(_RANDOM.normal(size=(3, 3, 8, 64)).astype(np.float32))
_SLIDE = Slide(5, 5, (-1, 0, 1))
_RECTIFIED: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda x, k: tf.nn.relu(x @ k),
    "relu6": lambda x, k: tf.nn.relu6(x @ k),
    "maximum": lambda x, k: tf.maximum(x @ k, 0.0),
    "maximum on the other side": lambda x, k: tf.maximum(0.0, x @ k),
    "clipped": lambda x, k: tf.clip_by_value(x @ k, -1.0, 1.0),
    "after a bias of zero": lambda x, k: tf.nn.relu(tf.nn.bias_add(x @ k, tf.zeros(6))),
    "after a reshape": lambda x, k: tf.nn.relu(tf.reshape(x @ k, [-1, 2, 3])),
    "after a reshape and a bias of zero": lambda x, k: tf.nn.relu(tf.reshape(x @ k, [-1, 2, 3]) + tf.zeros(3)),
    "after a frozen bias, as Keras adds it": lambda x, k: tf.nn.relu(
        x @ k + tf.squeeze(tf.reshape(tf.zeros(6), [1, 6]), 0)
    ),
    "after a transposition": lambda x, k: tf.nn.relu(tf.transpose(x @ k)),
    "a product along the last axis": lambda x, k: tf.nn.relu(tf.tensordot(tf.reshape(x, [-1, 2, 8]), k, 1)),
    "before a reshape": lambda x, k: tf.reshape(tf.nn.relu(x @ k), [-1, 2, 3]),
    "after a constant factor": lambda x, k: tf.nn.relu((x @ k) * 1.0),
    "the right side transposed": lambda x, k: tf.nn.relu(tf.matmul(x, tf.transpose(k), transpose_b=True)),
    "a product of BatchMatMulV2": lambda x, k: tf.nn.relu(tf.raw_ops.BatchMatMulV2(x=x, y=k)),
}


def _run(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    kinds = [(name, TensorType("float32", (None, *array.shape[1:]))) for name, array in given.items()]
    kinds[1:] = [(name, TensorType("float32", given[name].shape)) for name, _ in kinds[1:]]
    flatbuffer = flatbuffer_of(lambda tensors: {"y": function(**tensors)}, kinds, what="a product")
    return open_function(flatbuffer)(given)["y"]


@pytest.mark.parametrize("way", _RECTIFIED)
def test_a_rectifier_after_a_product_is_not_lost(way: str) -> None:
    function = _RECTIFIED[way]
    given = {"x": _RANDOM.normal(size=(4, 8)).astype(np.float32), "k": _RANDOM.normal(size=(8, 6)).astype(np.float32)}
    wanted = function(tf.constant(given["x"]), tf.constant(given["k"]))
    assert (given["x"] @ given["k"]).min() < -1.0
    np.testing.assert_allclose(_run(function, given), wanted, atol=1e-5)


def test_a_rectified_convolution_by_an_int8_kernel_is_right() -> None:
    """What was first seen of the defect; int8 has nothing to do with it, but such a kernel is no constant."""
    assert _KERNEL is not None
    x = _RANDOM.normal(size=(2, 5, 5, 8)).astype(np.float32)
    found = _run(
        lambda x, anything: tf.nn.relu(convolved(x, _KERNEL.tensor(anything), _SLIDE, _SLIDE)),
        {"x": x, "anything": np.array([0.3], np.float32)},
    )
    np.testing.assert_allclose(found, tf.nn.relu(tf.nn.conv2d(x, _KERNEL.value, 1, "SAME")), atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, k, bias: tf.nn.relu(x @ k + bias),
        lambda x, k, bias: tf.nn.tanh(x @ k),
        lambda x, k, bias: tf.nn.relu(x @ tf.ones([8, 6])),
    ],
    ids=["a bias that is learned", "another activation", "a constant kernel"],
)
def test_what_the_converter_gets_right_is_left_alone(function: Callable[..., Any]) -> None:
    specs = [tf.TensorSpec([None, 8]), tf.TensorSpec([8, 6]), tf.TensorSpec([6])]
    traced = tf.function(lambda *given: with_rectifiers_kept(function(*given)), autograph=False)
    kinds = {op.type for op in traced.get_concrete_function(*specs).graph.get_operations()}
    assert "MatMul" in kinds
    assert "BatchMatMulV3" not in kinds
