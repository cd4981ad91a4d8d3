"""Casts of real numbers to whole ones, which cannot say NaN: what they were given is noticed beside them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import tensorflow as tf

from models.ops import Tensor
from sottovoce.language.expressions import Body, Builtin, Composite, LocalFunction
from sottovoce.values import leaves

Casts: TypeAlias = list[Tensor]
"""What one walk over steps has noticed, cast by cast: float32 [1], 0 or NaN."""


def has_casts(body: Body) -> bool:
    """Say whether a function of `body` casts real numbers to whole ones or truth values."""
    return any(casts_reals(function) for step in body.steps for function in step.functions)


def casts_reals(function: LocalFunction) -> bool:
    """Say whether `function` does, however deep inside; what TensorFlow's own casts in it do is not looked at."""
    match function:
        case Builtin(name="cast"):
            pairs = zip(leaves(function.parameter), leaves(function.result), strict=True)
            return any(loses_nan(tf.as_dtype(given.dtype), made.dtype) for (_, given), (_, made) in pairs)
        case Composite():
            return has_casts(function.body)
        case _:
            return False


def loses_nan(given: tf.DType, made: str) -> bool:
    """Say whether a cast between these dtypes makes a number of NaN."""
    return bool(given.is_floating) and not tf.as_dtype(made).is_floating


def not_finite(tensor: Tensor) -> Tensor:
    """Return 0, or NaN where an entry of `tensor` is NaN or infinite; float32 [1]."""
    # By a comparison: what multiplies by 0 or subtracts a value from itself, converters may simplify.
    wrong = tf.where(tf.abs(tensor) <= tensor.dtype.max, tf.constant(0, tf.float32), tf.constant(np.nan, tf.float32))
    return tf.reshape(tf.reduce_sum(wrong), [1])


def noticed(casts: Casts) -> Tensor:
    """Return 0, or NaN if one of `casts` is NaN; float32 [1]."""
    return tf.add_n(casts) if casts else tf.zeros([1])
