"""A convolutional network for human activity recognition: 128 samples of nine motion channels, 29,830 parameters.

The data are those of Anguita et al. 2013, "A Public Domain Dataset for Human Activity Recognition Using Smartphones".
Nobody adapts the Normalization: its mean and variance are broadcast, and a round of `moments` finds them out without
pooling anybody's measurements.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers


def har() -> Any:
    """Return the model, compiled, with the same first weights at every call: float32 [128, 9] -> six activities."""
    first = keras.initializers.GlorotUniform
    model = keras.Sequential(
        [
            keras.Input((128, 9), name="x"),
            layers.Normalization(),
            layers.Conv1D(32, 9, strides=2, activation="relu", kernel_initializer=first(seed=1), name="conv1"),
            layers.Conv1D(64, 5, strides=2, activation="relu", kernel_initializer=first(seed=2), name="conv2"),
            layers.Conv1D(64, 3, activation="relu", kernel_initializer=first(seed=3), name="conv3"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(64, activation="relu", kernel_initializer=first(seed=4), name="hidden"),
            layers.Dense(6, activation="softmax", kernel_initializer=first(seed=5), name="output"),
        ],
        name="har",
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.08))
    return model
