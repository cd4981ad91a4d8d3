"""The operations a model's forward pass is written in, in two kinds that agree number for number.

A plain `GradientTape` leaves gradient ops that TFLite does not have (ReluGrad, Conv2DBackpropFilter,
BroadcastGradientArgs, ...). `BuiltIns` gives every operation a gradient written in TFLite built-ins, for any batch
size; `Plain` is TensorFlow as everybody knows it, with TensorFlow's own gradients. A model is traced with the first
and its self-test vectors come from the second, so that a wrong gradient here cannot bless itself.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import tensorflow as tf

Tensor: TypeAlias = Any
"""A tf.Tensor; TensorFlow ships no types."""


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
        """See Operations. Patches are cut out and multiplied once (im2col), so dW is one matmul at any batch size."""
        taps, channels, filters = kernel.shape
        length = (x.shape[1] - taps) // stride + 1
        patches = tf.reshape(_patches(x, taps=taps, stride=stride, length=length), [-1, taps * channels])
        rows = self.dense(patches, tf.reshape(kernel, [taps * channels, filters]), bias)
        return tf.reshape(rows, [-1, length, filters])

    def average_over_time(self, x: Tensor) -> Tensor:
        """See Operations."""
        return _average_over_time(x)

    def softmax_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See Operations."""
        return _softmax_cross_entropy(logits, labels)


@tf.custom_gradient
def _relu(x: Tensor) -> tuple[Tensor, Any]:
    y = tf.nn.relu(x)
    return y, lambda dy: dy * tf.cast(y > 0, dy.dtype)


@tf.custom_gradient
def _dense(x: Tensor, kernel: Tensor, bias: Tensor) -> tuple[Tensor, Any]:
    def gradient(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tf.matmul(dy, kernel, transpose_b=True), tf.matmul(x, dy, transpose_a=True), tf.reduce_sum(dy, axis=0)

    return tf.matmul(x, kernel) + bias, gradient


@tf.custom_gradient
def _average_over_time(x: Tensor) -> tuple[Tensor, Any]:
    length = x.shape[1]
    return tf.reduce_mean(x, axis=1), lambda dy: tf.tile((dy / length)[:, tf.newaxis, :], [1, length, 1])


@tf.custom_gradient
def _softmax_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
    wanted = tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    shifted = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    loss = tf.math.log(tf.reduce_sum(tf.exp(shifted), axis=-1)) - tf.reduce_sum(wanted * shifted, axis=-1)
    return loss, lambda dy: (dy[:, tf.newaxis] * (tf.nn.softmax(logits) - wanted), None)


def _patches(x: Tensor, *, taps: int, stride: int, length: int) -> Tensor:
    """Cut [b, t, c] into [b, length, taps * c]; the gradient of a slice is not a built-in, so it is written out."""
    time, channels = x.shape[1], x.shape[2]

    @tf.custom_gradient
    def cut(x: Tensor) -> tuple[Tensor, Any]:
        last = stride * (length - 1) + 1
        patches = tf.concat([x[:, tap : tap + last : stride, :] for tap in range(taps)], axis=2)
        return patches, lambda dy: _put_back(dy, taps=taps, stride=stride, time=time, channels=channels)

    return cut(x)


def _put_back(dy: Tensor, *, taps: int, stride: int, time: int, channels: int) -> Tensor:
    """Add the patches' gradients where they were cut: the transpose of `_patches`.

    Tap k of patch i came from time stride*i + k. Times are handled in `stride` interleaved phases: phase p gets the
    taps p, p + stride, ..., the j-th of them shifted by j; then the phases are woven together and trimmed to `time`.
    """
    steps = -(-time // stride)
    length = dy.shape[1]
    phases = []
    for phase in range(stride):
        total = None
        for shift, tap in enumerate(range(phase, taps, stride)):
            part = dy[:, :, tap * channels : (tap + 1) * channels]
            padded = tf.pad(part, [[0, 0], [shift, steps - shift - length], [0, 0]])
            total = padded if total is None else total + padded
        phases.append(tf.zeros_like(dy[:, :1, :channels]) + tf.zeros([1, steps, 1]) if total is None else total)
    woven = tf.reshape(tf.stack(phases, axis=2), [-1, steps * stride, channels])
    return woven[:, :time, :]
