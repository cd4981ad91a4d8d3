"""A Keras model with its loss and optimizer as the five pure functions of a client program.

What the state holds beside weights, statistics and the learning rate: the optimizer's slots, the number of steps, and
for FedProx the weights that were broadcast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from models.gradients import CannotTrain, built_in_gradients, slopes
from models.keras_dropout import uniform_of
from models.keras_inputs import features_of, port_type
from models.keras_losses import Loss, loss_of
from models.keras_metrics import Metric, metrics_of
from models.keras_optimizers import ClientOptimizer, optimizer_of
from models.keras_tracing import Pass, Traced, trace
from models.lint import refuse
from models.ops import Tensor
from models.program_export import DELTA, LOCAL, Arrays, Function, Tensors, port_of, scalar_ports, take
from sottovoce.bundle import Port, RoleName
from sottovoce.types import Array

keras = tf.keras
STEPS = "steps"
_BEFORE = "before_"


@dataclass(frozen=True, slots=True)
class Training:
    """A model with everything that training it takes.

    Attributes:
        traced: The model as a function.
        losses: One for each output.
        measured: The metrics of each output.
        labels: The port of each output's labels.
        outputs: The port of each output.
        optimizer: The client optimizer.
        proximal: FedProx's mu: mu / 2 * ||w - w0||^2 is added to the loss, w0 the broadcast weights.
    """

    traced: Traced
    losses: tuple[Loss, ...]
    measured: tuple[tuple[Metric, ...], ...]
    labels: tuple[Port, ...]
    outputs: tuple[Port, ...]
    optimizer: ClientOptimizer
    proximal: float

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of what the update holds: trained weights, then statistics."""
        return (*self.traced.trained, *self.traced.statistics)

    @property
    def metrics(self) -> tuple[str, ...]:
        """`loss`, and the name of every metric; of several outputs, followed by the output's."""
        single = len(self.outputs) == 1
        pairs = [
            (each.name, port.name) for port, found in zip(self.outputs, self.measured, strict=True) for each in found
        ]
        return ("loss", *(name if single else f"{name}_{output}" for name, output in pairs))

    def measures(self, outputs: Sequence[Tensor], batch: Tensors) -> list[Tensor]:
        """Return every metric but `loss` of each example of a batch: float32 [b], in the order of `metrics`."""
        triples = zip(self.measured, outputs, self.labels, strict=True)
        return [each.measure(out, batch[port.name]) for found, out, port in triples for each in found]

    def initial(self) -> dict[str, Array]:
        """Return the first value of every broadcast port: the model's weights as they are, and the learning rate."""
        weights = {**self.traced.trained, **self.traced.statistics, **self.traced.given}
        rate = np.array([self.optimizer.learning_rate], np.float32)
        return {**{name: variable.numpy() for name, variable in weights.items()}, "learning_rate": rate}


def training_of(
    model: Any,
    *,
    loss: Any,
    optimizer: Any,
    metrics: Any = None,
    loss_weights: Any = None,
    batch_spec: Mapping[str, str] | None = None,
    proximal: float = 0.0,
    int8: bool = False,
) -> Training:
    """Return `model` as a function with its losses, labels and optimizer; see `export`.

    Raises:
        CannotTrain: The text names the layer and the cure.
    """
    if not 0.0 <= proximal < math.inf:
        raise CannotTrain(f"proximal is {proximal}; it is a number of at least 0")
    features = features_of(model, batch_spec)
    traced = trace(model, features, int8=int8)
    refuse(traced)
    outputs = traced.graphs[False].outputs
    identifiers = per_output(loss, traced.output_names, "losses")
    weights = per_output(1.0 if loss_weights is None else loss_weights, traced.output_names, "loss weights")
    pairs = zip(identifiers, outputs, map(_weight_of, weights), strict=True)
    losses = tuple(loss_of(each, output, weight) for each, output, weight in pairs)
    wanted = _metrics_per_output(metrics, traced.output_names)
    names, labels = _port_names(traced)
    return Training(
        traced=traced,
        losses=losses,
        measured=tuple(metrics_of(each, one) for each, one in zip(wanted, losses, strict=True)),
        labels=tuple(each.label(label, out) for each, label, out in zip(losses, labels, outputs, strict=True)),
        outputs=tuple(Port(name=n, type=port_type(out)) for n, out in zip(names, outputs, strict=True)),
        optimizer=optimizer_of(optimizer),
        proximal=proximal,
    )


