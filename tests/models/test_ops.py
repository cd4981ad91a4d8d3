"""The cross-entropy in built-ins is TensorFlow's own: the same values, and the gradient that differences show."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from models.ops import softmax_cross_entropy
from sottovoce.types import Array

STEP = 1e-6


def logits_of(batch: int, scale: float) -> Array:
    return np.random.default_rng(batch).normal(size=(batch, 4)) * scale


def labels_of(batch: int) -> Array:
    return (np.arange(batch) % 4).astype(np.int32)


@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("batch", [1, 6])
def test_losses_are_those_of_tensorflow(batch: int, scale: float) -> None:
    logits, labels = logits_of(batch, scale).astype(np.float32), labels_of(batch)
    expected = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    found = softmax_cross_entropy(tf.constant(logits), tf.constant(labels))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_gradient_is_what_differences_in_float64_show(batch: int, scale: float) -> None:
    logits, labels = tf.constant(logits_of(batch, scale)), tf.constant(labels_of(batch))
    direction, shares = (np.random.default_rng(at).normal(size=size) for at, size in ((7, (batch, 4)), (8, batch)))
    with tf.GradientTape() as tape:
        tape.watch(logits)
        total = tf.reduce_sum(softmax_cross_entropy(logits, labels) * shares)
    along = np.sum(tape.gradient(total, logits) * direction)
    ahead, behind = (
        np.sum(softmax_cross_entropy(logits + sign * STEP * direction, labels) * shares) for sign in (1, -1)
    )
    assert along == pytest.approx((ahead - behind) / (2 * STEP), rel=1e-6, abs=1e-8)
