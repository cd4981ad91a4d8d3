"""Convolutions written in TFLite built-ins: the same numbers as TensorFlow's, and slopes that are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.convolutions import HEIGHT, WIDTH, Slide, side_by_side, summed
from models.gradients import built_in_gradients, replay, slopes

_IMAGE = (2, 9, 8, 3)
_KERNELS = [(5, 5, 3, 4), (3, 2, 3, 1), (3, 3, 3, 64), (1, 1, 3, 4), (1, 4, 3, 5), (4, 1, 3, 5)]
_SETTINGS = [
    {"strides": 1},
    {"strides": [1, 2, 3, 1]},
    {"strides": [1, 1, 2, 1]},
    {"strides": 1, "dilations": [2, 1]},
]


def _uniform(*_: Any) -> Any:
    raise AssertionError("nothing random is made")


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("shape", _KERNELS, ids=str)
@pytest.mark.parametrize("settings", _SETTINGS, ids=str)
def test_a_convolution_and_its_slopes_are_those_of_tensorflow(
    shape: tuple[int, ...], settings: dict[str, Any], padding: str
) -> None:
    random = np.random.default_rng(len(padding) + sum(shape))
    specs = [tf.TensorSpec([None, *_IMAGE[1:]], tf.float64), tf.TensorSpec(shape, tf.float64)]

    @tf.function(input_signature=specs)  # type: ignore[untyped-decorator]
    def plain(x: Any, kernel: Any) -> Any:
        return tf.nn.conv2d(x, kernel, padding=padding, **settings)

    recorded = plain.get_concrete_function().graph
    x, kernel, other_x, other_kernel = (random.normal(size=each) for each in (_IMAGE, shape, _IMAGE, shape))
    weights = random.normal(size=plain(x, kernel).shape)

    @tf.function(input_signature=specs, autograph=False)  # type: ignore[untyped-decorator]
    def ours(x: Any, kernel: Any) -> Any:
        feeds = dict(zip((tensor.name for tensor in recorded.inputs), (x, kernel), strict=True))
        with built_in_gradients():
            (y,) = replay(recorded.outputs, feeds, uniform=_uniform)
            total = tf.reduce_sum(y * weights)
        return y, *slopes(total, [x, kernel])

    assert "Conv2D" not in {op.type for op in ours.get_concrete_function().graph.get_operations()}
    y, dx, dw = (tensor.numpy() for tensor in ours(x, kernel))
    np.testing.assert_allclose(y, plain(x, kernel), atol=1e-12)
    # A convolution is linear in both, so a slope times any direction is the convolution of that direction.
    assert np.sum(dx * other_x) == pytest.approx(np.sum(plain(other_x, kernel) * weights), rel=1e-9, abs=1e-10)
    assert np.sum(dw * other_kernel) == pytest.approx(np.sum(plain(x, other_kernel) * weights), rel=1e-9, abs=1e-10)


def test_a_constant_kernel_stays_a_convolution() -> None:
    kernel = np.ones((2, 2, 3, 4), np.float32)

    @tf.function(input_signature=[tf.TensorSpec([None, 5, 5, 3])])  # type: ignore[untyped-decorator]
    def plain(x: Any) -> Any:
        return tf.nn.conv2d(x, kernel, 2, "VALID")

    recorded = plain.get_concrete_function().graph

    @tf.function(input_signature=[tf.TensorSpec([None, 5, 5, 3])], autograph=False)  # type: ignore[untyped-decorator]
    def again(x: Any) -> Any:
        return replay(recorded.outputs, {recorded.inputs[0].name: x}, uniform=_uniform)

    x = np.random.default_rng(0).normal(size=(3, 5, 5, 3)).astype(np.float32)
    assert "Conv2D" in {op.type for op in again.get_concrete_function().graph.get_operations()}
    np.testing.assert_array_equal(again(x)[0], plain(x))


@pytest.mark.parametrize("axis", [HEIGHT, WIDTH])
def test_the_two_rearrangements_are_each_other_transposed(axis: int) -> None:
    random = np.random.default_rng(axis)
    slide = Slide(5, 4, (-2, 0, 3))
    shape, wide = [2, 3, 3, 2], [2, 3, 3, 6]
    shape[axis], wide[axis] = slide.length, slide.outputs
    x, parts = random.normal(size=shape), random.normal(size=wide)
    there = side_by_side(tf.constant(x), axis, slide).numpy()
    back = summed(tf.constant(parts), axis, slide.back).numpy()
    assert there.shape == tuple(wide)
    assert back.shape == tuple(shape)
    assert np.sum(there * parts) == pytest.approx(np.sum(back * x), rel=1e-12)
