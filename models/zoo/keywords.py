"""Keyword spotting on log-mel frames: the DS-CNN of Zhang et al. 2017, "Hello Edge" (arXiv 1711.07128), size S."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers

FRAMES, BANDS, KEYWORDS = 49, 10, 12


def keywords() -> Any:
    """Return the model, compiled: log-mel energies, float32 [49, 10, 1] -> twelve classes. 24,332 parameters."""
    first = layers.Conv2D(64, (10, 4), strides=(2, 2), padding="same", use_bias=False)
    stack = [keras.Input((FRAMES, BANDS, 1), name="x"), first, layers.BatchNormalization(), layers.ReLU()]
    for _ in range(4):
        stack += [layers.DepthwiseConv2D(3, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU()]
        stack += [layers.Conv2D(64, 1, use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    stack += [layers.GlobalAveragePooling2D(), layers.Dropout(0.2), layers.Dense(KEYWORDS, activation="softmax")]
    model = keras.Sequential(stack, name="keywords")
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.05, momentum=0.9))
    return model
