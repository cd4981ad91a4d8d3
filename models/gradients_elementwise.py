"""Gradients of operations that work entry by entry, with broadcasting, and of sums over axes."""

from __future__ import annotations

import math

import tensorflow as tf

from models.gradients_registry import Operation, constant_of, gradient_of, unbroadcast
from models.ops import Tensor


def _step(condition: Tensor, like: Tensor) -> Tensor:
    return tf.cast(condition, like.dtype)


@gradient_of("Relu")
def _relu(op: Operation, dy: Tensor) -> Tensor:
    return dy * _step(op.outputs[0] > 0, dy)


@gradient_of("Relu6")
def _relu6(op: Operation, dy: Tensor) -> Tensor:
    y = op.outputs[0]
    return dy * _step(y > 0, dy) * _step(y < 6, dy)


@gradient_of("LeakyRelu")
def _leaky_relu(op: Operation, dy: Tensor) -> Tensor:
    slope = op.get_attr("alpha")
    return dy * (slope + (1.0 - slope) * _step(op.inputs[0] > 0, dy))


@gradient_of("Elu")
def _elu(op: Operation, dy: Tensor) -> Tensor:
    y = op.outputs[0]
    return dy * (tf.minimum(y, 0.0) + 1.0)


@gradient_of("Sigmoid")
def _sigmoid(op: Operation, dy: Tensor) -> Tensor:
    y = op.outputs[0]
    return dy * y * (1.0 - y)


@gradient_of("Tanh")
def _tanh(op: Operation, dy: Tensor) -> Tensor:
    y = op.outputs[0]
    return dy * (1.0 - y * y)


@gradient_of("Softmax")
def _softmax(op: Operation, dy: Tensor) -> Tensor:
    y = op.outputs[0]
    return (dy - tf.reduce_sum(dy * y, axis=-1, keepdims=True)) * y


@gradient_of("LogSoftmax")
def _log_softmax(op: Operation, dy: Tensor) -> Tensor:
    return dy - tf.exp(op.outputs[0]) * tf.reduce_sum(dy, axis=-1, keepdims=True)


@gradient_of("Exp")
def _exp(op: Operation, dy: Tensor) -> Tensor:
    return dy * op.outputs[0]


@gradient_of("Log")
def _log(op: Operation, dy: Tensor) -> Tensor:
    return dy / op.inputs[0]


@gradient_of("Sqrt")
def _sqrt(op: Operation, dy: Tensor) -> Tensor:
    return 0.5 * dy / op.outputs[0]


@gradient_of("Rsqrt")
def _rsqrt(op: Operation, dy: Tensor) -> Tensor:
    y = op.outputs[0]
    return -0.5 * dy * y * y * y


@gradient_of("Square")
def _square(op: Operation, dy: Tensor) -> Tensor:
    return 2.0 * dy * op.inputs[0]


@gradient_of("Abs")
def _abs(op: Operation, dy: Tensor) -> Tensor:
    x = op.inputs[0]
    return dy * (_step(x > 0, dy) - _step(x < 0, dy))


@gradient_of("Neg")
def _neg(op: Operation, dy: Tensor) -> Tensor:
    return -dy


@gradient_of("Sin")
def _sin(op: Operation, dy: Tensor) -> Tensor:
    return dy * tf.cos(op.inputs[0])


@gradient_of("Cos")
def _cos(op: Operation, dy: Tensor) -> Tensor:
    return -dy * tf.sin(op.inputs[0])


@gradient_of("Cast")
def _cast(op: Operation, dy: Tensor) -> Tensor | None:
    source = op.inputs[0].dtype
    return tf.cast(dy, source) if source.is_floating and dy.dtype.is_floating else None


@gradient_of("Floor", "Ceil", "Round", "Rint", "Sign", "StopGradient")
def _none(op: Operation, dy: Tensor) -> None:
    return None


