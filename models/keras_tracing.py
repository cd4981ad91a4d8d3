"""A Keras model as a pure function of its weights: what it reads, what it learns, and its graph made of built-ins.

`trace` runs the model once with symbolic weights and records the operations; `Traced.run` makes them again, in
TFLite built-ins, wherever they are needed. A weight is *trained*, a *statistic* that the forward pass itself moves (the
moving mean of BatchNormalization), *given* by the fleet (mean and variance of a Normalization that nobody has adapted),
or *frozen*: then it is a constant of the program and never travels.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from models.gradients import RANDOM, CannotTrain, Uniform, layer_of, replay, scope_of
from models.keras_inputs import packed
from models.keras_quantised import Int8, rounded
from models.ops import Tensor
from sottovoce.bundle import Port
from sottovoce.errors import BadBundle
from sottovoce.types import TensorType

keras = tf.keras
_LONGEST = 300
"""Of what Keras says; the rest prints every argument."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass.

    Attributes:
        outputs: The model's outputs, in order.
        statistics: The new value of every statistic, by port name.
        penalty: Sum of the regularisation losses, None where the model has none.
    """

    outputs: Sequence[Tensor]
    statistics: Mapping[str, Tensor]
    penalty: Tensor | None


@dataclass(frozen=True, slots=True)
class Traced:
    """A model as a function.

    Attributes:
        model: The Keras model.
        features: One port for each input, in the model's order.
        trained: Port name -> Keras variable, what the gradient changes.
        statistics: The same for what the forward pass changes.
        given: The same for what is broadcast and never changed on a device.
        rounded: Port name -> int8 of the frozen weights that are kept so.
        graphs: training -> (graph, names of placeholders, outputs, moved statistics, penalty).
    """

    model: Any
    features: tuple[Port, ...]
    trained: Mapping[str, Any]
    statistics: Mapping[str, Any]
    given: Mapping[str, Any]
    rounded: Mapping[str, Int8]
    graphs: Mapping[bool, _Graph]

    @property
    def returns_dict(self) -> bool:
        """Whether the model's outputs are a dict."""
        return isinstance(self.graphs[False].returned, dict)

    @property
    def output_names(self) -> tuple[str, ...]:
        """What Keras calls each output, in the order of `Pass.outputs`: a dict's key, a layer's name, or a number."""
        graph = self.graphs[False]
        if isinstance(graph.returned, dict):
            return tuple(sorted(graph.returned))
        functional = getattr(self.model, "_functional", None) or self.model  # Sequential keeps one within.
        names = getattr(functional, "output_names", None) or ()
        distinct = len(set(names)) == len(graph.outputs)
        return tuple(names) if distinct else tuple(str(i) for i in range(len(graph.outputs)))

    @property
    def is_random(self) -> bool:
        """Whether training draws random numbers, as Dropout does."""
        return any(op.type in RANDOM for op in self.graphs[True].whole.get_operations())

    def run(self, values: Mapping[str, Tensor], *, training: bool, uniform: Uniform, as_it_is: bool = False) -> Pass:
        """Return a forward pass in the current graph.

        Args:
            values: Every trained or given weight, statistic and feature by name, and `learning_rate`.
            training: As Keras means it.
            uniform: See `models.gradients.replay`.
            as_it_is: Likewise.
        """
        graph = self.graphs[training]
        known = {tensor: values[name] for name, tensor in graph.inputs.items() if name in values}
        small = {graph.inputs[name]: whole for name, whole in self.rounded.items()}
        frozen = {
            tensor: tf.constant(small[tensor].value if tensor in small else value)
            for tensor, value in graph.constants.items()
            if tensor not in known and (as_it_is or tensor not in small)
        }
        if not as_it_is:
            frozen |= {tensor: whole.tensor(values["learning_rate"]) for tensor, whole in small.items()}
        penalties = [] if graph.penalty is None else [graph.penalty]
        wanted = [*graph.outputs, *graph.statistics.values(), *penalties]
        found = replay(wanted, {**frozen, **known}, uniform=uniform, as_it_is=as_it_is)
        count = len(graph.outputs)
        moved = dict(zip(graph.statistics, found[count : count + len(graph.statistics)], strict=True))
        outputs = [tf.identity(tensor) for tensor in found[:count]]
        return Pass(outputs, moved, found[-1] if penalties else None)


@dataclass(frozen=True, slots=True)
class _Graph:
    """What one trace found: tensors of its graph, the structure they are returned in, what it reads from outside."""

    inputs: Mapping[str, str]
    constants: Mapping[str, Any]
    returned: Any
    outputs: Sequence[Tensor]
    statistics: Mapping[str, Tensor]
    penalty: Tensor | None
    whole: Any


