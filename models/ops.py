"""The operations a model's forward pass is written in, in two kinds that agree number for number.

A plain `GradientTape` leaves gradient ops that TFLite does not have (ReluGrad, Conv2DBackpropFilter,
BroadcastGradientArgs, ...). `BuiltIns` gives every operation a gradient written in TFLite built-ins, for any batch
size; `Plain` is TensorFlow as everybody knows it, with TensorFlow's own gradients. A model is traced with the first
and its self-test vectors come from the second, so that a wrong gradient here cannot bless itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import tensorflow as tf

Tensor: TypeAlias = Any
"""A tf.Tensor; TensorFlow ships no types."""
Gradient: TypeAlias = Callable[[Tensor], Any]
"""From the gradient of an output to those of the inputs."""


class Operations(Protocol):
    """What a forward pass and a loss may use. Shapes: b = batch (unknown), t = time, c = channels."""

    def relu(self, x: Tensor) -> Tensor:
        """Return max(x, 0), any shape."""

    def dense(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """Return x @ kernel + bias: [b, m], [m, n], [n] -> [b, n]."""

    def conv1d(self, x: Tensor, kernel: Tensor, bias: Tensor, *, stride: int) -> Tensor:
        """Return the convolution without padding: [b, t, c], [taps, c, filters], [filters] -> [b, u, filters]."""

    def average_over_time(self, x: Tensor) -> Tensor:
        """Return the mean over t: [b, t, c] -> [b, c]."""

    def softmax_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example: float32 [b, classes], int32 [b] -> float32 [b]."""


class Plain:
    """TensorFlow's own operations and gradients: the reference."""

    def relu(self, x: Tensor) -> Tensor:
        """See Operations."""
        return tf.nn.relu(x)

    def dense(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """See Operations."""
        return tf.matmul(x, kernel) + bias

    def conv1d(self, x: Tensor, kernel: Tensor, bias: Tensor, *, stride: int) -> Tensor:
        """See Operations."""
        return tf.nn.conv1d(x, kernel, stride=stride, padding="VALID") + bias

    def average_over_time(self, x: Tensor) -> Tensor:
        """See Operations."""
        return tf.reduce_mean(x, axis=1)

    def softmax_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See Operations."""
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


class BuiltIns:
    """The same operations with gradients made of TFLite built-ins."""

    def relu(self, x: Tensor) -> Tensor:
        """See Operations."""
        return _relu(x)

    def dense(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """See Operations."""
        return _dense(x, kernel, bias)

    def conv1d(self, x: Tensor, kernel: Tensor, bias: Tensor, *, stride: int) -> Tensor:
        """See Operations.

        Patches are cut out and multiplied once (im2col), so that dW is one matmul at any batch size. A stride is first
        folded into the channels, [b, t, c] -> [b, t / stride, stride * c], with taps of zero where the kernel's length
        is not a multiple: slices with a stride are ten times slower under XNNPACK.
        """
        taps, channels, filters = kernel.shape
        length = (x.shape[1] - taps) // stride + 1
        groups = -(-taps // stride)
        width = stride * channels
        folded = tf.reshape(_resize_time(x, stride * (length - 1 + groups)), [-1, length - 1 + groups, width])
        patches = tf.reshape(_patches(folded, groups), [-1, groups * width])
        padded = tf.pad(kernel, [[0, groups * stride - taps], [0, 0], [0, 0]])
        rows = self.dense(patches, tf.reshape(padded, [groups * width, filters]), bias)
        return tf.reshape(rows, [-1, length, filters])

    def average_over_time(self, x: Tensor) -> Tensor:
        """See Operations."""
        return _average_over_time(x)

    def softmax_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See Operations."""
        return _softmax_cross_entropy(logits, labels)


def _with_gradient(function: Callable[..., tuple[Tensor, Gradient]]) -> Callable[..., Tensor]:
    """Return `tf.custom_gradient(function)`, with types."""
    decorated: Callable[..., Tensor] = tf.custom_gradient(function)
    return decorated


@_with_gradient
def _relu(x: Tensor) -> tuple[Tensor, Gradient]:
    y = tf.nn.relu(x)
    return y, lambda dy: dy * tf.cast(y > 0, dy.dtype)


@_with_gradient
def _dense(x: Tensor, kernel: Tensor, bias: Tensor) -> tuple[Tensor, Gradient]:
    def gradient(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tf.matmul(dy, kernel, transpose_b=True), tf.matmul(x, dy, transpose_a=True), tf.reduce_sum(dy, axis=0)

    return tf.matmul(x, kernel) + bias, gradient


@_with_gradient
def _average_over_time(x: Tensor) -> tuple[Tensor, Gradient]:
    share = tf.ones([1, x.shape[1], 1], x.dtype) / x.shape[1]
    return tf.reduce_mean(x, axis=1), lambda dy: dy[:, tf.newaxis, :] * share


@_with_gradient
def _softmax_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Gradient]:
    wanted = tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    shifted = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    loss = tf.math.log(tf.reduce_sum(tf.exp(shifted), axis=-1)) - tf.reduce_sum(wanted * shifted, axis=-1)
    return loss, lambda dy: (dy[:, tf.newaxis] * (tf.nn.softmax(logits) - wanted), None)


def _resize_time(x: Tensor, time: int) -> Tensor:
    """Cut or pad [b, t, c] with zeros at its end to [b, time, c]; the gradient does the opposite."""
    before = x.shape[1]
    if time == before:
        return x

    @_with_gradient
    def resize(x: Tensor) -> tuple[Tensor, Gradient]:
        resized = x[:, :time, :] if time < before else tf.pad(x, [[0, 0], [0, time - before], [0, 0]])
        return resized, lambda dy: _resize_time(dy, before)

    return resize(x)


def _patches(x: Tensor, taps: int) -> Tensor:
    """Return all windows of `taps` times: [b, t, c] -> [b, t - taps + 1, taps * c].

    The gradient adds every window's part where it was cut; TensorFlow's own, of a slice, is not a built-in.
    """
    length = x.shape[1] - taps + 1

    @_with_gradient
    def cut(x: Tensor) -> tuple[Tensor, Gradient]:
        return tf.concat([x[:, tap : tap + length, :] for tap in range(taps)], axis=2), put_back

    def put_back(dy: Tensor) -> Tensor:
        parts = tf.split(dy, taps, axis=2)
        return tf.add_n([tf.pad(part, [[0, 0], [tap, taps - 1 - tap], [0, 0]]) for tap, part in enumerate(parts)])

    return cut(x)
