"""A small transformer that predicts the next word: 2,004 words, two blocks of width 64, 359,892 parameters.

Blocks as in Vaswani et al. 2017 (arXiv 1706.03762), with the normalisation first (Xiong et al. 2020, arXiv 2002.04745).
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers

WORDS, WIDTH, HEADS = 2004, 64, 4


class Positions(tf.keras.layers.Layer):  # type: ignore[misc]
    """Adds a learned vector for every place of a sequence."""

    def build(self, shape: Any) -> None:
        """Make the vectors: one for each place."""
        self.vectors = self.add_weight(shape=shape[1:], initializer="uniform", name="vectors")

    def call(self, x: Any) -> Any:
        """Return x with the vectors added: [b, places, width]."""
        return x + self.vectors


def next_word(*, length: int = 20) -> Any:
    """Return the model, compiled: words as int32 [length] -> the next one after each."""
    words = keras.Input((length,), dtype="int32", name="x")
    x = Positions()(layers.Embedding(WORDS, WIDTH)(words))
    for _ in range(2):
        normal = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(normal, normal, use_causal_mask=True)])
        hidden = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(WIDTH)(hidden)])
    scores = layers.Dense(WORDS)(layers.LayerNormalization()(x))
    model = keras.Model(words, scores, name="next_word")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, optimizer=keras.optimizers.Adam(1e-3))
    return model
