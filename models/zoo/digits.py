"""A small multi-layer perceptron for the 8x8 digits of scikit-learn; pixels 0 to 16 are scaled inside the program."""

from __future__ import annotations

import numpy as np

from models.export import Model, Tensors, seed_of
from models.ops import Operations, Tensor
from models.zoo.layers import dense_weights

PIXELS, CLASSES, HIDDEN = 64, 10, 64


def digits(*, hidden: int = HIDDEN) -> Model:
    """Return the model 64 -> `hidden` -> 10 with freshly drawn weights, the same ones at every call."""
    random = np.random.default_rng(seed_of("digits"))
    return Model(
        name="digits",
        description="Recognises handwritten digits (8x8 pixels, values 0 to 16).",
        features=f"float32[?,{PIXELS}]",
        feature_range=(0.0, 16.0),
        classes=CLASSES,
        weights={
            **dense_weights("hidden", random, inputs=PIXELS, outputs=hidden),
            **dense_weights("output", random, inputs=hidden, outputs=CLASSES),
        },
        learning_rate=0.2,
        forward=_forward,
        constants={},
        test_constants={},
    )


def _forward(operations: Operations, weights: Tensors, constants: Tensors, x: Tensor) -> Tensor:
    hidden = operations.relu(operations.dense(x / 16.0, weights["hidden_kernel"], weights["hidden_bias"]))
    return operations.dense(hidden, weights["output_kernel"], weights["output_bias"])
