"""What Keras itself makes of a few training steps: the reference of a bundle's self-test.

The model is called as `train_on_batch` calls it, eagerly, with a GradientTape, Keras' losses and Keras' optimizer.
Only where the model draws random numbers is its recorded graph run instead, with TensorFlow's own gradients, because
the masks must be those that the device computes. The model's weights are put back afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from models.gradients import CannotTrain
from models.keras_inputs import packed
from models.keras_tracing import follow_moments, frozen_variables, told, unrolled
from models.keras_training import Training, forward
from models.ops import Tensor
from models.program_export import DELTA, Arrays
from sottovoce.types import Array

Slopes: TypeAlias = tuple[list[Array], list[Array], float]
"""Gradients of the trained weights, the model's outputs, and the mean loss without penalties."""


def reference_of(
    training: Training, broadcast: Arrays, batches: Sequence[Arrays], *, corrections: Arrays = MappingProxyType({})
) -> dict[str, Array]:
    """Return every result port and every metric, summed over `batches`, after one step on each.

    Args:
        training: The model.
        broadcast: One array for each broadcast port.
        batches: What `step` is fed.
        corrections: What is added to the gradient of a weight in every step, by the weight's name.
    """
    traced = training.traced
    learned = {**traced.trained, **traced.statistics}
    optimizer = type(training.optimizer.keras).from_config(training.optimizer.keras.get_config())
    optimizer.learning_rate = float(broadcast["learning_rate"][0])
    totals = dict.fromkeys(training.metrics, 0.0)
    gradients = _recorded(training) if traced.is_random else _eager(training)
    with broadcasted(training, broadcast):
        for step, batch in enumerate(batches):
            try:
                slopes, outputs, loss = gradients(batch, step)
            except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, tf.errors.OpError) as error:
                raise CannotTrain(f"Keras itself cannot train this model on this machine: {told(error)}") from error
            for name, value in _counted(training, outputs, batch, loss).items():
                totals[name] += value
            before = [broadcast[name] for name in traced.trained]
            slopes = [
                slope + training.proximal * (variable.numpy() - first) + corrections.get(name, 0.0)
                for slope, (name, variable), first in zip(slopes, traced.trained.items(), before, strict=True)
            ]
            optimizer.apply([tf.constant(slope, tf.float32) for slope in slopes], list(traced.trained.values()))
        deltas = {DELTA + name: variable.numpy() - broadcast[name] for name, variable in learned.items()}
    return {**deltas, **{name: np.array([total], np.float32) for name, total in totals.items()}}


def scores_in_keras(training: Training, broadcast: Arrays, batch: Arrays) -> dict[str, float]:
    """Return every metric of the model as it is in use (not training), summed over `batch`."""
    with broadcasted(training, broadcast):
        features = [tf.constant(batch[port.name]) for port in training.traced.features]
        outputs = tf.nest.flatten(training.traced.model(packed(training.traced.model, features), training=False))
        loss = float(_loss(training, outputs, batch))
        return _counted(training, [output.numpy() for output in outputs], batch, loss)


@contextlib.contextmanager
def broadcasted(training: Training, broadcast: Arrays) -> Iterator[None]:
    """While it lasts the model's weights are those of `broadcast`, and may change; afterwards they are as before."""
    model, traced = training.traced.model, training.traced
    small = frozen_variables(traced)
    with borrowed(model):
        for name, variable in {**traced.trained, **traced.statistics, **traced.given}.items():
            variable.assign(broadcast[name])
        for name, variable in small.items():
            variable.assign(traced.rounded[name].value)
        follow_moments(model)
        yield


@contextlib.contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """While it lasts the weights of `model` may change; afterwards they are what they were."""
    before = [variable.numpy() for variable in model.variables]
    try:
        yield
    finally:
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)
        follow_moments(model)


def _eager(training: Training) -> Callable[[Arrays, int], Slopes]:
    model, trained = training.traced.model, list(training.traced.trained.values())

    def gradients(batch: Arrays, step: int) -> Slopes:
        features = [tf.constant(batch[port.name]) for port in training.traced.features]
        with unrolled(model), tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(packed(model, features), training=True))
            loss = _loss(training, outputs, batch)
            total = tf.add_n([loss, *model.losses])
        found = tape.gradient(total, [variable.value for variable in trained], unconnected_gradients="zero")
        slopes = [tf.convert_to_tensor(slope).numpy() for slope in found]
        return slopes, [output.numpy() for output in outputs], float(loss)

    return gradients


def _recorded(training: Training) -> Callable[[Arrays, int], Slopes]:
    traced = training.traced

    @tf.function(autograph=False, reduce_retracing=True)  # type: ignore[untyped-decorator]
    def graph(weights: Mapping[str, Tensor], others: Mapping[str, Tensor], batch: Any, step: Tensor) -> Any:
        found = forward(training, {**weights, **others}, batch, step, is_training=True, as_it_is=True)
        loss = _loss(training, found.outputs, batch)
        total = loss if found.penalty is None else loss + found.penalty
        slopes = tf.gradients(total, list(weights.values()), unconnected_gradients="zero")
        return slopes, found.outputs, found.statistics, loss

    def gradients(batch: Arrays, step: int) -> Slopes:
        weights, others = (
            {name: tf.constant(variable.numpy()) for name, variable in part.items()}
            for part in (traced.trained, {**traced.statistics, **traced.given})
        )
        arrays = {name: tf.constant(value) for name, value in batch.items()}
        slopes, outputs, moved, loss = graph(weights, others, arrays, tf.constant([float(step)]))
        for name, value in moved.items():
            traced.statistics[name].assign(value)
        found = [tf.convert_to_tensor(slope).numpy() for slope in slopes]
        return found, [output.numpy() for output in outputs], float(loss)

    return gradients


def _loss(training: Training, outputs: Sequence[Tensor], batch: Mapping[str, Any]) -> Tensor:
    triples = zip(training.losses, outputs, training.labels, strict=True)
    return tf.add_n([loss.weight * loss.keras(batch[port.name], output) for loss, output, port in triples])


def _counted(training: Training, outputs: Sequence[Array], batch: Arrays, loss: float) -> dict[str, float]:
    """Return the metrics of one batch, summed over it."""
    found = training.measures([tf.constant(output) for output in outputs], batch)
    size = len(next(iter(batch.values())))
    return dict(zip(training.metrics, [loss * size, *(float(each.numpy().sum()) for each in found)], strict=True))
