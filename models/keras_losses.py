"""Keras' losses in TFLite built-ins: the loss of every example, and the label's port.

A `Loss` reads what a Keras loss object says of itself (`from_logits`, `label_smoothing`, `delta`). As Keras does, a
softmax or sigmoid at the end of the model is undone: the loss starts from the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import tensorflow as tf

from models.gradients import CannotTrain
from models.keras_tracing import source_of
from models.ops import BuiltIns, Tensor
from sottovoce.bundle import Port

keras = tf.keras
_EPSILON = 1e-7
_Formula: TypeAlias = Callable[["Loss", Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """One output's loss.

    Attributes:
        kind: Key of LOSSES.
        keras: Keras' own object, for the reference.
        from_logits: The output is not yet probabilities.
        smoothing: Share of a label that is spread over all classes.
        delta: Where Huber's loss becomes linear.
        weight: Of this output among several.
    """

    kind: str
    keras: Any
    from_logits: bool = False
    smoothing: float = 0.0
    delta: float = 1.0
    weight: float = 1.0

    @property
    def is_sparse(self) -> bool:
        """Whether a label is a class's number."""
        return self.kind == "sparse_categorical_crossentropy"

    def label(self, name: str, output: Any) -> Port:
        """Return the port of the labels of `output`, a symbolic tensor of the model."""
        lengths = ["?" if i == 0 else str(length) for i, length in enumerate(output.shape)]
        if not self.is_sparse:
            return Port(name=name, type=f"float32[{','.join(lengths)}]")
        if output.shape.rank < 2 or output.shape[-1] < 2:
            raise CannotTrain(
                f"the loss {self.kind!r} needs a score for each class, and the output has the shape {output.shape}; "
                "use Dense(number of classes), or binary_crossentropy"
            )
        return Port(name=name, type=f"int32[{','.join(lengths[:-1])}]", low=0, high=int(output.shape[-1]) - 1)

    def per_example(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return float32 [b]: the mean over everything but the batch, times the output's weight.

        Args:
            output: The model's output in the replayed graph.
            labels: As `label` says.
        """
        source = source_of(output)
        is_logits = self.from_logits
        if not is_logits and source.op.type in ("Softmax", "Sigmoid") and "crossentropy" in self.kind:
            output, is_logits = source.op.inputs[0], True
        return self.weight * mean_per_example(LOSSES[self.kind](self, output, labels, is_logits))


def mean_per_example(entries: Tensor) -> Tensor:
    """Return float32 [b]: the mean of each example's entries."""
    return tf.reduce_mean(entries, axis=list(range(1, entries.shape.rank))) if entries.shape.rank > 1 else entries


def loss_of(identifier: Any, weight: float = 1.0) -> Loss:
    """Return what a Keras loss (a name, an object or a function of keras.losses) means.

    Args:
        identifier: As in `model.compile`, of one output.
        weight: Of this output among several.

    Raises:
        CannotTrain: It is not one of LOSSES.
    """
    try:
        found = keras.losses.get(identifier)
    except (ValueError, TypeError) as error:
        raise CannotTrain(f"the loss {identifier!r} is not among {', '.join(LOSSES)}; use one of them") from error
    kind = str(getattr(found, "name", None) or getattr(found, "__name__", found))
    kind = "huber" if kind == "huber_loss" else kind
    if kind not in LOSSES:
        raise CannotTrain(f"the loss {kind!r} is not among {', '.join(LOSSES)}; use one of them")
    settings = found.get_config() if isinstance(found, keras.losses.Loss) else {}
    if settings.get("reduction", "mean") not in ("mean", "sum_over_batch_size"):
        raise CannotTrain(
            f"the loss {kind!r} with reduction={settings['reduction']!r}; leave it out: devices take the mean"
        )
    settings |= getattr(found, "_fn_kwargs", {})  # Huber's own configuration forgets its delta.
    if settings.get("ignore_class") is not None or settings.get("axis", -1) not in (-1, None):
        raise CannotTrain(f"the loss {kind!r} with ignore_class or another axis than the last; leave both out")
    wrapped = (
        found
        if isinstance(found, keras.losses.Loss)
        else keras.losses.get({"class_name": _CLASSES[kind], "config": {}})
    )
    return Loss(
        kind=kind,
        keras=wrapped,
        from_logits=bool(settings.get("from_logits", False)),
        smoothing=float(settings.get("label_smoothing", 0.0)),
        delta=float(settings.get("delta", 1.0)),
        weight=weight,
    )


def _sparse(loss: Loss, output: Tensor, labels: Tensor, is_logits: bool) -> Tensor:
    logits = output if is_logits else tf.math.log(_clip(output))
    classes = logits.shape[-1]
    flat = BuiltIns().softmax_cross_entropy(tf.reshape(logits, [-1, classes]), tf.reshape(labels, [-1]))
    lengths = [-1 if length is None else length for length in labels.shape.as_list()]
    return tf.reshape(flat, lengths)


def _categorical(loss: Loss, output: Tensor, labels: Tensor, is_logits: bool) -> Tensor:
    labels = labels * (1.0 - loss.smoothing) + loss.smoothing / output.shape[-1]
    if is_logits:
        shifted = output - tf.stop_gradient(tf.reduce_max(output, axis=-1, keepdims=True))
        logs = shifted - tf.math.log(tf.reduce_sum(tf.exp(shifted), axis=-1, keepdims=True))
    else:
        logs = tf.math.log(_clip(output / tf.reduce_sum(output, axis=-1, keepdims=True)))
    return -tf.reduce_sum(labels * logs, axis=-1)


def _binary(loss: Loss, output: Tensor, labels: Tensor, is_logits: bool) -> Tensor:
    labels = labels * (1.0 - loss.smoothing) + 0.5 * loss.smoothing
    if is_logits:
        return tf.nn.relu(output) - output * labels + tf.math.log(1.0 + tf.exp(-tf.abs(output)))
    output = _clip(output)
    return -(labels * tf.math.log(output) + (1.0 - labels) * tf.math.log(1.0 - output))


def _squared(loss: Loss, output: Tensor, labels: Tensor, is_logits: bool) -> Tensor:
    return tf.square(output - labels)


def _absolute(loss: Loss, output: Tensor, labels: Tensor, is_logits: bool) -> Tensor:
    return tf.abs(output - labels)


def _huber(loss: Loss, output: Tensor, labels: Tensor, is_logits: bool) -> Tensor:
    away = tf.abs(output - labels)
    inner = tf.minimum(away, loss.delta)
    return 0.5 * inner * inner + loss.delta * (away - inner)


def _clip(probabilities: Tensor) -> Tensor:
    return tf.minimum(tf.maximum(probabilities, _EPSILON), 1.0 - _EPSILON)


LOSSES: Mapping[str, _Formula] = {
    "sparse_categorical_crossentropy": _sparse,
    "categorical_crossentropy": _categorical,
    "binary_crossentropy": _binary,
    "mean_squared_error": _squared,
    "mean_absolute_error": _absolute,
    "huber": _huber,
}
"""Keras' name of a loss -> (loss, output, labels, whether the output is logits) -> losses, the first axis the batch."""
_CLASSES = {
    "sparse_categorical_crossentropy": "SparseCategoricalCrossentropy",
    "categorical_crossentropy": "CategoricalCrossentropy",
    "binary_crossentropy": "BinaryCrossentropy",
    "mean_squared_error": "MeanSquaredError",
    "mean_absolute_error": "MeanAbsoluteError",
    "huber": "Huber",
}
