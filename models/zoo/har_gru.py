"""A recurrent network for human activity recognition: 32 steps of four samples each, GRU of 48, 12,678 parameters.

The data are those of Anguita et al. 2013, "A Public Domain Dataset for Human Activity Recognition Using Smartphones".
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers


def har_gru() -> Any:
    """Return the model, compiled: standardised motion, float32 [128, 9] -> six activities."""
    model = keras.Sequential(
        [
            keras.Input((128, 9), name="x"),
            layers.Reshape((32, 36)),
            layers.GRU(48),
            layers.Dense(6, activation="softmax"),
        ],
        name="har_gru",
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.1))
    return model