@gradient_of("Add", "AddV2")
def _add(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, y = op.inputs
    return unbroadcast(dy, x), unbroadcast(dy, y)


@gradient_of("Sub")
def _sub(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, y = op.inputs
    return unbroadcast(dy, x), -unbroadcast(dy, y)


@gradient_of("Mul")
def _mul(op: Operation, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, y = op.inputs
    if not dy.dtype.is_floating:
        return None, None
    return unbroadcast(dy * y, x), unbroadcast(dy * x, y)


@gradient_of("RealDiv")
def _div(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, y = op.inputs
    return unbroadcast(dy / y, x), unbroadcast(-dy * op.outputs[0] / y, y)


@gradient_of("DivNoNan")
def _div_no_nan(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, y = op.inputs
    share = tf.math.divide_no_nan(dy, y)
    return unbroadcast(share, x), unbroadcast(-share * op.outputs[0], y)


@gradient_of("SquaredDifference")
def _squared_difference(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, y = op.inputs
    slope = 2.0 * dy * (x - y)
    return unbroadcast(slope, x), -unbroadcast(slope, y)


@gradient_of("Maximum")
def _maximum(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, y = op.inputs
    first = _step(x >= y, dy)
    return unbroadcast(dy * first, x), unbroadcast(dy * (1.0 - first), y)


@gradient_of("Minimum")
def _minimum(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, y = op.inputs
    first = _step(x <= y, dy)
    return unbroadcast(dy * first, x), unbroadcast(dy * (1.0 - first), y)


@gradient_of("Pow")
def _pow(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    """As in TensorFlow, the exponent has no gradient where x is not positive."""
    x, exponent = op.inputs
    dx = unbroadcast(dy * exponent * tf.pow(x, exponent - 1.0), x)
    if tf.get_static_value(exponent) is not None:
        return dx, None
    logarithms = tf.math.log(tf.where(x > 0.0, x, tf.ones_like(x)))
    return dx, unbroadcast(dy * op.outputs[0] * logarithms, exponent)


@gradient_of("Select", "SelectV2")
def _select(op: Operation, dy: Tensor) -> tuple[None, Tensor, Tensor]:
    condition, x, y = op.inputs
    chosen = _step(condition, dy)
    return None, unbroadcast(dy * chosen, x), unbroadcast(dy * (1.0 - chosen), y)


@gradient_of("ClipByValue")
def _clip(op: Operation, dy: Tensor) -> tuple[Tensor, None, None]:
    x, low, high = op.inputs
    return dy * _step(x >= low, dy) * _step(x <= high, dy), None, None


@gradient_of("BiasAdd")
def _bias_add(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    return dy, tf.reduce_sum(dy, axis=list(range(dy.shape.rank - 1)))


def _axes(op: Operation) -> list[int]:
    rank = op.inputs[0].shape.rank
    return sorted({int(axis) % rank for axis in constant_of(op.inputs[1]).reshape(-1)})


def _spread(op: Operation, values: Tensor) -> Tensor:
    """Return `values`, of the shape of the reduction's result, with the reduced axes back as length 1."""
    axes, lengths = _axes(op), op.inputs[0].shape.as_list()
    kept = [1 if i in axes else length for i, length in enumerate(lengths)]
    if op.get_attr("keep_dims"):
        return values
    if kept.count(None) <= 1:
        return tf.reshape(values, [-1 if length is None else length for length in kept])
    for axis in axes:
        values = tf.expand_dims(values, axis)
    return values


@gradient_of("Sum")
def _sum(op: Operation, dy: Tensor) -> tuple[Tensor, None]:
    return _spread(op, dy) * _ones(op), None


@gradient_of("Mean")
def _mean(op: Operation, dy: Tensor) -> tuple[Tensor, None]:
    x, axes = op.inputs[0], _axes(op)
    lengths = [x.shape[axis] for axis in axes]
    if None in lengths:
        count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), axes)), dy.dtype)
        return _spread(op, dy) * _ones(op) / count, None
    return _spread(op, dy) * (_ones(op) / math.prod(lengths)), None


def _ones(op: Operation) -> Tensor:
    """Return ones that repeat what they are multiplied with along the axes that `op` has reduced.

    Constants wherever the lengths are known: ones_like becomes BROADCAST_TO, which takes twenty times as long.
    """
    axes = _axes(op)
    repeated = [length if axis in axes else 1 for axis, length in enumerate(op.inputs[0].shape.as_list())]
    return tf.ones_like(op.inputs[0]) if None in repeated else tf.ones(repeated, op.inputs[0].dtype)


@gradient_of("Max", "Min")
def _extreme(op: Operation, dy: Tensor) -> tuple[Tensor, None]:
    """Ties share the gradient, as in TensorFlow."""
    x = op.inputs[0]
    hits = _step(tf.equal(x, _spread(op, op.outputs[0])), dy)
    return hits * (_spread(op, dy) / tf.reduce_sum(hits, axis=_axes(op), keepdims=True)), None
