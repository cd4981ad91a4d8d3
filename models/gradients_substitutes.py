"""Operations that TFLite has no built-in for, written with those it has; their gradients follow from these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from models.gradients_registry import Operation, constant_of, substitute_of
from models.ops import Tensor

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_TWO_OVER_ROOT_PI = 1.1283791670955126
# Press et al., Numerical Recipes, section 6.2 (erfcc): a Chebyshev fit with a relative error below 1.2e-7 everywhere.
_ERFC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)


@substitute_of("IdentityN")
def _identity(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    return [tf.identity(tensor) for tensor in inputs]


@substitute_of("PreventGradient", "Snapshot", "EnsureShape")
def _same(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    return tf.identity(inputs[0])


@substitute_of("Selu")
def _selu(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    x = inputs[0]
    return _SELU_SCALE * (tf.nn.relu(x) + _SELU_ALPHA * (tf.nn.elu(x) - tf.nn.relu(x)))


@substitute_of("Softplus")
def _softplus(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    x = inputs[0]
    return tf.nn.relu(x) + tf.math.log(1.0 + tf.exp(-tf.abs(x)))


@substitute_of("Softsign")
def _softsign(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0] / (1.0 + tf.abs(inputs[0]))


@substitute_of("Reciprocal", "Inv")
def _reciprocal(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    return 1.0 / inputs[0]


@substitute_of("Log1p")
def _log1p(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    return tf.math.log(1.0 + inputs[0])


@substitute_of("Expm1")
def _expm1(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    return tf.exp(inputs[0]) - 1.0


@substitute_of("Erf")
def _erf_of(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    return erf(inputs[0])


@substitute_of("Erfc")
def _erfc_of(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    return 1.0 - erf(inputs[0])


def erf(x: Tensor) -> Tensor:
    """Return the error function, to 2e-7, with its exact derivative 2 / sqrt(pi) * exp(-x^2)."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def function(x: Tensor) -> tuple[Tensor, object]:
        positive = tf.abs(x)
        t = 1.0 / (1.0 + 0.5 * positive)
        exponent = tf.zeros_like(t) + _ERFC[-1]
        for coefficient in reversed(_ERFC[:-1]):
            exponent = exponent * t + coefficient
        tail = t * tf.exp(exponent - positive * positive)
        return tf.sign(x) * (1.0 - tail), lambda dy: dy * _TWO_OVER_ROOT_PI * tf.exp(-x * x)

    return function(x)


@substitute_of("MatrixBandPart")
def _band(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    """A triangle of a constant matrix, such as the causal mask, is made here."""
    matrix, below, above = op.inputs
    rows, columns = matrix.shape[-2:]
    low, high = int(constant_of(below)), int(constant_of(above))
    i, j = np.arange(rows)[:, None], np.arange(columns)[None, :]
    inside = ((i - j <= low) | (low < 0)) & ((j - i <= high) | (high < 0))
    if matrix.dtype == tf.bool:
        return tf.logical_and(inputs[0], tf.constant(inside))
    return inputs[0] * tf.constant(inside.astype(matrix.dtype.as_numpy_dtype))
