"""A client program that says what a model gains when it is fine-tuned on the device's own examples.

Every batch is a trial of its own. Its rows are divided: every fourth, counted from the fourth, is a *query*, the others
are the *support*. The broadcast model is scored on the queries; a copy of it makes a few gradient steps on the
support; the copy is scored on the same queries, which it has never seen; then it is thrown away. (These are the words
of few-shot learning, and of Wang et al. 2019, arXiv 1910.10252, "Federated Evaluation of On-device Personalization".)
With a batch as large as a device's data there is one trial a device. Nothing is kept, so the order of the examples, the
number of batches and a batch that is smaller than the others change nothing in what is measured.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from models.export import (
    LOCAL,
    Function,
    Model,
    ProgramSource,
    Tensors,
    export,
    gradients,
    port_of,
    random_batches,
    run_with_tensorflow,
    scores,
    take,
)
from models.ops import BuiltIns, Operations, Plain, Tensor
from sottovoce.bundle import Bundle, Port, Result, RoleName

QUERY_EVERY = 4
"""One row in so many is a query."""
_COUNTS = ("examples", "before_correct", "after_correct")
_LOSSES = ("before_loss", "after_loss")


def export_personalised(model: Model, *, steps: int = 5) -> Bundle:
    """Return the program that evaluates `model` before and after fine-tuning it.

    Broadcast: weights, constants, `learning_rate` float32[1], as `export_model`. Results, each of one port of its own
    name: `examples`, `before_correct`, `after_correct` (int32[1], over all queries), `before_loss`, `after_loss`
    (float32[1], sums over all queries).

    Args:
        model: A classifier.
        steps: Gradient steps of SGD on the whole support of a batch, at least 1; the program grows with them.

    Raises:
        BadBundle: The forward pass uses an operation whose gradient is not a TFLite built-in.
        SelfTestFailed: The runtime's results are not those of TensorFlow.
    """
    initial = {**model.weights, **model.constants, "learning_rate": np.array([model.learning_rate], np.float32)}
    totals = (*(Port(name=name, type="int32[1]") for name in _COUNTS), *_float_ports(_LOSSES))
    return export(
        ProgramSource(
            name=f"{model.name}_personalised",
            description=f"{model.description} Compares it before and after fine-tuning on the device's own examples.",
            functions=_functions(model, BuiltIns(), steps),
            broadcast=tuple(port_of(name, value) for name, value in initial.items()),
            state=(
                *(port_of(LOCAL + name, value) for name, value in initial.items()),
                *(Port(name=LOCAL + port.name, type=port.type) for port in totals),
            ),
            batch=(Port(name="x", type=model.features), Port(name="y", type="int32[?]", low=0, high=model.classes - 1)),
            results=tuple(Result(name=port.name, ports=(port,)) for port in totals),
            initial=initial,
            test_broadcast=model.test_constants,
            test_batches=random_batches(model, sizes=(8, 1, 5)),
            reference=lambda broadcast, batches: run_with_tensorflow(
                _functions(model, Plain(), steps), broadcast, batches
            ),
            tolerance=1e-3,
        )
    )


def _float_ports(names: tuple[str, ...]) -> tuple[Port, ...]:
    return tuple(Port(name=name, type="float32[1]") for name in names)


def _functions(model: Model, operations: Operations, steps: int) -> dict[RoleName, Function]:
    return {
        "begin": _begin,
        "step": lambda tensors: _step(model, operations, steps, tensors),
        "finish": lambda tensors: {name: tensors[LOCAL + name] + 0 for name in (*_COUNTS, *_LOSSES)},
    }


def _begin(tensors: Tensors) -> Tensors:
    return {
        **{LOCAL + name: tf.identity(value) for name, value in tensors.items()},
        **{LOCAL + name: tf.zeros([1], tf.int32) for name in _COUNTS},
        **{LOCAL + name: tf.zeros([1]) for name in _LOSSES},
    }


def _step(model: Model, operations: Operations, steps: int, tensors: Tensors) -> Tensors:
    weights = take(model.weights, tensors, prefix=LOCAL)
    constants = take(model.constants, tensors, prefix=LOCAL)
    query = _queries(tensors["y"])
    support = _share(1.0 - query)
    rate, tuned = tensors[LOCAL + "learning_rate"], weights
    for _ in range(steps):
        slopes, _, _ = gradients(model, operations, tuned, constants, tensors, rows=support)
        tuned = {name: value - rate * slopes[name] for name, value in tuned.items()}
    found = {
        "examples": tf.reduce_sum(query, keepdims=True),
        **_scored("before_", model, operations, weights, constants, tensors, query),
        **_scored("after_", model, operations, tuned, constants, tensors, query),
    }
    kept = {LOCAL + name: tf.identity(tensors[LOCAL + name]) for name in (*weights, *constants, "learning_rate")}
    counts = {LOCAL + name: tensors[LOCAL + name] + tf.cast(found[name], tf.int32) for name in _COUNTS}
    return {**kept, **counts, **{LOCAL + name: tensors[LOCAL + name] + found[name] for name in _LOSSES}}


def _queries(labels: Tensor) -> Tensor:
    """Return 1.0 for every fourth row, else 0.0, shape [b]."""
    positions = tf.range(tf.shape(labels)[0])
    return tf.cast(tf.equal(positions % QUERY_EVERY, QUERY_EVERY - 1), tf.float32)


def _share(rows: Tensor) -> Tensor:
    """Return `rows` divided by their sum: the weights of a mean over them."""
    return rows / tf.maximum(tf.reduce_sum(rows), 1.0)


def _scored(
    prefix: str,
    model: Model,
    operations: Operations,
    weights: Tensors,
    constants: Tensors,
    tensors: Tensors,
    query: Tensor,
) -> dict[str, Tensor]:
    logits = model.forward(operations, weights, constants, tensors["x"])
    losses = operations.softmax_cross_entropy(logits, tensors["y"])
    return {prefix + name: value for name, value in scores(logits, losses, tensors["y"], rows=query).items()}