def _weight_of(given: Any) -> float:
    if not isinstance(given, (int, float)):
        raise CannotTrain(f"the loss weight {given!r} is no number")
    return float(given)


def per_output(given: Any, names: Sequence[str], what: str) -> list[Any]:
    """Return one of `given` for each output: it is one for all, a list in their order, or a dict by their names.

    Raises:
        CannotTrain: There are too many or too few, or a name is none of an output.
    """
    if isinstance(given, Mapping):
        unknown, missing = sorted(given.keys() - {*names}), sorted({*names} - given.keys())
        if unknown or missing:
            told = f"name {unknown[0]!r}, which is no output" if unknown else f"do not name the output {missing[0]!r}"
            raise CannotTrain(f"the {what} {told}; the outputs are {', '.join(names)}")
        return [given[name] for name in names]
    found = list(given) if isinstance(given, (list, tuple)) else [given] * len(names)
    if len(found) != len(names):
        cure = f"give one for each of {', '.join(names)}"
        raise CannotTrain(f"the model has {len(names)} outputs and {len(found)} {what}; {cure}")
    return found


def _metrics_per_output(metrics: Any, names: Sequence[str]) -> list[list[Any] | None]:
    """Return the metrics of each output: a list holds those of the only output, or one entry for each of several."""
    if metrics is None:
        return [None] * len(names)
    if isinstance(metrics, Mapping):
        metrics = {**dict.fromkeys(names, ()), **metrics}
    elif len(names) == 1:
        return [tf.nest.flatten(metrics)]
    return [[] if each is None else tf.nest.flatten(each) for each in per_output(metrics, names, "lists of metrics")]


def _port_names(traced: Traced) -> tuple[list[str], list[str]]:
    """Return the names of the ports of outputs and of labels: a dict's keys, else numbers, nothing for only one."""
    names = traced.output_names
    if len(names) == 1:
        return ["prediction"], ["y"]
    ends = [re.sub(r"\W", "_", name) for name in names] if traced.returns_dict else [str(i) for i in range(len(names))]
    return [f"prediction_{end}" for end in ends], [f"y_{end}" for end in ends]


# --- The five roles.


def functions_of(training: Training) -> dict[RoleName, Function]:
    """Return the roles as functions of named tensors, to be called while a graph is made."""
    return {
        "begin": lambda tensors: _begin(training, tensors),
        "step": lambda tensors: _step(training, tensors),
        "finish": lambda tensors: {DELTA + n: tensors[LOCAL + n] - tensors[n] for n in training.learned},
        "infer": lambda tensors: _infer(training, tensors),
        "evaluate": lambda tensors: _evaluate(training, tensors),
    }


def _slots(training: Training) -> list[tuple[str, str]]:
    """Return (state port without its prefix, weight) for everything that the optimizer remembers."""
    return [(prefix + name, name) for prefix in training.optimizer.slots for name in training.traced.trained]


def state_of(training: Training, initial: Arrays) -> tuple[Port, ...]:
    """Return the ports that go from step to step."""
    kept = {**initial, **{slot: initial[name] for slot, name in _slots(training)}}
    if training.proximal:
        kept |= {_BEFORE + name: initial[name] for name in training.traced.trained}
    return (*(port_of(LOCAL + name, value) for name, value in kept.items()), *scalar_ports(LOCAL + STEPS))


