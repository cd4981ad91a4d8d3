"""The character model of McMahan et al. 2017 (arXiv 1602.05629): two LSTMs of 256 over 80 characters.

With the alphabet of 90 of Reddi et al. 2021 (arXiv 2003.00295) it has 820,522 parameters.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers

CHARACTERS = 90


def character_lstm(*, length: int = 80) -> Any:
    """Return the model, compiled: characters as int32 [length] -> the next one after each.

    Args:
        length: Characters of one example. The recurrence is unrolled on devices: the program grows with it.
    """
    model = keras.Sequential(
        [
            keras.Input((length,), dtype="int32", name="x"),
            layers.Embedding(CHARACTERS, 8),
            layers.LSTM(256, return_sequences=True),
            layers.LSTM(256, return_sequences=True),
            layers.Dense(CHARACTERS),
        ],
        name="character_lstm",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, optimizer=keras.optimizers.SGD(1.0))
    return model
