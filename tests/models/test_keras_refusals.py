"""What cannot be trained is refused in one sentence that names the layer, loss, metric or optimizer, and the cure.

Nothing is converted here: the linter and the exporter read the same findings.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.export import export
from models.gradients import CannotTrain
from models.keras_training import training_of
from models.lint import lint

keras, layers, ops = tf.keras, tf.keras.layers, tf.keras.ops


class Odd(layers.Layer):  # type: ignore[misc,name-defined]
    """A layer that computes what its author says."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__(name="odd")
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


class Counter(layers.Layer):  # type: ignore[misc,name-defined]
    """Counts its calls in a weight of whole numbers."""

    def build(self, shape: Any) -> None:
        self.calls = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False, name="calls")

    def call(self, x: Any) -> Any:
        self.calls.assign(self.calls + 1)
        return x


class Outside(layers.Layer):  # type: ignore[misc,name-defined]
    """Keeps a variable that Keras does not know."""

    def __init__(self) -> None:
        super().__init__(name="outside")
        self.scale = tf.Variable(2.0)

    def call(self, x: Any) -> Any:
        return x * self.scale


def around(*layers_between: Any, shape: tuple[int, ...] = (6,)) -> Any:
    """Return a model that learns before and after some layers."""
    first = layers.Dense(shape[-1], name="first")
    return keras.Sequential([keras.Input(shape), first, *layers_between, layers.Flatten(), layers.Dense(3)])


def _while(x: Any) -> Any:
    return tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 0.5), (0, x))[1]


@tf.custom_gradient  # type: ignore[untyped-decorator]
def _unchanged(x: Any) -> Any:
    return tf.round(x), lambda dy: dy


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "no built-in": (
        lambda: around(Odd(lambda x: tf.math.lgamma(x))),
        r"layer 'odd'( \(Odd\))? cannot run on a device: Lgamma is not among TFLite's built-ins; replace the layer",
    ),
    "no gradient": (
        lambda: around(Odd(lambda x: tf.math.top_k(x, 3).values)),
        r"layer 'odd'( \(Odd\))? only infers on a device: TopKV2 cannot be differentiated",
    ),
    "spectrum": (
        lambda: around(Odd(lambda x: tf.abs(tf.signal.rfft(x)))),
        "compute spectra before training, in the collection of examples",
    ),
    "loop": (lambda: around(Odd(_while)), "replace the loop by a recurrent layer of Keras"),
    "python": (
        lambda: around(Odd(lambda x: tf.ensure_shape(tf.py_function(tf.abs, [x], "float32"), [None, 6]))),
        r"layer 'odd'( \(Odd\))? cannot run on a device: EagerPyFunc is not .* built-ins; write it with keras.ops",
    ),
    "own gradient": (
        lambda: around(Odd(_unchanged)),
        r"layer 'odd'( \(Odd\))? only infers on a device: it has a gradient of its own .* x \+ keras.ops.stop_gradient",
    ),
    "own variable": (
        lambda: around(Outside()),
        r"layer 'outside'( \(Outside\))? cannot run on a device: ReadVariableOp",
    ),
    "half precision": (
        lambda: around(layers.Dense(4, dtype="mixed_float16", name="half")),
        r"layer 'half'( \(Dense\))? cannot run on a device: it computes with float16, and devices compute with float32",
    ),
    "double weights": (
        lambda: around(layers.Dense(4, dtype="float64", name="wide")),
        "wide/kernel' is float64; give its",
    ),
    "whole numbers that move": (lambda: around(Counter()), "calls' changes when the model is called, and is int32"),
    "constraint": (
        lambda: around(
            layers.TimeDistributed(layers.Dense(2, kernel_constraint="max_norm", name="held")), shape=(4, 6)
        ),
        r"layer 'held'( \(Dense\))? only infers on a device: its kernel has a constraint, which devices do not follow",
    ),
    "other examples": (
        lambda: around(Odd(lambda x: x - x[:1])),
        r"layer 'odd'( \(Odd\))? only infers on a device: StridedSlice takes a part of the batch; treat every",
    ),
    "groups": (
        lambda: around(layers.Conv2D(6, 3, groups=3, name="grouped"), shape=(8, 8, 3)),
        r"layer 'grouped'( \(Conv2D\))? only infers on a device: Conv2D convolves in groups; use DepthwiseConv2D",
    ),
    "loose operation": (
        lambda: keras.Model(x := keras.Input((6,)), ops.erfinv(layers.Dense(3)(x))),
        "Erfinv is not among TFLite's built-ins",
    ),
    "fixed batch": (
        lambda: keras.Model(x := keras.Input(batch_shape=(4, 5, 6)), layers.LSTM(2, stateful=True)(x)),
        r"has the fixed batch size 4; leave it out \(stateful=False\)",
    ),
    "sparse": (lambda: keras.Sequential([keras.Input((6,), sparse=True), layers.Dense(3)]), "is sparse or ragged"),
    "name of something else": (
        lambda: keras.Model(
            [x := keras.Input((6,), name="x"), y := keras.Input((6,), name="y")], layers.Dense(3)(x + y)
        ),
        "input 'y' has a name that means something else here",
    ),
    "no model": (lambda: layers.Dense(3), "Dense is no Keras model; put it into keras.Sequential"),
}


