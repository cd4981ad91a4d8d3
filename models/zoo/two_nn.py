"""The 2NN of McMahan et al. 2017 (arXiv 1602.05629): MNIST, two hidden layers of 200, 199,210 parameters."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers


def two_nn() -> Any:
    """Return the model, compiled: pixels 0 to 1 as float32 [28, 28] -> ten classes."""
    model = keras.Sequential(
        [
            keras.Input((28, 28), name="x"),
            layers.Flatten(),
            layers.Dense(200, activation="relu"),
            layers.Dense(200, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ],
        name="two_nn",
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.1))
    return model
