"""Every gradient that is written in TFLite built-ins, in float64 against the difference quotient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.gradients import CannotTrain, built_in_gradients, slopes
from models.gradients_registry import GRADIENTS
from models.gradients_substitutes import erf

raw = tf.raw_ops
_STEP = 1e-6


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def _positive(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).uniform(0.5, 2.0, shape)


_IMAGE, _TIMES = _normal(2, 7, 6, 3), _normal(2, 4, 6)
_SAME = {"strides": [1, 2, 2, 1], "padding": "SAME"}
_VALID = {"strides": [1, 2, 1, 1], "padding": "VALID"}

Case = tuple[Callable[..., Any], list[np.ndarray]]
CASES: dict[str, list[Case]] = {
    "Relu": [(tf.nn.relu, [_TIMES])],
    "Relu6": [(lambda x: tf.nn.relu6(4 * x), [_TIMES])],
    "LeakyRelu": [(lambda x: tf.nn.leaky_relu(x, 0.3), [_TIMES])],
    "Elu": [(tf.nn.elu, [_TIMES])],
    "Sigmoid": [(tf.sigmoid, [_TIMES])],
    "Tanh": [(tf.tanh, [_TIMES])],
    "Softmax": [(tf.nn.softmax, [_TIMES])],
    "LogSoftmax": [(tf.nn.log_softmax, [_TIMES])],
    "Exp": [(tf.exp, [_TIMES])],
    "Log": [(tf.math.log, [_positive(3, 4)])],
    "Sqrt": [(tf.sqrt, [_positive(3, 4)])],
    "Rsqrt": [(tf.math.rsqrt, [_positive(3, 4)])],
    "Square": [(tf.square, [_TIMES])],
    "Abs": [(tf.abs, [_TIMES])],
    "Neg": [(tf.negative, [_TIMES])],
    "Sin": [(tf.sin, [_TIMES])],
    "Cos": [(tf.cos, [_TIMES])],
    "Cast": [(lambda x: raw.Cast(x=x, DstT=tf.float64), [_TIMES])],
    "Add": [(lambda x, y: raw.Add(x=x, y=y), [_TIMES, _normal(4, 1)])],
    "AddV2": [(tf.add, [_TIMES, _normal(6)])],
    "Sub": [(tf.subtract, [_normal(4, 1), _TIMES])],
    "Mul": [(tf.multiply, [_TIMES, _normal(1, 4, 1)])],
    "RealDiv": [(tf.divide, [_TIMES, _positive(4, 1)])],
    "DivNoNan": [(tf.math.divide_no_nan, [_TIMES, _positive(4, 1)])],
    "SquaredDifference": [(tf.math.squared_difference, [_TIMES, _normal(4, 1)])],
    "Maximum": [(tf.maximum, [_TIMES, _normal(6)])],
    "Minimum": [(tf.minimum, [_TIMES, _normal(6)])],
    "Pow": [
        (lambda x: tf.pow(x, 3.0), [_TIMES]),
        (lambda x: tf.pow(x, -0.5), [_positive(3, 4)]),
        (tf.pow, [_positive(3, 4), _normal(4)]),
        (lambda x: tf.pow(tf.constant(2.0, x.dtype), x), [_TIMES]),
    ],
    "Select": [(lambda x, y: raw.Select(condition=x > y, x=x * x, y=y), [_TIMES, _normal(2, 4, 6) + 0.1])],
    "SelectV2": [(lambda x, y: tf.where(x > 0, x * x, y), [_TIMES, _normal(4, 1)])],
    "ClipByValue": [(lambda x: raw.ClipByValue(t=x, clip_value_min=-0.5, clip_value_max=0.5), [_TIMES])],
    "BiasAdd": [(tf.nn.bias_add, [_TIMES, _normal(6)])],
    "Sum": [(lambda x: tf.reduce_sum(x, [0, 2]), [_TIMES]), (lambda x: tf.reduce_sum(x, 1, keepdims=True), [_TIMES])],
    "Mean": [(lambda x: tf.reduce_mean(x, [1, -1]), [_TIMES]), (tf.reduce_mean, [_TIMES])],
    "Max": [(lambda x: tf.reduce_max(x, 1), [_TIMES])],
    "Min": [(lambda x: tf.reduce_min(x, [0, 1], keepdims=True), [_TIMES])],
    "Reshape": [(lambda x: tf.reshape(x, [4, 12]), [_TIMES])],
    "ExpandDims": [(lambda x: tf.expand_dims(x, 1), [_TIMES])],
    "Squeeze": [(lambda x: tf.squeeze(x, [1]), [_normal(3, 1, 4)])],
    "Transpose": [(lambda x: tf.transpose(x, [2, 0, 1]), [_TIMES])],
    "ReverseV2": [(lambda x: tf.reverse(x, [1, 2]), [_TIMES])],
    "ConcatV2": [(lambda x, y: tf.concat([x, y, x], 1), [_TIMES, _normal(2, 3, 6)])],
    "Pack": [(lambda x, y: tf.stack([x, y], 1), [_TIMES, _TIMES + 1])],
    "Unpack": [(lambda x: tf.unstack(x, axis=1)[2], [_TIMES])],
    "Split": [(lambda x: tf.split(x, 3, axis=2)[1], [_TIMES])],
    "SplitV": [(lambda x: tf.split(x, [1, 5], axis=2)[1], [_TIMES])],
    "Pad": [(lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 3]]), [_TIMES])],
    "PadV2": [(lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 3]], constant_values=2.0), [_TIMES])],
    "Slice": [(lambda x: tf.slice(x, [0, 1, 2], [2, 2, 3]), [_TIMES])],
    "StridedSlice": [
        (lambda x: x[:, 1:4:2, ::-1], [_TIMES]),
        (lambda x: x[:, -1, tf.newaxis, 1::3], [_TIMES]),
        (lambda x: x[..., 5:0:-2], [_TIMES]),
    ],
    "Tile": [(lambda x: tf.tile(x, [1, 2, 3]), [_TIMES])],
    "BroadcastTo": [(lambda x: tf.broadcast_to(x, [2, 4, 6]), [_normal(4, 1)])],
    "GatherV2": [
        (lambda x: tf.gather(x, [[0, 3, 3], [1, 0, 3]]), [_normal(4, 5)]),
        (lambda x: tf.gather(x, [3, 0, 3], axis=1), [_TIMES]),
        (lambda x: tf.gather(x, [[0, 5], [1, 1]], axis=-1), [_TIMES]),
    ],
    "MatMul": [
        (lambda x, y, a=a, b=b: tf.matmul(x, y, transpose_a=a, transpose_b=b), [_normal(4, 4), _normal(4, 4) + 1])
        for a in (False, True)
        for b in (False, True)
    ],
    "BatchMatMulV2": [
        (lambda x, y, a=a, b=b: tf.matmul(x, y, transpose_a=a, transpose_b=b), [_normal(2, 3, 3), _normal(1, 3, 3)])
        for a in (False, True)
        for b in (False, True)
    ],
    "BatchMatMul": [(lambda x, y: raw.BatchMatMul(x=x, y=y, adj_y=True), [_TIMES, _normal(2, 3, 6)])],
    "Einsum": [
        (lambda x, y: tf.einsum("BTNH,BSNH->BNTS", x, y), [_normal(2, 3, 2, 4), _normal(2, 5, 2, 4)]),
        (lambda x, y: tf.einsum("...a,ab->...b", x, y), [_TIMES, _normal(6, 3)]),
    ],
    "Conv2D": [
        (lambda x, w: tf.nn.conv2d(x, w, **_SAME), [_IMAGE, _normal(3, 2, 3, 4)]),
        (lambda x, w: tf.nn.conv2d(x, w, **_VALID), [_IMAGE, _normal(2, 3, 3, 4)]),
        (lambda x, w: tf.nn.conv2d(x, w, 1, "SAME", dilations=[2, 1]), [_IMAGE, _normal(3, 2, 3, 4)]),
    ],
    "Conv2DBackpropInput": [
        (lambda x, w: tf.nn.conv2d_transpose(x, w, [2, 8, 11, 2], **_SAME), [_normal(2, 4, 6, 3), _normal(3, 2, 2, 3)])
    ],
    "DepthwiseConv2dNative": [
        (lambda x, w: tf.nn.depthwise_conv2d(x, w, **_SAME), [_IMAGE, _normal(3, 2, 3, 2)]),
        (lambda x, w: tf.nn.depthwise_conv2d(x, w, [1, 1, 1, 1], "VALID"), [_IMAGE, _normal(2, 3, 3, 1)]),
    ],
    "MaxPool": [
        (lambda x: tf.nn.max_pool2d(x, (3, 2), **_SAME), [_IMAGE]),
        (lambda x: tf.nn.max_pool2d(x, 2, **_VALID), [_IMAGE]),
    ],
    "AvgPool": [
        (lambda x: tf.nn.avg_pool2d(x, (3, 2), **_SAME), [_IMAGE]),
        (lambda x: tf.nn.avg_pool2d(x, 3, **_VALID), [_IMAGE]),
    ],
    "SpaceToBatchND": [(lambda x: tf.space_to_batch(x, [2, 3], [[0, 1], [1, 2]]), [_IMAGE])],
    "BatchToSpaceND": [(lambda x: tf.batch_to_space(x, [2, 1], [[1, 0], [0, 0]]), [_IMAGE])],
}
FLAT = {"Floor", "Ceil", "Round", "Rint", "Sign", "StopGradient"}
"""What is constant almost everywhere."""


def _pairs() -> list[Any]:
    return [
        pytest.param(kind, *case, id=f"{kind}{at}") for kind, cases in CASES.items() for at, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("kind", "function", "values"), _pairs())
def test_a_gradient_is_the_difference_quotient(
    kind: str, function: Callable[..., Any], values: list[np.ndarray]
) -> None:
    weight = np.random.default_rng(9).normal(size=function(*map(tf.constant, values)).shape)
    specs = [tf.TensorSpec(value.shape, tf.float64) for value in values]

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def ours(*inputs: Any) -> Any:
        with built_in_gradients():
            total = tf.reduce_sum(function(*inputs) * weight)
        return slopes(total, list(inputs))

    concrete = ours.get_concrete_function(*specs)
    assert kind in {op.type for op in concrete.graph.get_operations()}
    found = concrete(*map(tf.constant, values))
    for at, slope in enumerate(found):
        direction = np.random.default_rng(at).normal(size=values[at].shape)
        moved = []
        for sign in (1, -1):
            inputs = [value + sign * _STEP * direction if i == at else value for i, value in enumerate(values)]
            moved.append(float(np.sum(function(*map(tf.constant, inputs)).numpy() * weight)))
        quotient = (moved[0] - moved[1]) / (2 * _STEP)
        assert float(np.sum(slope.numpy() * direction)) == pytest.approx(quotient, rel=1e-6, abs=1e-7)


def test_every_gradient_is_checked() -> None:
    assert set(CASES) | FLAT == set(GRADIENTS)


def test_erf_is_that_of_tensorflow_and_so_is_its_slope() -> None:
    x = tf.constant(np.linspace(-5, 5, 2001), tf.float64)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        here, there = erf(x), tf.math.erf(x)
    np.testing.assert_allclose(here, there, atol=3e-7)
    np.testing.assert_allclose(tape.gradient(here, x), tape.gradient(there, x), atol=1e-12)


def test_an_operation_without_a_gradient_is_named() -> None:
    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def broken(x: Any) -> Any:
        with built_in_gradients():
            total = tf.reduce_sum(tf.gather(x, tf.argmax(x, axis=1), axis=1))
        return slopes(total, [x])

    with pytest.raises(CannotTrain, match="gathers what depends on the batch; use fixed places"):
        broken(tf.zeros([2, 2]))
