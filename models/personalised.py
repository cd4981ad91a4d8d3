"""A client program that says what a model gains when it is fine-tuned on the device's own examples.

Every batch is a trial of its own. Its rows are divided: every fourth, counted from the fourth, is a *query*, the others
are the *support*. The broadcast model is scored on the queries; a copy of it makes a few training steps on the
support; the copy is scored on the same queries, which it has never seen; then it is thrown away. (These are the words
of few-shot learning, and of Wang et al. 2019, arXiv 1910.10252, "Federated Evaluation of On-device Personalization".)
With a batch as large as a device's data there is one trial a device. Nothing is kept, so the order of the examples, the
number of batches and a batch that is smaller than the others change nothing in what is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from models.export import bundle_of, random_batches, source_of
from models.gradients import CannotTrain
from models.keras_reference import reference_of, scores_in_keras
from models.keras_training import Training, forward, functions_of, scores_of, training_of
from models.ops import Tensor
from models.program_export import DELTA, LOCAL, Arrays, ProgramSource, Tensors, port_of
from sottovoce.bundle import Bundle, Port, Result
from sottovoce.types import Array

QUERY_EVERY = 4
"""One row in so many is a query."""
_COUNTS = ("examples", "before_correct", "after_correct")
_LOSSES = ("before_loss", "after_loss")
_SCORES = ("loss", "correct")
_TOTALS = (
    *(Port(name=name, type="int32[1]") for name in _COUNTS),
    *(Port(name=name, type="float32[1]") for name in _LOSSES),
)


def export_personalised(
    model: Any,
    *,
    loss: Any,
    optimizer: Any,
    steps: int = 5,
    batch_spec: Mapping[str, str] | None = None,
    description: str = "",
) -> Bundle:
    """Return the program that evaluates a Keras model before and after fine-tuning it.

    Broadcast: as `models.export.export`. Results, each of one port of its own name: `examples`, `before_correct`,
    `after_correct` (int32[1], over all queries), `before_loss`, `after_loss` (float32[1], sums over all queries).

    Args:
        model: As in `models.export.export`: one output of classes, one label for each example.
        loss: As there, with class numbers as labels.
        optimizer: As there; of the fine-tuning.
        steps: Training steps on the whole support of a batch, at least 1; the program grows with them.
        batch_spec: As there.
        description: As there.

    Raises:
        CannotTrain: The text names the layer and the cure; or labels are not one class number for each example.
        SelfTestFailed: The runtime's results are not those of Keras.
    """
    training = training_of(model, loss=loss, optimizer=optimizer, metrics=["accuracy"], batch_spec=batch_spec)
    if [port.type for port in training.labels] != ["int32[?]"]:
        raise CannotTrain(
            "personalised evaluation counts right answers: one output, and one class number for each example; use the "
            "loss sparse_categorical_crossentropy"
        )
    return bundle_of(_source(training, model.name, description, steps))


def _source(training: Training, name: str, description: str, steps: int) -> ProgramSource:
    plain = source_of(training, name, description)
    return dataclasses.replace(
        plain,
        name=f"{name}_personalised",
        description=f"{plain.description} Compares it before and after fine-tuning on the device's own examples.",
        functions={
            "begin": _begin,
            "step": lambda tensors: _step(training, steps, tensors),
            "finish": lambda tensors: {port.name: tensors[LOCAL + port.name] + 0 for port in _TOTALS},
        },
        state=(
            *(port_of(LOCAL + each, value) for each, value in plain.initial.items()),
            *(Port(name=LOCAL + port.name, type=port.type) for port in _TOTALS),
        ),
        results=tuple(Result(name=port.name, ports=(port,)) for port in _TOTALS),
        metrics=(),
        features=(),
        predictions=(),
        sums=(),
        test_batches=random_batches(plain.batch, name, (8, 1, 5)),
        reference=lambda broadcast, batches: _reference(training, steps, broadcast, batches),
        tolerance=1e-3,
    )


def _begin(tensors: Tensors) -> Tensors:
    return {
        **{LOCAL + name: tf.identity(value) for name, value in tensors.items()},
        **{LOCAL + name: tf.zeros([1], tf.int32) for name in _COUNTS},
        **{LOCAL + name: tf.zeros([1]) for name in _LOSSES},
    }


def _step(training: Training, steps: int, tensors: Tensors) -> Tensors:
    names = (*training.learned, *training.traced.given, "learning_rate")
    broadcast = {name: tensors[LOCAL + name] for name in names}
    batch = {port.name: tensors[port.name] for port in (*training.traced.features, *training.labels)}
    query = _queries(batch)
    found = {
        "examples": tf.reduce_sum(query, keepdims=True),
        **_scored("before_", training, broadcast, batch, query),
        **_scored("after_", training, _tuned(training, steps, broadcast, _support(batch)), batch, query),
    }
    counts = {LOCAL + name: tensors[LOCAL + name] + tf.cast(found[name], tf.int32) for name in _COUNTS}
    return {
        **{LOCAL + name: tf.identity(value) for name, value in broadcast.items()},
        **counts,
        **{LOCAL + name: tensors[LOCAL + name] + found[name] for name in _LOSSES},
    }


def _tuned(training: Training, steps: int, broadcast: Tensors, support: Tensors) -> Tensors:
    """Return `broadcast` after some training steps on `support`."""
    functions = functions_of(training)
    state = functions["begin"](broadcast)
    for _ in range(steps):
        after = functions["step"]({**state, **support})
        state = {name: after[name] for name in state}
    return {name: state[LOCAL + name] for name in broadcast}


def _queries(batch: Tensors) -> Tensor:
    """Return 1.0 for every fourth row, else 0.0, shape [b]."""
    positions = tf.range(_rows(batch))
    return tf.cast(tf.equal(positions % QUERY_EVERY, QUERY_EVERY - 1), tf.float32)


def _support(batch: Tensors) -> Tensors:
    """Return the rows that are no queries, of which every batch has one: of four rows the first three."""
    count = _rows(batch)
    order = tf.range(count - count // QUERY_EVERY)
    return {name: tf.gather(values, order + order // (QUERY_EVERY - 1)) for name, values in batch.items()}


def _rows(batch: Tensors) -> Tensor:
    return tf.shape(next(iter(batch.values())))[0]


def _scored(prefix: str, training: Training, weights: Tensors, batch: Tensors, query: Tensor) -> dict[str, Tensor]:
    """Return the summed scores of the queries; all rows are run, because devices cannot run an empty batch."""
    scores = scores_of(training, forward(training, weights, batch, tf.zeros([1]), is_training=False), batch)
    return {prefix + name: tf.reduce_sum(scores[name] * query, keepdims=True) for name in _SCORES}


def _reference(training: Training, steps: int, broadcast: Arrays, batches: Sequence[Arrays]) -> dict[str, Array]:
    """Return what Keras finds when it tunes on the support of each batch and is scored on the queries."""
    totals = dict.fromkeys((*_COUNTS, *_LOSSES), 0.0)
    for batch in batches:
        count = len(next(iter(batch.values())))
        is_query = np.arange(count) % QUERY_EVERY == QUERY_EVERY - 1
        if not is_query.any():
            continue
        support, query = ({name: values[rows] for name, values in batch.items()} for rows in (~is_query, is_query))
        change = reference_of(training, broadcast, [support] * steps)
        tuned = {**broadcast, **{name: broadcast[name] + change[DELTA + name] for name in training.learned}}
        totals["examples"] += is_query.sum()
        for prefix, weights in (("before_", broadcast), ("after_", tuned)):
            scores = scores_in_keras(training, weights, query)
            totals |= {prefix + name: totals[prefix + name] + scores[name] for name in _SCORES}
    return {port.name: np.array([totals[port.name]], port.tensor_type.numpy_dtype) for port in _TOTALS}
