"""What the modules of this package call a tensor, and the operation whose gradient is written here.

TensorFlow's own gradient of the sparse softmax cross-entropy needs operations that TFLite does not have. Every other
gradient of a Keras model is found in its graph; see `models.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

Tensor: TypeAlias = Any
"""A tf.Tensor; TensorFlow ships no types."""


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each example, in TFLite built-ins, with a gradient in TFLite built-ins.

    Args:
        logits: float32 [b, classes].
        labels: int32 [b], a class each.
    """
    loss: Callable[[Tensor, Tensor], Tensor] = tf.custom_gradient(_softmax_cross_entropy)
    return loss(logits, labels)


def _softmax_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
    wanted = tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    shifted = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    loss = tf.math.log(tf.reduce_sum(tf.exp(shifted), axis=-1)) - tf.reduce_sum(wanted * shifted, axis=-1)
    return loss, lambda dy: (dy[:, tf.newaxis] * (tf.nn.softmax(logits) - wanted), None)
