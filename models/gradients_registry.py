"""Which graph operations have a gradient or a substitute made of TFLite built-ins, and the shape rules they share.

A module of a family (`gradients_elementwise`, ...) registers with `gradient_of` and `substitute_of`; `models.gradients`
uses what is registered. A gradient is a function (operation, gradient of each output) -> gradient of each input, as
`tf.RegisterGradient` wants it; it may read static shapes, and only the batch may be unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from models.ops import Tensor

Operation: TypeAlias = Any
"""A tf.Operation."""
GradientFunction: TypeAlias = Callable[..., Any]
Substitute: TypeAlias = Callable[[Operation, Sequence[Tensor]], Tensor]
"""(operation of the original graph, its inputs in the new one) -> its one output in the new one."""

GRADIENTS: dict[str, str] = {}
"""Operation type -> name under which its gradient is registered with TensorFlow."""
SUBSTITUTES: dict[str, Substitute] = {}
"""Operation type -> what stands for it, because TFLite has no such built-in."""


def gradient_of(*types: str) -> Callable[[GradientFunction], GradientFunction]:
    """Register the decorated function as the gradient of operations of `types`."""

    def register(function: GradientFunction) -> GradientFunction:
        for kind in types:
            GRADIENTS[kind] = f"Sottovoce{kind}"
            tf.RegisterGradient(GRADIENTS[kind])(function)
        return function

    return register


def substitute_of(*types: str) -> Callable[[Substitute], Substitute]:
    """Register the decorated function as what stands for operations of `types`."""

    def register(function: Substitute) -> Substitute:
        SUBSTITUTES.update(dict.fromkeys(types, function))
        return function

    return register


def constant_of(tensor: Tensor) -> Any:
    """Return the value of a tensor that is known while the graph is made, as a numpy array.

    Raises:
        NotImplementedError: It is computed from the batch; TensorFlow reports the operation.
    """
    value = tf.get_static_value(tensor)
    if value is None:
        raise NotImplementedError(f"{tensor.op.type} {tensor.op.name!r} is not a constant")
    return value


def unbroadcast(gradient: Tensor, like: Tensor) -> Tensor:
    """Return `gradient` summed over the axes along which `like` was repeated.

    Two unknown dimensions are the same batch, and so is an unknown one beside a known one that is not 1.
    """
    missing = gradient.shape.rank - like.shape.rank
    lengths = like.shape.as_list()
    repeated = [i for i, length in enumerate(lengths, missing) if length == 1 and gradient.shape[i] != 1]
    if repeated:
        gradient = tf.reduce_sum(gradient, axis=repeated, keepdims=True)
    return tf.reduce_sum(gradient, axis=list(range(missing))) if missing else gradient


def shape_of(tensor: Tensor) -> Any:
    """Return the shape of `tensor` for a reshape: a list where it is known but for one dimension, else a tensor."""
    lengths = [-1 if length is None else length for length in tensor.shape.as_list()]
    return lengths if lengths.count(-1) <= 1 else tf.shape(tensor)


def reshaped_like(gradient: Tensor, like: Tensor) -> Tensor:
    """Return `gradient`, of as many entries, in the shape of `like`."""
    return tf.reshape(gradient, shape_of(like))
