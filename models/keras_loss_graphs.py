"""Losses of Keras that have no formula here, and those of an author: recorded as a model is, and made of built-ins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from models.gradients import RANDOM, CannotTrain, needed, replay, slopes
from models.gradients_registry import NoGradient
from models.keras_tracing import told
from models.lint import blocked
from models.ops import Tensor

_OTHERWISE = "write it with keras.ops as a function of (labels, output) with one number for each example"


@dataclass(frozen=True, slots=True)
class LossGraph:
    """A loss as Keras computes it.

    Attributes:
        labels: Name of the tensor that stands for the labels, of the output's shape.
        output: Likewise for the model's output.
        constants: What it reads besides, by the names of tensors.
        entries: What it gives before the mean is taken, the first axis the batch.
    """

    labels: str
    output: str
    constants: Mapping[str, Any]
    entries: Tensor

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the loss in the current graph, the first axis the batch."""
        constants = {name: tf.constant(value) for name, value in self.constants.items()}
        return replay([self.entries], {**constants, self.labels: labels, self.output: output}, uniform=_none)[0]


def _none(shape: Tensor, lengths: Sequence[int | None], made: int) -> Tensor:
    raise AssertionError("a loss that draws random numbers was let through")


def record_loss(loss: Any, name: str, shape: Sequence[int | None]) -> LossGraph:
    """Return a Keras loss as a graph whose gradient devices have.

    Args:
        loss: A keras.losses.Loss.
        name: Of it, for errors.
        shape: Of the model's output; labels have the same.

    Raises:
        CannotTrain: It wants other labels, couples the examples of a batch into one number, or makes operations that
            devices lack.
    """
    spec = tf.TensorSpec([None, *shape[1:]], tf.float32)
    try:
        traced = tf.function(loss.call, autograph=False).get_concrete_function(spec, spec).graph
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, tf.errors.OpError) as error:
        raise CannotTrain(
            f"the loss {name!r} cannot be computed from float labels of the output's shape: {told(error)}; {_OTHERWISE}"
        ) from error
    entries = traced.structured_outputs
    if not tf.is_tensor(entries) or entries.dtype != tf.float32 or not entries.shape.rank or entries.shape[0]:
        raise CannotTrain(
            f"the loss {name!r} gives one number for a whole batch; return one for each example, as "
            "keras.ops.mean(..., axis=-1) does (Dice and Tversky: axis)"
        )
    constants = {inside.name: outside.numpy() for outside, inside in traced.captures if outside.dtype != tf.resource}
    labels, output = (tensor.name for tensor in traced.inputs[:2])
    found = LossGraph(labels, output, constants, entries)
    _hold(found, name, spec)
    return found


def _hold(found: LossGraph, name: str, spec: Any) -> None:
    """Raise CannotTrain where a device cannot follow `found`."""
    operations = needed([found.entries])
    reason = blocked(operations, varying={found.labels, found.output}, learned={found.output})
    if any(op.type in RANDOM for op in operations):
        reason = "it draws random numbers", "put them into a layer"
    if reason is None:
        with tf.Graph().as_default():
            output, labels = (tf.compat.v1.placeholder(tf.float32, spec.shape) for _ in range(2))
            try:
                slopes(found(output, labels), [output])
            except CannotTrain as error:
                if not isinstance(error.__cause__, NoGradient):
                    raise
                reason = error.__cause__.problem, error.__cause__.cure or _OTHERWISE
    if reason is not None:
        raise CannotTrain(f"the loss {name!r} does not run on devices: {reason[0]}; {reason[1]}")