def _begin(training: Training, tensors: Tensors) -> Tensors:
    zero = tensors["learning_rate"] * 0.0
    state = {LOCAL + name: tf.identity(value) for name, value in tensors.items()}
    state |= {LOCAL + slot: tensors[name] * 0.0 for slot, name in _slots(training)}
    if training.proximal:
        state |= {LOCAL + _BEFORE + name: tf.identity(tensors[name]) for name in training.traced.trained}
    return {**state, LOCAL + STEPS: zero}


def _step(training: Training, tensors: Tensors) -> Tensors:
    weights = take(training.traced.trained, tensors, prefix=LOCAL)
    statistics = take(training.traced.statistics, tensors, prefix=LOCAL)
    given = take(training.traced.given, tensors, prefix=LOCAL)
    rate, steps = tensors[LOCAL + "learning_rate"], tensors[LOCAL + STEPS]
    with built_in_gradients():
        known = {**weights, **statistics, **given, "learning_rate": rate}
        found = forward(training, known, tensors, steps, is_training=True)
        scores = scores_of(training, found, tensors)
        losses = scores["loss"]
        total = tf.reduce_mean(losses) if found.penalty is None else tf.reduce_mean(losses) + found.penalty
    directions = dict(zip(weights, slopes(total, list(weights.values())), strict=True))
    kept = {LOCAL + name: tf.identity(value) for name, value in given.items()}
    state = {**kept, LOCAL + "learning_rate": tf.identity(rate), LOCAL + STEPS: steps + 1.0}
    if training.proximal:
        before = take(weights, tensors, prefix=LOCAL + _BEFORE)
        directions = {n: d + training.proximal * (weights[n] - before[n]) for n, d in directions.items()}
        state |= {LOCAL + _BEFORE + name: tf.identity(value) for name, value in before.items()}
    slots = take([slot for slot, _ in _slots(training)], tensors, prefix=LOCAL)
    moved = training.optimizer.apply(weights, directions, slots, rate=rate, step=steps)
    return {**state, **{LOCAL + n: v for n, v in {**moved, **found.statistics}.items()}, **summed(scores)}


def _infer(training: Training, tensors: Tensors) -> Tensors:
    found = forward(training, tensors, tensors, tf.zeros([1]), is_training=False)
    return {port.name: output for port, output in zip(training.outputs, found.outputs, strict=True)}


def _evaluate(training: Training, tensors: Tensors) -> Tensors:
    found = forward(training, tensors, tensors, tf.zeros([1]), is_training=False)
    scores = scores_of(training, found, tensors)
    return summed({**scores, "examples": tf.ones_like(scores["loss"])})


def forward(
    training: Training, weights: Tensors, batch: Tensors, step: Tensor, *, is_training: bool, as_it_is: bool = False
) -> Pass:
    """Return a forward pass of `batch` in the current graph; see `models.keras_tracing.Traced.run`."""
    features = take([port.name for port in training.traced.features], batch)
    uniform = uniform_of(list(features.values()), step)
    return training.traced.run({**weights, **features}, training=is_training, uniform=uniform, as_it_is=as_it_is)


def scores_of(training: Training, found: Pass, batch: Tensors) -> dict[str, Tensor]:
    """Return the metrics of each example: `loss` over all outputs and the others, float32 [b], in their order."""
    triples = list(zip(training.losses, found.outputs, training.labels, strict=True))
    losses = tf.add_n([loss.per_example(output, batch[port.name]) for loss, output, port in triples])
    return dict(zip(training.metrics, [losses, *training.measures(found.outputs, batch)], strict=True))


def summed(scores: Tensors) -> dict[str, Tensor]:
    """Return each of `scores` summed over the batch: float32 [1]."""
    return {name: tf.reshape(tf.reduce_sum(values), [1]) for name, values in scores.items()}


def source_inputs(training: Training) -> tuple[Port, ...]:
    """Return the ports that a step reads: the state, then a batch."""
    return (*state_of(training, training.initial()), *training.traced.features, *training.labels)
