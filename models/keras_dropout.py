"""Dropout masks without a random generator: a hash of the batch, the step and the place, in TFLite built-ins.

TFLite's random operations cannot be repeated, so a mask is computed: MiMC (Albrecht et al. 2016), x -> (x + key)^3
modulo the prime p = 46337, whose squares fit into int32 and for which cubing is a permutation. The key of a row is made
of the batch's own values, the number of the step and the row's number; keys of the places within a row are constants.
So a device gets other masks than its neighbour, and other ones in every epoch, since batches are shuffled anew; the
same batch at the same step gives the same mask everywhere, which is what a self-test needs. Nothing has to be fed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from models.gradients import Uniform
from models.ops import Tensor

PRIME = 46337
_ROUNDS = 5
_STEP_PERIOD = 46_000
_SCALE = 1024.0
"""Floats enter the key as integer multiples of 1 / 1024, modulo p; all of this is exact on every machine."""


def uniform_of(batch: Sequence[Tensor], step: Tensor) -> Uniform:
    """Return a maker of tensors in [0, 1) that are a function of `batch` and `step`.

    Args:
        batch: The features of a batch, [b, ...] each.
        step: Steps made before, float32[1].
    """

    @functools.cache
    def seed() -> Tensor:
        found = tf.cast(tf.math.floormod(step, float(_STEP_PERIOD)), tf.int32)
        for values in batch:
            found = _mixed(found, _digest(values))
        return found

    def uniform(shape: Tensor, lengths: Sequence[int | None], made: int) -> Tensor:
        rows = tf.range(shape[0]) if lengths[0] is None else tf.range(lengths[0])
        first, second = (
            _mixed(_mixed(seed(), tf.constant([made * 2 + half])), tf.math.floormod(rows, PRIME)) for half in (0, 1)
        )
        column = [-1, *[1] * (len(lengths) - 1)]
        hashed = _cube(tf.reshape(first, column) + _places(lengths[1:], made * 2))
        hashed = _cube(tf.reshape(second, column) + hashed + _places(lengths[1:], made * 2 + 1))
        return tf.cast(hashed, tf.float32) * (1.0 / PRIME)

    return uniform


def _digest(values: Tensor) -> Tensor:
    """Return one number in [0, p) for a batch, the same in every order of its entries: int32[1]."""
    whole = tf.floor(values * _SCALE) if values.dtype.is_floating else tf.cast(values, tf.float32)
    rest = tf.cast(tf.math.floormod(whole, float(PRIME)), tf.int32)
    flat = tf.reshape(rest, [tf.shape(values)[0], -1])
    # Rows first: the sum of a row stays below 2^31 for 46,000 entries, and that of rows below it for as many.
    return tf.math.floormod(
        tf.reduce_sum(_cube(tf.math.floormod(tf.reduce_sum(flat, axis=1), PRIME)), axis=0, keepdims=True), PRIME
    )


def _mixed(key: Tensor, value: Tensor) -> Tensor:
    """Return a hash of two tensors of numbers in [0, p), which broadcast."""
    for constant in np.random.default_rng(_ROUNDS).integers(PRIME, size=_ROUNDS):
        value = _cube(value + key + int(constant))
    return value


def _cube(x: Tensor) -> Tensor:
    x = tf.math.floormod(x, PRIME)
    return tf.math.floormod(tf.math.floormod(x * x, PRIME) * x, PRIME)


def _places(lengths: Sequence[int | None], number: int) -> Tensor:
    """Return the key of every place within a row, a sum of one for each axis: int32 [1, ...] in [0, p * axes)."""
    random = np.random.default_rng([PRIME, number])
    total = tf.zeros([1] * (len(lengths) + 1), tf.int32)
    for axis, length in enumerate(lengths):
        if length is None:
            raise NotImplementedError("a dropout whose mask has an unknown length beside the batch")
        key = random.integers(PRIME, size=length, dtype=np.int32)
        total = total + tf.reshape(tf.constant(key), [1] * (axis + 1) + [length] + [1] * (len(lengths) - axis - 1))
    return total
