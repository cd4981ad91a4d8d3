"""First weights of layers: Glorot-uniform kernels, zero biases, from a generator that the caller seeds."""

from __future__ import annotations

import math

import numpy as np

from sottovoce.types import Array


def dense_weights(name: str, random: np.random.Generator, *, inputs: int, outputs: int) -> dict[str, Array]:
    """Return `name`_kernel float32 [inputs, outputs] and `name`_bias float32 [outputs]."""
    return _weights(name, random, shape=(inputs, outputs), fan_in=inputs, fan_out=outputs)


def conv1d_weights(
    name: str, random: np.random.Generator, *, taps: int, channels: int, filters: int
) -> dict[str, Array]:
    """Return `name`_kernel float32 [taps, channels, filters] and `name`_bias float32 [filters]."""
    shape = (taps, channels, filters)
    return _weights(name, random, shape=shape, fan_in=taps * channels, fan_out=taps * filters)


def _weights(
    name: str, random: np.random.Generator, *, shape: tuple[int, ...], fan_in: int, fan_out: int
) -> dict[str, Array]:
    limit = math.sqrt(6 / (fan_in + fan_out))
    return {
        f"{name}_kernel": random.uniform(-limit, limit, shape).astype(np.float32),
        f"{name}_bias": np.zeros(shape[-1], np.float32),
    }
