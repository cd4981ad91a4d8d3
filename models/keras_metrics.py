"""Keras' metrics as sums that travel: what is added up over examples, and divided where the sum is published.

A mean over a fleet is a sum over examples divided by their number, so a metric fits where it is a mean over examples:
accuracy of every kind, mean absolute and mean squared error. Others (AUC, precision) are ratios of other sums; the
model's `infer` role answers them where the examples are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import tensorflow as tf

from models.gradients import CannotTrain
from models.keras_losses import Loss, mean_per_example
from models.ops import Tensor

keras = tf.keras
Measure: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(output, labels) -> float32 [b], one number for each example."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What is summed over the examples of one output.

    Attributes:
        name: `correct`, `absolute_error` or `squared_error`: of the sum, which is no mean yet.
        measure: One number for each example.
    """

    name: str
    measure: Measure


def metrics_of(identifiers: Sequence[Any] | None, loss: Loss) -> tuple[Metric, ...]:
    """Return what Keras' metrics of one output mean as sums.

    Args:
        identifiers: As in `model.compile`: names, objects or functions; None means accuracy if labels are classes.
        loss: The output's loss, which says what its labels are.

    Raises:
        CannotTrain: One is no mean over examples, or does not fit the labels.
    """
    if identifiers is None:
        identifiers = ["accuracy"] if loss.classes else []
    found = [_metric(_kind(identifier), loss) for identifier in identifiers]
    return tuple({metric.name: metric for metric in found}.values())


def _kind(identifier: Any) -> str:
    """Return Keras' name of a metric, whatever its author calls it."""
    if isinstance(identifier, str) and identifier in ("accuracy", "acc"):
        return "accuracy"
    try:
        found = keras.metrics.get(identifier)
    except (ValueError, TypeError) as error:
        raise _unknown(str(identifier)) from error
    if getattr(found, "threshold", 0.5) != 0.5:
        raise CannotTrain("binary accuracy with another threshold than 0.5; leave the threshold out")
    named = type(found) if isinstance(found, keras.metrics.Metric) else found
    # Not by its name: an author's own metric may be called like one of Keras.
    if (kind := next((kind for each, kind in _KINDS if each is named), None)) is None:
        raise _unknown(str(getattr(named, "__name__", identifier)))
    return kind


def _unknown(name: str) -> CannotTrain:
    return CannotTrain(
        f"the metric {name!r} does not travel as a sum over examples; use accuracy, mean_absolute_error or "
        "mean_squared_error, or compute it where the examples are, with the role infer"
    )


def _metric(kind: str, loss: Loss) -> Metric:
    if kind in _ERRORS:
        if loss.is_sparse:
            raise CannotTrain(f"the metric {kind!r} of labels that are class numbers ({loss.kind}); use accuracy")
        name, entries = _ERRORS[kind]
        return Metric(name, lambda output, labels: mean_per_example(entries(output, labels)))
    if not loss.classes:
        raise CannotTrain(f"the metric {kind!r} of an output with the loss {loss.kind}; use mean_absolute_error")
    if kind not in ("accuracy", f"{loss.classes}_accuracy"):
        raise CannotTrain(f"the metric {kind!r} does not fit the labels of the loss {loss.kind}; use accuracy")
    return Metric("correct", lambda output, labels: mean_per_example(_right(loss, output, labels)))


def _right(loss: Loss, output: Tensor, labels: Tensor) -> Tensor:
    """Return float32, 1.0 where a label is right."""
    if loss.classes == "binary":
        hits = tf.equal(output > (0.0 if loss.from_logits else 0.5), labels > 0.5)
    else:
        classes = labels if loss.is_sparse else tf.argmax(labels, axis=-1, output_type=tf.int32)
        hits = tf.equal(tf.argmax(output, axis=-1, output_type=tf.int32), classes)
    return tf.cast(hits, tf.float32)


_ERRORS: Mapping[str, tuple[str, Measure]] = {
    "mean_absolute_error": ("absolute_error", lambda output, labels: tf.abs(output - labels)),
    "mean_squared_error": ("squared_error", lambda output, labels: tf.square(output - labels)),
}
_KINDS: Sequence[tuple[Any, str]] = [
    (getattr(keras.metrics, name), kind)
    for kind, names in {
        "sparse_categorical_accuracy": ("SparseCategoricalAccuracy", "sparse_categorical_accuracy"),
        "categorical_accuracy": ("CategoricalAccuracy", "categorical_accuracy"),
        "binary_accuracy": ("BinaryAccuracy", "binary_accuracy"),
        "mean_absolute_error": ("MeanAbsoluteError", "mae"),
        "mean_squared_error": ("MeanSquaredError", "mse"),
    }.items()
    for name in names
]
"""Keras' class or function, kind."""
