"""Transfer learning on pictures: MobileNet of a quarter of the width as a frozen backbone, and a head that learns.

The backbone is that of Howard et al. 2017, "MobileNets" (arXiv 1704.04861): 218,544 parameters that never change and
travel once, in the program, as int8 (`export(..., int8=True)`, `sottovoce export --int8`). The head has 1,285 for five
classes: that is all a device sends. 219,829 parameters together.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras, layers = tf.keras, tf.keras.layers
SIDE = 128


def picture_head(classes: int = 5, weights: str | None = None) -> Any:
    """Return the model, compiled: pixels 0 to 255 as float32 [128, 128, 3] -> `classes`.

    Args:
        classes: How many kinds of picture there are.
        weights: Of the backbone, as keras.applications takes them: `imagenet` (fetched by Keras), a file, or None for
            random ones, with which the head learns less.
    """
    backbone = keras.applications.MobileNet((SIDE, SIDE, 3), alpha=0.25, include_top=False, weights=weights)
    backbone.trainable = False
    model = keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 3), name="x"),
            layers.Rescaling(1 / 127.5, offset=-1),
            backbone,
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.2),
            layers.Dense(classes, activation="softmax", name="head"),
        ],
        name="picture_head",
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.1), metrics=["accuracy"])
    return model
