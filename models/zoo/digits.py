"""A multi-layer perceptron for the digits of scikit-learn, 8x8 pixels of 0 to 16: one hidden layer, 4,810 parameters.

The data are those of Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI, doi 10.24432/C50P49).
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers


def digits() -> Any:
    """Return the model, compiled, with the same first weights at every call: float32 [64] -> ten classes."""
    first = keras.initializers.GlorotUniform
    model = keras.Sequential(
        [
            keras.Input((64,), name="x"),
            layers.Rescaling(1 / 16),
            layers.Dense(64, activation="relu", kernel_initializer=first(seed=1), name="hidden"),
            layers.Dense(10, activation="softmax", kernel_initializer=first(seed=2), name="output"),
        ],
        name="digits",
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.2))
    return model
