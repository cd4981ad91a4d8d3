"""A one-dimensional convolutional network for human activity recognition: 128 samples of nine motion channels.

The program standardises its own input with the broadcast `mean` and `std`, which a round of `moments` finds out
without pooling anybody's measurements.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from models.export import Model, Tensors, seed_of
from models.ops import Operations, Tensor
from models.zoo.layers import conv1d_weights, dense_weights

SAMPLES, CHANNELS, CLASSES = 128, 9, 6
_SMALLEST_STD = 1e-6


def har() -> Model:
    """Return the model of 29,830 parameters with freshly drawn weights, the same ones at every call."""
    random = np.random.default_rng(seed_of("har"))
    return Model(
        name="har",
        description="Recognises what a person is doing from 128 samples of a phone's accelerometer and gyroscope.",
        features=f"float32[?,{SAMPLES},{CHANNELS}]",
        feature_range=(-2.0, 2.0),
        classes=CLASSES,
        weights={
            **conv1d_weights("conv1", random, taps=9, channels=CHANNELS, filters=32),
            **conv1d_weights("conv2", random, taps=5, channels=32, filters=64),
            **conv1d_weights("conv3", random, taps=3, channels=64, filters=64),
            **dense_weights("hidden", random, inputs=64, outputs=64),
            **dense_weights("output", random, inputs=64, outputs=CLASSES),
        },
        learning_rate=0.08,
        forward=_forward,
        constants={"mean": np.zeros(CHANNELS, np.float32), "std": np.ones(CHANNELS, np.float32)},
        test_constants={
            "mean": np.linspace(-0.5, 0.5, CHANNELS, dtype=np.float32),
            "std": np.linspace(0.5, 1.5, CHANNELS, dtype=np.float32),
        },
    )


def _forward(operations: Operations, weights: Tensors, constants: Tensors, x: Tensor) -> Tensor:
    x = (x - constants["mean"]) / tf.maximum(constants["std"], _SMALLEST_STD)
    for layer, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
        x = operations.relu(operations.conv1d(x, weights[f"{layer}_kernel"], weights[f"{layer}_bias"], stride=stride))
    x = operations.average_over_time(x)
    x = operations.relu(operations.dense(x, weights["hidden_kernel"], weights["hidden_bias"]))
    return operations.dense(x, weights["output_kernel"], weights["output_bias"])