@pytest.mark.filterwarnings("ignore:Input layer 'x' is being built:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_by_its_layer_and_the_linter_says_the_same(name: str) -> None:
    make, text = MODELS[name]
    model = make()
    with pytest.raises(CannotTrain) as refused:
        export(model, loss="mse", optimizer="sgd")
    try:
        said = [f"layer {f.layer!r} ({f.kind}) {f.verdict} on a device: {f.problem}; {f.cure}" for f in lint(model)]
    except CannotTrain as error:
        said = [str(error)]
    assert re.search(text, str(refused.value)), refused.value
    assert any(re.search(text, each) for each in said), said
    assert "\n" not in str(refused.value)


def _total(y: Any, p: Any) -> Any:
    return ops.sum(ops.square(y - p))


def _sorted(y: Any, p: Any) -> Any:
    return ops.sum(ops.square(ops.sort(p, axis=-1) - y), axis=-1)


def accuracy(y: Any, p: Any) -> Any:
    """Return what is no accuracy."""
    return ops.mean(p, axis=-1)


class SGD(keras.optimizers.SGD):  # type: ignore[misc,name-defined]
    """Is called like Keras' own."""


def _without_decay_of_biases() -> Any:
    optimizer = keras.optimizers.AdamW(0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


losses = keras.losses
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"loss": _total}, "the loss '_total' gives one number for a whole batch; return one for each example"),
    ({"loss": losses.Dice()}, "the loss 'dice' gives one number for a whole batch"),
    ({"loss": _sorted}, "the loss '_sorted' does not run on devices: TopKV2 cannot be differentiated"),
    ({"loss": losses.Hinge()}, "the loss 'hinge' does not run on devices: "),
    ({"loss": losses.CTC()}, "the loss 'ctc' needs labels of another kind; use one of sparse_categorical"),
    ({"loss": lambda y, p: ops.sum(y) + p[:, :7] * ops.ones((5,))}, "cannot be computed from float labels"),
    ({"loss": losses.Poisson(reduction="none")}, "the loss 'poisson' with reduction='none'; leave it out"),
    ({"loss": losses.Poisson(dtype="float64")}, "the loss 'poisson' computes in float64"),
    ({"loss": None}, "give each output one"),
    ({"loss_weights": "much"}, "the loss weight 'much' is no number"),
    ({"metrics": [accuracy]}, "the metric 'accuracy' does not travel"),
    ({"optimizer": SGD(0.1)}, "the optimizer SGD does not run on devices"),
    ({"optimizer": _without_decay_of_biases()}, "exclude_from_weight_decay does not run on devices"),
    ({"optimizer": keras.optimizers.Lion()}, "the optimizer Lion does not run on devices; use keras.optimizers.SGD"),
    ({"optimizer": keras.optimizers.Adam(use_ema=True)}, "use_ema does not run on devices"),
    ({"proximal": -1.0}, "proximal is -1.0; it is a number of at least 0"),
    ({"batch_spec": {"x": "float32[3,6]"}}, "write it like float32"),
    ({"batch_spec": {"x": "nonsense"}}, "batch_spec, 'x': "),
    ({"batch_spec": {}}, "batch_spec names 0 inputs"),
]


@pytest.mark.parametrize(("settings", "text"), SETTINGS, ids=[text[:40] for _, text in SETTINGS])
def test_a_setting_is_refused_by_its_name(settings: dict[str, Any], text: str) -> None:
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    with pytest.raises(CannotTrain) as refused:
        training_of(model, **{"loss": "mse", "optimizer": "sgd", **settings})
    assert text in str(refused.value)


def test_what_keras_itself_cannot_compute_is_said_in_its_words() -> None:
    spread = layers.Conv1DTranspose(4, 3, dilation_rate=2)
    with pytest.raises(CannotTrain, match=r"Keras itself cannot train this model on this machine: .*dilation"):
        export(around(spread, shape=(8, 4)), loss="mse", optimizer="sgd")


def test_before_the_first_trained_weight_an_operation_must_only_run() -> None:
    def verdicts(function: Callable[[Any], Any]) -> list[str]:
        model = keras.Sequential([keras.Input((6,)), Odd(function), layers.Dense(3)])
        return [finding.verdict for finding in lint(model)]

    assert verdicts(lambda x: tf.math.top_k(x, 3).values) == ["has no weights", "trains"]
    assert verdicts(tf.math.lgamma) == ["cannot run", "trains"]


@pytest.mark.parametrize(
    "loss",
    [
        losses.KLDivergence(),
        losses.Poisson(),
        losses.CosineSimilarity(),
        losses.LogCosh(),
        losses.MeanSquaredLogarithmicError(),
        losses.MeanAbsolutePercentageError(),
        losses.BinaryFocalCrossentropy(apply_class_balancing=True, label_smoothing=0.1),
        losses.CategoricalFocalCrossentropy(),
        losses.CategoricalCrossentropy(label_smoothing=0.1),
        losses.BinaryCrossentropy(from_logits=True),
        losses.Huber(delta=0.2),
    ],
    ids=lambda loss: loss.name,
)
def test_a_loss_and_its_gradient_are_those_of_keras(loss: Any) -> None:
    training = training_of(keras.Sequential([keras.Input((6,)), layers.Dense(3)]), loss=loss, optimizer="sgd")
    random = np.random.default_rng(3)
    output, labels = (tf.constant(random.uniform(0.1, 0.9, (5, 3)), tf.float32) for _ in range(2))

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def ours(output: Any, labels: Any) -> Any:
        total = tf.reduce_mean(training.losses[0].per_example(output, labels))
        return total, tf.gradients(total, output)[0]

    with tf.GradientTape() as tape:
        tape.watch(output)
        total = loss(labels, output)
    for found, expected in zip(ours(output, labels), (total, tape.gradient(total, output)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_weight_that_is_no_number_is_named(is_frozen: bool) -> None:
    model = around()
    kernel = model.get_layer("first").kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    model.get_layer("first").trainable = not is_frozen
    with pytest.raises(CannotTrain, match="first/kernel' holds NaN; load the weights"):
        lint(model)