def trace(model: Any, features: Sequence[Port], *, int8: bool = False) -> Traced:
    """Return `model` as a function of its weights.

    Args:
        model: A Keras model that is built.
        features: One port for each input.
        int8: Keep large frozen weights as int8.

    Raises:
        CannotTrain: The model cannot be traced with an unknown batch size, or does not compute in float32.
    """
    names = _names(model)
    _hold(model, {port.name for port in features}, {*names.values()})
    graphs = {training: _traced(model, features, names, training) for training in (True, False)}
    trained = {names[id(v)]: v for v in model.trainable_variables}
    if not trained:
        raise CannotTrain("the model has no weight to train; set layer.trainable = True where it shall learn")
    moved = {names[id(v)]: v for v in model.non_trainable_variables if names[id(v)] in graphs[True].statistics}
    given = {names[id(v)]: v for layer in _not_adapted(model) for v in (layer.adapt_mean, layer.adapt_variance)}
    others = {names[id(v)]: v for v in model.non_trainable_variables}
    frozen = {name: variable for name, variable in others.items() if name not in {*moved, *given}}
    small = {name: rounded(variable.numpy()) for name, variable in frozen.items() if int8}
    kept = {name: whole for name, whole in small.items() if whole is not None}
    return Traced(model, tuple(features), trained, moved, given, kept, graphs)


def _hold(model: Any, features: set[str], weights: set[str]) -> None:
    """Raise CannotTrain where numbers are not float32, or two tensors would have one name."""
    policy = str(getattr(model.dtype_policy, "compute_dtype", "float32"))
    if policy != "float32":
        raise CannotTrain(f"the model computes in {policy}; set keras.config.set_dtype_policy('float32')")
    for variable in model.trainable_variables:
        if variable.dtype != "float32":
            raise CannotTrain(f"the weight {variable.path!r} is {variable.dtype}; give its layer dtype='float32'")
    for variable in model.variables:
        if variable.dtype == "float32" and np.isnan(variable.numpy()).any():
            raise CannotTrain(
                f"the weight {variable.path!r} holds NaN; load the weights again, or train them with a smaller rate"
            )
    for name in sorted(features):
        if name in weights | {"y", "learning_rate", "prediction"} or name.startswith(("local_", "y_", "prediction_")):
            raise CannotTrain(f"input {name!r} has a name that means something else here; call it otherwise")


def _names(model: Any) -> dict[int, str]:
    """Return a port name for every weight by its id: the layer's path and the weight's name.

    Of the only Normalization that nobody has adapted they are `mean` and `variance`, which a task fills in by name.
    """
    found: dict[int, str] = {}
    if len(given := _not_adapted(model)) == 1:
        found = {id(given[0].adapt_mean): "mean", id(given[0].adapt_variance): "variance"}
    for variable in model.variables:
        if id(variable) in found:
            continue
        name = re.sub(r"\W", "_", variable.path.removeprefix(f"{model.name}/"))
        while name in found.values():
            name += "_"
        found[id(variable)] = name
    return found


def frozen_variables(traced: Traced) -> dict[str, Any]:
    """Return port name -> Keras variable of the frozen weights that are kept as int8."""
    names = _names(traced.model)
    return {names[id(v)]: v for v in traced.model.variables if names[id(v)] in traced.rounded}


