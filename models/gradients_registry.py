"""Which graph operations have a gradient or a substitute made of TFLite built-ins, and the shape rules they share.

A module of a family (`gradients_elementwise`, ...) registers with `gradient_of` and `substitute_of`; `models.gradients`
uses what is registered. A gradient is a function (operation, gradient of each output) -> gradient of each input, as
`tf.RegisterGradient` wants it; it may read static shapes, and only the batch may be unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
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


class NoGradient(NotImplementedError):
    """An operation has no gradient here because of how it is used.

    Attributes:
        operation: Its name.
        problem: What it does.
        cure: What to do instead; empty where nothing special is known.
    """

    def __init__(self, op: Operation, problem: str, cure: str = "") -> None:
        super().__init__(f"{op.name}: {problem}")
        self.operation, self.problem, self.cure = str(op.name), f"{op.type} {problem}", cure


def constant_of(tensor: Tensor) -> Any:
    """Return the value of a tensor that is known while the graph is made, as a numpy array.

    Raises:
        NoGradient: It is computed from the batch.
    """
    value = tf.get_static_value(tensor)
    if value is not None:
        return value
    folded, op = _FOLDED.get(tensor.op.type), tensor.op
    if folded is None:
        raise NoGradient(op, "computes from the batch what must be known beforehand", "use a constant")
    return np.asarray(folded(*(constant_of(each) for each in op.inputs))).astype(tensor.dtype.as_numpy_dtype)


def is_constant(tensor: Tensor) -> bool:
    """Return whether `constant_of` knows the value of `tensor`."""
    known = tf.get_static_value(tensor) is not None
    return known or (tensor.op.type in _FOLDED and all(is_constant(each) for each in tensor.op.inputs))


_FOLDED: Mapping[str, Callable[..., Any]] = {
    "AddV2": np.add,
    "ConcatV2": lambda *parts: np.concatenate(parts[:-1], axis=int(parts[-1])),
    "Cast": np.asarray,
    "Ceil": np.ceil,
    "Equal": np.equal,
    "Floor": np.floor,
    "Identity": np.asarray,
    "Minimum": np.minimum,
    "Mul": np.multiply,
    "Pack": lambda *parts: np.stack(parts),
    "Range": np.arange,
    "RealDiv": np.divide,
    "SelectV2": np.where,
    "Sub": np.subtract,
}
"""What TensorFlow does not compute by itself while a graph is made, and axes and fixed places are made of."""


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
