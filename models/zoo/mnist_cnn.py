"""The CNN of McMahan et al. 2017 (arXiv 1602.05629): MNIST, two convolutions of 5x5, 1,663,370 parameters."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers


def mnist_cnn() -> Any:
    """Return the model, compiled: pixels 0 to 1 as float32 [28, 28] -> ten classes."""
    model = keras.Sequential(
        [
            keras.Input((28, 28), name="x"),
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(32, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(512, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ],
        name="mnist_cnn",
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.1))
    return model