def _traced(model: Any, features: Sequence[Port], names: Mapping[int, str], training: bool) -> _Graph:
    trainable, others = model.trainable_variables, model.non_trainable_variables
    specs = [tf.TensorSpec(kind.shape, kind.dtype) for kind in (TensorType.parse(port.type) for port in features)]

    def forward(trained: list[Tensor], rest: list[Tensor], inputs: list[Tensor]) -> Any:
        _read_moments(model, {id(v): tensor for v, tensor in zip(others, rest, strict=True)})
        found = model.stateless_call(trained, rest, packed(model, inputs), training=training, return_losses=True)
        if any(getattr(output, "_keras_mask", None) is not None for output in tf.nest.flatten(found[0])):
            raise CannotTrain(
                "the model's output is masked, and a loss on devices counts every place; set mask_zero=False"
            )
        return found

    weights = [[tf.TensorSpec(v.shape, v.dtype) for v in part] for part in (trainable, others)]
    try:
        with unrolled(model), _labelled(model), _inlined():
            graph = tf.function(forward, autograph=False).get_concrete_function(*weights, specs).graph
    except BadBundle:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, tf.errors.OpError) as error:
        raise CannotTrain(f"the model cannot be called with an unknown batch size: {told(error)}") from error
    finally:
        follow_moments(model)
    for tensor in tf.nest.flatten(graph.structured_outputs[0]):
        if not tensor.shape.rank or None in tensor.shape[1:] or tensor.shape[0] is not None:
            layer = layer_of(source_of(tensor).name)
            raise CannotTrain(
                f"layer {layer!r} gives the model's output the shape {tensor.shape}; it must be known but for the "
                "batch, its first dimension: reshape to fixed lengths, with no batch size in the input"
            )
    outputs, moved, losses = graph.structured_outputs
    placeholders = graph.inputs[: len(trainable) + len(others) + len(specs)]
    order = [*(names[id(v)] for v in (*trainable, *others)), *(port.name for port in features)]
    inputs = dict(zip(order, (tensor.name for tensor in placeholders), strict=True))
    statistics = {}
    for variable, tensor in zip(others, moved, strict=True):
        source = source_of(tensor)
        if source.name == inputs[names[id(variable)]] or variable.path.endswith("seed_generator_state"):
            continue
        if variable.dtype != "float32":
            raise CannotTrain(
                f"the weight {variable.path!r} changes when the model is called, and is {variable.dtype}; what devices "
                "keep is float32: give it dtype='float32'"
            )
        statistics[names[id(variable)]] = tensor
    values = {inputs[names[id(v)]]: v.numpy() for v in others}
    captured = {inside.name: outside.numpy() for outside, inside in graph.captures if outside.dtype != tf.resource}
    flat = tf.nest.flatten(outputs)
    return _Graph(inputs, {**values, **captured}, outputs, flat, statistics, _added(graph, losses), graph)


def source_of(tensor: Tensor) -> Tensor:
    """Return what `tensor` is a mere copy of."""
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _added(graph: Any, losses: Sequence[Tensor]) -> Tensor | None:
    if not losses:
        return None
    with graph.as_default():
        return tf.add_n([tf.reshape(loss, []) for loss in losses])


def follow_moments(model: Any) -> None:
    """Make every Normalization of `model` use its variables as they are; Keras copies them when it adapts a layer."""
    for layer in _normalizations(model):
        layer.finalize_state()


def _read_moments(model: Any, values: Mapping[int, Tensor]) -> None:
    """Make every Normalization of `model` use the symbolic `values` of its variables, by their ids."""
    for layer in _normalizations(model):
        mean, variance = values[id(layer.adapt_mean)], values[id(layer.adapt_variance)]
        layer.mean, layer.variance = (tf.reshape(value, layer.mean.shape) for value in (mean, variance))


def _normalizations(model: Any) -> list[Any]:
    """Return the Normalization layers of `model` whose mean and variance are variables."""
    layers = [layer for layer in every_layer(model) if isinstance(layer, keras.layers.Normalization)]
    return [layer for layer in layers if layer.built and layer.input_mean is None]


def _not_adapted(model: Any) -> list[Any]:
    """Return the Normalization layers of `model` with the mean 0 and variance 1 that Keras gives them at first."""
    layers = _normalizations(model)
    return [each for each in layers if not each.adapt_mean.numpy().any() and (each.adapt_variance.numpy() == 1).all()]


@contextlib.contextmanager
def unrolled(model: Any) -> Iterator[None]:
    """While it lasts every recurrent layer of `model` is unrolled: devices have no loop with a gradient."""
    layers = [layer for layer in every_layer(model) if isinstance(layer, keras.layers.RNN) and not layer.unroll]
    for layer in layers:
        layer.unroll = True
    try:
        yield
    finally:
        for layer in layers:
            layer.unroll = False


def told(error: Exception) -> str:
    """Return what TensorFlow or Keras says, on one line, without colours, and not all of it."""
    return re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))[:_LONGEST]


@contextlib.contextmanager
def _inlined() -> Iterator[None]:
    """While it lasts a tf.function within the model makes its operations where it is called."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextlib.contextmanager
def _labelled(model: Any) -> Iterator[None]:
    """While it lasts every operation is named after the layer that makes it; Keras' own scopes count up at random."""
    layers = every_layer(model)
    for layer in layers:
        vars(layer)["call"] = _in_scope(scope_of(layer.name), layer.call)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["call"]


def _in_scope(scope: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def labelled(*arguments: Any, **options: Any) -> Any:
        with tf.name_scope(scope):
            return call(*arguments, **options)

    return labelled


def every_layer(model: Any) -> list[Any]:
    """Return all layers of `model`, those within layers included, each once."""
    return list(model._flatten_layers(include_self=False, recursive=True))
