"""Every operation in built-ins is the plain TensorFlow one: the same values and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops import BuiltIns, Operations, Plain, Tensor
from sottovoce.types import Array


def assert_agree(
    call: Callable[[Operations, list[Tensor]], Tensor], inputs: list[Array], *, tolerance: float = 2e-5
) -> None:
    """Compare value and gradients of both kinds, the gradient being that of a random projection of the output."""
    found: list[list[Any]] = []
    for operations in (BuiltIns(), Plain()):
        tensors = [tf.constant(value) for value in inputs]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = call(operations, tensors)
            direction = np.random.default_rng(1).normal(size=output.shape).astype(np.float32)
            projected = tf.reduce_sum(output * direction)
        found.append([output, *tape.gradient(projected, tensors)])
    for built_in, plain in zip(*found, strict=True):
        np.testing.assert_allclose(built_in, plain, rtol=tolerance, atol=tolerance)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 5), (4, 7), (3, 6, 2)])
def test_relu(shape: tuple[int, ...]) -> None:
    values = normal(*shape)
    values.flat[0] = 0.0
    assert_agree(lambda operations, tensors: operations.relu(tensors[0]), [values])


@pytest.mark.parametrize("batch", [1, 8])
def test_dense(batch: int) -> None:
    inputs = [normal(batch, 5), normal(5, 3), normal(3)]
    assert_agree(lambda operations, tensors: operations.dense(*tensors), inputs)


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    taps=st.integers(1, 5),
    extra=st.integers(0, 9),
    channels=st.integers(1, 3),
    filters=st.integers(1, 3),
    stride=st.integers(1, 6),
)
def test_conv1d(batch: int, taps: int, extra: int, channels: int, filters: int, stride: int) -> None:
    inputs = [normal(batch, taps + extra, channels), normal(taps, channels, filters), normal(filters)]
    assert_agree(lambda operations, tensors: operations.conv1d(*tensors, stride=stride), inputs)


@pytest.mark.parametrize("shape", [(1, 4, 3), (5, 1, 2), (2, 26, 8)])
def test_average_over_time(shape: tuple[int, ...]) -> None:
    assert_agree(lambda operations, tensors: operations.average_over_time(tensors[0]), [normal(*shape)])


@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("batch", [1, 6])
def test_softmax_cross_entropy(batch: int, scale: float) -> None:
    labels = tf.constant(np.arange(batch) % 4, tf.int32)
    assert_agree(
        lambda operations, tensors: operations.softmax_cross_entropy(tensors[0], labels), [normal(batch, 4) * scale]
    )
