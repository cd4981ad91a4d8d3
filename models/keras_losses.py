"""Keras' losses in TFLite built-ins: the loss of every example, and the label's port.

A `Loss` reads what a Keras loss object says of itself (`from_logits`, `label_smoothing`, `delta`). As Keras does, a
softmax or sigmoid at the end of the model is undone: the loss starts from the logits. Every other loss, an author's own
included, is recorded (`models.keras_loss_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import tensorflow as tf

from models.gradients import CannotTrain
from models.keras_loss_graphs import LossGraph, record_loss
from models.keras_tracing import source_of
from models.ops import Tensor, softmax_cross_entropy
from sottovoce.bundle import Port

keras = tf.keras
_EPSILON = 1e-7
_PROBABILITIES = ("Softmax", "Sigmoid")
"""Operations that Keras undoes at the end of a model, whatever a cross-entropy says of its `from_logits`."""
_Formula: TypeAlias = Callable[["Loss", Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """One output's loss.

    Attributes:
        kind: Key of LOSSES, or Keras' or the author's name of another one.
        keras: Keras' own object, for the reference.
        graph: Of a loss that is not in LOSSES, what Keras makes of it.
        classes: Of which kind of accuracy labels are: `sparse_categorical`, `categorical`, `binary`, or empty.
        from_logits: The output is not yet probabilities.
        smoothing: Share of a label that is spread over all classes.
        delta: Where Huber's loss becomes linear.
        weight: Of this output among several.
    """

    kind: str
    keras: Any
    graph: LossGraph | None = None
    classes: str = ""
    from_logits: bool = False
    smoothing: float = 0.0
    delta: float = 1.0
    weight: float = 1.0

    @property
    def is_sparse(self) -> bool:
        """Whether a label is a class's number."""
        return self.classes == "sparse_categorical"

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
        if self.graph is not None:
            return self.weight * mean_per_example(self.graph(output, labels))
        source = source_of(output)
        is_logits = self.from_logits
        if source.op.type in _PROBABILITIES and self.classes:
            output, is_logits = source.op.inputs[0], True
        return self.weight * mean_per_example(LOSSES[self.kind](self, output, labels, is_logits))


def mean_per_example(entries: Tensor) -> Tensor:
    """Return float32 [b]: the mean of each example's entries."""
    return tf.reduce_mean(entries, axis=list(range(1, entries.shape.rank))) if entries.shape.rank > 1 else entries


def loss_of(identifier: Any, output: Any, weight: float = 1.0) -> Loss:
    """Return what a Keras loss (a name, an object or a function) means.

    Args:
        identifier: As in `model.compile`, of one output.
        output: A symbolic tensor of the model.
        weight: Of this output among several.

    Raises:
        CannotTrain: Devices cannot follow it; the text names it and the cure.
    """
    found = _keras_loss(identifier)
    settings, name = _settings(found), str(found.name)
    kind, classes = _EXACT.get(type(found), ("", ""))
    if kind in LOSSES:
        if settings.get("ignore_class") is not None or settings.get("axis", -1) not in (-1, None):
            raise CannotTrain(f"the loss {kind!r} with ignore_class or another axis than the last; leave both out")
        graph = None
    elif kind == _OTHER_LABELS:
        raise CannotTrain(f"the loss {name!r} needs labels of another kind; use one of {', '.join(LOSSES)}")
    elif type(found) is keras.losses.BinaryFocalCrossentropy and source_of(output).op.type == "Softmax":
        raise CannotTrain(f"the loss {name!r} over a softmax; use a sigmoid, or categorical_focal_crossentropy")
    else:
        graph = record_loss(found, name, output.shape)
    return Loss(
        kind=kind or name,
        keras=found,
        graph=graph,
        classes=classes,
        from_logits=bool(settings.get("from_logits", False)) and source_of(output).op.type not in _PROBABILITIES,
        smoothing=float(settings.get("label_smoothing", 0.0)) if graph is None else 0.0,
        delta=float(settings.get("delta", 1.0)) if graph is None else 1.0,
        weight=weight,
    )


class _Function(keras.losses.Loss):  # type: ignore[misc,name-defined]
    """A function as a loss object, as `model.compile` makes one."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(name=str(getattr(function, "__name__", "loss")))
        self.function = function

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return self.function(y_true, y_pred)


def _keras_loss(identifier: Any) -> Any:
    """Return `identifier` as a Keras object."""
    try:
        found = keras.losses.get(identifier)
    except (ValueError, TypeError) as error:
        raise CannotTrain(f"there is no loss {identifier!r}; use one of {', '.join(LOSSES)}") from error
    if isinstance(found, keras.losses.Loss):
        return found
    if not callable(found):
        raise CannotTrain(f"an output without a loss, or one that is no loss ({identifier!r}); give each output one")
    own = next((kind for kind in _FUNCTIONS if keras.losses.get(kind) is found), None)
    return _Function(found) if own is None else getattr(keras.losses, _FUNCTIONS[own])()


def _settings(found: Any) -> dict[str, Any]:
    """Return how a loss object is set, where devices can follow that."""
    reduction = getattr(found, "reduction", "mean")
    if reduction not in ("mean", "sum_over_batch_size"):
        raise CannotTrain(f"the loss {found.name!r} with reduction={reduction!r}; leave it out: devices take the mean")
    if found.dtype != "float32":
        raise CannotTrain(f"the loss {found.name!r} computes in {found.dtype}; leave its dtype out")
    settings = found.get_config() if type(found) in _EXACT else {}
    return {**settings, **getattr(found, "_fn_kwargs", {})}  # Huber's own configuration forgets its delta.


def _sparse(loss: Loss, output: Tensor, labels: Tensor, is_logits: bool) -> Tensor:
    logits = output if is_logits else tf.math.log(_clip(output))
    classes = logits.shape[-1]
    flat = softmax_cross_entropy(tf.reshape(logits, [-1, classes]), tf.reshape(labels, [-1]))
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
_FUNCTIONS: Mapping[str, str] = {
    "sparse_categorical_crossentropy": "SparseCategoricalCrossentropy",
    "categorical_crossentropy": "CategoricalCrossentropy",
    "binary_crossentropy": "BinaryCrossentropy",
    "mean_squared_error": "MeanSquaredError",
    "mean_absolute_error": "MeanAbsoluteError",
    "huber": "Huber",
    "binary_focal_crossentropy": "BinaryFocalCrossentropy",
    "categorical_focal_crossentropy": "CategoricalFocalCrossentropy",
}
"""Keras' name of a loss's function -> its class."""
_OTHER_LABELS = "other labels"
_EXACT: Mapping[type, tuple[str, str]] = {
    **{
        getattr(keras.losses, name): (kind, kind.removesuffix("_crossentropy").removesuffix("_focal"))
        for kind, name in _FUNCTIONS.items()
        if kind.endswith("crossentropy")
    },
    **{getattr(keras.losses, _FUNCTIONS[kind]): (kind, "") for kind in LOSSES if not kind.endswith("crossentropy")},
    **{
        getattr(keras.losses, name): (_OTHER_LABELS, "")
        for name in ("CTC", "Circle", "CategoricalGeneralizedCrossEntropy")
    },
}
"""Class -> (kind, kind of accuracy). An author's subclass is none of them, whatever it is called."""
