"""Frozen weights as int8: a quarter of the bytes for what a program carries along and never trains.

A kernel is rounded symmetrically, with one scale for each output channel (Jacob et al. 2018, arXiv 1712.05877, section
2.1 with zero point 0), and made float32 again where it is used, so that everything computes in float32 as before.
Keras' answer, which the bundle is held against, is that of the rounded weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from models.ops import Tensor
from sottovoce.types import Array

SMALLEST = 1024
"""Weights of fewer entries are left as they are."""
_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Int8:
    """A rounded weight.

    Attributes:
        whole: int8, the weight's shape.
        scales: float32, broadcasts: weight = whole * scales.
    """

    whole: Array
    scales: Array

    @property
    def value(self) -> Array:
        """The rounded weight, float32."""
        return (self.whole.astype(np.float32) * self.scales).astype(np.float32)

    def tensor(self, anything: Tensor) -> Tensor:
        """Return the weight, made float32 when the program runs.

        Args:
            anything: An input of the program, float32[1]; nothing is read of it, but the converter cannot know, and so
                does not compute the float32 weight itself and store that.
        """
        nothing = tf.cast(tf.minimum(tf.abs(anything), 0.0), tf.int32)
        rows = tf.gather(tf.constant(self.whole), tf.range(len(self.whole)) + nothing)
        return tf.cast(rows, tf.float32) * tf.constant(self.scales)


def rounded(value: Array) -> Int8 | None:
    """Return `value` as int8, None where it is too small to be worth it or no float32 kernel."""
    if value.dtype != np.float32 or value.ndim < 2 or value.size < SMALLEST:
        return None
    # A depthwise kernel [h, w, channels, 1] has its output channels in the last axis but one.
    kept = value.ndim - (2 if value.shape[-1] == 1 else 1)
    scales = np.abs(value).max(axis=tuple(range(kept)), keepdims=True) / _LARGEST
    scales = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
    return Int8(np.rint(value / scales).astype(np.int8), scales)
