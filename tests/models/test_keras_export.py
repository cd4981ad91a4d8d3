"""From a Keras model to a bundle: losses, optimizers, several inputs and outputs, frozen layers, and refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.export import bundle_of, export, random_batches, source_of
from models.keras_reference import reference_of
from models.keras_training import training_of
from models.program_export import DELTA
from sottovoce.bundle import Bundle
from sottovoce.errors import BadBundle, SelfTestFailed
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors

keras, layers = tf.keras, tf.keras.layers
SIZES = (1, 3, 8) * 6 + (1, 3)


def mlp(*, units: int = 3, activation: str | None = "softmax") -> Any:
    """Return a small multi-layer perceptron with the same weights at every call."""
    keras.utils.set_random_seed(1)
    hidden = layers.Dense(5, activation="tanh", name="hidden")
    return keras.Sequential([keras.Input((6,)), hidden, layers.Dense(units, activation=activation, name="last")])


def largest_difference(model: Any, **settings: Any) -> float:
    """Return how far a weight is from Keras' after 20 steps on the runtime; see `compared`."""
    return compared(model, SIZES, **settings)[0]


def compared(model: Any, sizes: Sequence[int] = SIZES[:7], **settings: Any) -> tuple[float, Bundle]:
    """Return how far a weight is from Keras' after batches of `sizes`, and the bundle; metrics are held too."""
    training = training_of(model, **settings)
    program = open_program(bundle := bundle_of(source_of(training, model.name, "")))
    broadcast = decode_tensors(bundle.initial)
    batches = random_batches(bundle.batch, "losses", sizes)
    expected = reference_of(training, broadcast, batches)
    state, totals = program.begin(broadcast), {port.name: 0.0 for port in bundle.metrics}
    for batch in batches:
        state, metrics = program.step(state, batch)
        totals = {name: total + float(metrics[name][0]) for name, total in totals.items()}
    found = program.finish(state, broadcast)
    assert all(np.abs(value).max() > 1e-4 for value in found.values()), "a weight was not learned"
    assert totals == pytest.approx({name: float(expected[name][0]) for name in totals}, rel=1e-4)
    return max(float(np.abs(value - expected[name]).max()) for name, value in found.items()), bundle


def mean_squared_error(labels: Any, output: Any) -> Any:
    """Return an author's loss, which is called like one of Keras."""
    return 3.0 * keras.ops.mean(keras.ops.power(labels - output, 2) * keras.ops.sigmoid(output), axis=-1)


LOSSES: dict[str, tuple[Any, int, str | None]] = {
    "sparse": ("sparse_categorical_crossentropy", 3, "softmax"),
    "sparse_of_logits": (keras.losses.SparseCategoricalCrossentropy(from_logits=True), 3, None),
    "categorical": (keras.losses.CategoricalCrossentropy(label_smoothing=0.1), 3, "softmax"),
    "categorical_of_logits": (keras.losses.CategoricalCrossentropy(from_logits=True), 3, None),
    "binary": ("binary_crossentropy", 2, "sigmoid"),
    "binary_of_logits": (keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.2), 1, None),
    "mse": ("mse", 2, None),
    "mae": ("mae", 2, None),
    "huber": (keras.losses.Huber(delta=0.4), 2, None),
    "poisson": ("poisson", 2, "exponential"),
    "kl_divergence": (keras.losses.KLDivergence(), 3, "softmax"),
    "cosine": (keras.losses.CosineSimilarity(), 3, None),
    "log_cosh": (keras.losses.LogCosh(), 2, None),
    "focal": (keras.losses.CategoricalFocalCrossentropy(), 3, "softmax"),
    "own": (mean_squared_error, 2, None),
    "not_from_a_softmax": ("sparse_categorical_crossentropy", 3, "sigmoid"),
}
OPTIMIZERS: dict[str, tuple[Any, float, float]] = {
    "sgd": (lambda: keras.optimizers.SGD(0.1), 0.0, 1e-5),
    "momentum": (lambda: keras.optimizers.SGD(0.05, momentum=0.9), 0.0, 1e-5),
    "nesterov": (lambda: keras.optimizers.SGD(0.05, momentum=0.8, nesterov=True), 0.0, 1e-5),
    "adam": (lambda: keras.optimizers.Adam(0.01), 0.0, 5e-5),
    "weight_decay": (lambda: keras.optimizers.SGD(0.1, weight_decay=0.1), 0.0, 1e-5),
    "clipping": (lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.3), 0.0, 1e-5),
    "clipping_each": (lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.1), 0.0, 1e-5),
    "clipping_entries": (lambda: keras.optimizers.SGD(0.1, clipvalue=0.02), 0.0, 1e-5),
    "adamw_clipped": (lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.3), 0.0, 5e-5),
    "proximal": (lambda: keras.optimizers.SGD(0.1), 0.5, 1e-5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_keras_own(name: str) -> None:
    loss, units, activation = LOSSES[name]
    model = mlp(units=units, activation=activation)
    assert largest_difference(model, loss=loss, optimizer=keras.optimizers.SGD(0.1)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_keras_own(name: str) -> None:
    make, proximal, tolerance = OPTIMIZERS[name]
    settings = {"loss": "sparse_categorical_crossentropy", "optimizer": make(), "proximal": proximal}
    assert largest_difference(mlp(), **settings) <= tolerance


@pytest.mark.parametrize(
    ("loss", "optimizer", "proximal"), [("huber", "adamw_clipped", 0.5), ("own", "clipping_each", 0.0)]
)
def test_a_loss_and_an_optimizer_are_keras_own(loss: str, optimizer: str, proximal: float) -> None:
    (given, units, activation), (make, _, tolerance) = LOSSES[loss], OPTIMIZERS[optimizer]
    model = mlp(units=units, activation=activation)
    assert compared(model, loss=given, optimizer=make(), proximal=proximal)[0] <= tolerance


def test_the_proximal_term_holds_a_weight_back() -> None:
    moved = {}
    for mu in (0.0, 5.0):
        training = training_of(mlp(), loss="sparse_categorical_crossentropy", optimizer="sgd", proximal=mu)
        initial = training.initial()
        ports = (*training.traced.features, *training.labels)
        found = reference_of(
            training, {**initial, "learning_rate": np.float32([0.1])}, random_batches(ports, "m", SIZES)
        )
        moved[mu] = math.sqrt(sum(float((found[DELTA + name] ** 2).sum()) for name in training.learned))
    assert moved[5.0] < 0.8 * moved[0.0]


def test_several_inputs_outputs_and_a_shared_layer() -> None:
    keras.utils.set_random_seed(1)
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    shared = layers.Dense(5, activation="relu", name="shared")
    both = layers.Concatenate()([shared(left), shared(right), layers.Multiply()([left, right])])
    one = layers.Dense(3, activation="softmax", name="one")(both)
    two = layers.Dense(1, name="two")(layers.Add()([shared(left), shared(right)]))
    model = keras.Model([left, right], [one, two])
    settings = {
        "loss": {"two": "mse", "one": "sparse_categorical_crossentropy"},
        "optimizer": keras.optimizers.SGD(0.1),
        "metrics": {"one": ["accuracy"], "two": [keras.metrics.MeanAbsoluteError(), "mse"]},
        "loss_weights": [1.0, 0.5],
    }
    difference, bundle = compared(model, **settings)
    assert difference <= 1e-5
    counted = ["correct_prediction_0", "absolute_error_prediction_1", "squared_error_prediction_1"]
    assert [port.name for port in bundle.sums] == ["loss", *counted, "examples"]
    evaluated_by_keras(model, bundle, **settings)
    assert [port.name for port in bundle.batch] == ["left", "right", "y_0", "y_1"]
    assert [port.name for port in bundle.predictions] == ["prediction_0", "prediction_1"]


def evaluated_by_keras(model: Any, bundle: Bundle, **settings: Any) -> None:
    """Hold what the role evaluate adds up against `model.evaluate`."""
    model.compile(**settings)
    batch = random_batches(bundle.batch, "evaluated", (7,))[0]
    features = [batch[port.name] for port in bundle.batch if port.name in bundle.features]
    labels = [batch[port.name] for port in bundle.batch if port.name not in bundle.features]
    expected = model.evaluate(features, labels, batch_size=7, verbose=0, return_dict=True)
    found = open_program(bundle).evaluate(decode_tensors(bundle.initial), batch)
    assert found.pop("examples")[0] == 7
    pairs = {
        "loss": "loss",
        "correct_prediction_0": "one_accuracy",
        "absolute_error_prediction_1": "two_mean_absolute_error",
        "squared_error_prediction_1": "two_mse",
    }
    assert {pairs[name]: float(total[0]) / 7 for name, total in found.items()} == pytest.approx(
        {name: expected[name] for name in pairs.values()}, rel=1e-5
    )


def test_outputs_in_a_dict_name_their_ports() -> None:
    x = keras.Input((4,), name="x")
    outputs = {"steps": layers.Dense(1)(x), "mood": layers.Dense(3, activation="softmax")(x)}
    loss = {"steps": "mse", "mood": "sparse_categorical_crossentropy"}
    training = training_of(keras.Model(x, outputs), loss=loss, optimizer="sgd")
    assert [port.name for port in training.outputs] == ["prediction_mood", "prediction_steps"]
    assert [(port.name, port.type) for port in training.labels] == [("y_mood", "int32[?]"), ("y_steps", "float32[?,1]")]
    assert training.metrics == ("loss", "correct_prediction_mood")


@pytest.mark.parametrize(
    ("metrics", "counted"),
    [
        (None, ("loss", "correct")),
        ([], ("loss",)),
        (["acc", "sparse_categorical_accuracy"], ("loss", "correct")),
        (keras.metrics.SparseCategoricalAccuracy(name="mine"), ("loss", "correct")),
    ],
)
def test_metrics_are_those_that_were_asked_for(metrics: Any, counted: tuple[str, ...]) -> None:
    training = training_of(mlp(), loss="sparse_categorical_crossentropy", optimizer="sgd", metrics=metrics)
    assert training.metrics == counted


def test_a_frozen_layer_and_a_regularised_one() -> None:
    model = mlp()
    model.get_layer("hidden").trainable = False
    model.get_layer("last").kernel_regularizer = keras.regularizers.L2(0.1)
    settings = {"loss": "sparse_categorical_crossentropy", "optimizer": keras.optimizers.SGD(0.1)}
    difference, bundle = compared(model, **settings)
    assert difference <= 1e-5
    assert [port.name for port in bundle.broadcast] == ["last_kernel", "last_bias", "learning_rate"]
    assert bundle.results[0].updates == ("last_kernel", "last_bias")


def test_a_subclassed_model_and_a_layer_that_nobody_foresaw() -> None:
    class Scale(layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.gain = self.add_weight(shape=(shape[-1],), initializer="ones", name="gain")

        def call(self, x: Any) -> Any:
            return keras.ops.sqrt(keras.ops.abs(x * self.gain) + 1.0) - keras.ops.log1p(keras.ops.square(x))

    class Own(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.last = Scale(), layers.Dense(3, activation="softmax")

        def call(self, x: Any, training: bool = False) -> Any:
            return self.last(self.scale(x))

    keras.utils.set_random_seed(1)
    model = Own()
    model(np.zeros((1, 6), np.float32))
    settings = {"loss": "sparse_categorical_crossentropy", "batch_spec": {"x": "float32[?,6]"}}
    assert compared(model, **settings, optimizer=keras.optimizers.SGD(0.1))[0] <= 1e-5


def test_an_export_leaves_the_model_as_it_was() -> None:
    model = keras.Sequential([keras.Input((2, 3)), layers.SimpleRNN(2), layers.BatchNormalization(), layers.Dense(3)])
    before = [value.copy() for value in model.get_weights()]
    export(model, loss="mse", optimizer="sgd")
    for value, first in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, first)
    assert model.layers[0].unroll is False
    assert "call" not in vars(model.layers[0])


def test_masks_differ_between_steps_devices_and_rows() -> None:
    model = keras.Sequential([keras.Input((40,)), layers.Dropout(0.5), layers.Dense(3, activation="softmax")])
    program = open_program(bundle := export(model, loss="sparse_categorical_crossentropy", optimizer="sgd"))
    broadcast = decode_tensors(bundle.initial)
    same = {"x": np.ones((2, 40), np.float32), "y": np.zeros(2, np.int32)}
    other = {**same, "x": same["x"] * 1.25}
    state = program.begin(broadcast)
    after, first = program.step(state, same)
    assert program.step(state, same)[1]["loss"] == first["loss"]
    assert program.step({**state, "local_steps": after["local_steps"]}, same)[1]["loss"] != first["loss"]
    kernel = "local_" + next(name for name in broadcast if name.endswith("kernel"))
    moved = [program.step(state, batch)[0][kernel] - state[kernel] for batch in (same, other)]
    kept = [np.abs(each).max(axis=1) > 0 for each in moved]
    assert not np.array_equal(*kept)
    # Two rows of the same values: with one mask for both, half of the inputs would get no gradient, not a quarter.
    assert 20 < kept[0].sum() < 40


def test_what_cannot_be_trained_is_refused_with_the_layer_and_the_cure() -> None:
    up = layers.UpSampling2D(2, interpolation="bilinear", name="enlarge")
    model = keras.Sequential([keras.Input((3, 3, 1)), layers.Conv2D(2, 2), up, layers.Flatten(), layers.Dense(2)])
    with pytest.raises(BadBundle, match=r"layer 'enlarge' \(UpSampling2D\).*ResizeBilinear.*replace UpSampling2D"):
        export(model, loss="mse", optimizer="sgd")
    with pytest.raises(BadBundle, match="fix the others"):
        export(keras.Sequential([keras.Input((None, 3)), layers.GRU(2)]), loss="mse", optimizer="sgd")
    with pytest.raises(BadBundle, match="no weights yet"):
        export(keras.Sequential([layers.Dense(2)]), loss="mse", optimizer="sgd")
    masked = [keras.Input((4,), dtype="int32"), layers.Embedding(5, 3, mask_zero=True), layers.Dense(2)]
    with pytest.raises(BadBundle, match="set mask_zero=False"):
        export(keras.Sequential(masked), loss="mse", optimizer="sgd")
    with pytest.raises(BadBundle, match="no weight to train"):
        export(keras.Sequential([keras.Input((3,)), layers.ReLU()]), loss="mse", optimizer="sgd")


def test_what_the_converter_does_not_know_is_named_by_its_layer() -> None:
    class Lookup(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x * tf.cast(tf.math.is_finite(tf.cast(tf.stop_gradient(x), tf.float64)), tf.float32)

    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), Lookup(name="lookup"), layers.Dense(3)])
    with pytest.raises(BadBundle, match="layer 'lookup'"):
        export(model, loss="mse", optimizer="sgd")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"loss": ["mse", "mse"]}, "1 outputs and 2 losses"),
        ({"loss": "nonsense"}, "no loss 'nonsense'; use one of sparse_categorical"),
        ({"loss": {"first": "mse"}}, "losses name 'first', which is no output; the outputs are last"),
        ({"loss": {}}, "losses do not name the output 'last'"),
        ({"loss": "sparse_categorical_crossentropy", "metrics": ["mae"]}, "class numbers .*; use accuracy"),
        ({"metrics": ["accuracy"]}, "'accuracy' of an output with the loss mean_squared_error"),
        ({"metrics": ["auc"]}, "the metric 'AUC' does not travel"),
        ({"metrics": [keras.metrics.Precision()]}, "the metric 'Precision' does not travel"),
        ({"loss": "categorical_crossentropy", "metrics": ["sparse_categorical_accuracy"]}, "does not fit the labels"),
        ({"loss": "binary_crossentropy", "metrics": [keras.metrics.BinaryAccuracy(threshold=0.3)]}, "threshold"),
        ({"optimizer": "nonsense"}, "no optimizer 'nonsense'"),
        ({"optimizer": "rmsprop"}, "RMSprop does not run on devices"),
        ({"optimizer": keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9))}, "schedule"),
    ],
)
def test_settings_that_devices_do_not_follow_are_refused(settings: Any, text: str) -> None:
    with pytest.raises(BadBundle, match=text):
        training_of(mlp(activation=None), **{"loss": "mse", "optimizer": "sgd", **settings})


def test_a_bundle_that_disagrees_with_keras_is_not_written(tmp_path: Path) -> None:
    class Sly(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x * (1.0 if tf.executing_eagerly() else 1.1)

    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), Sly(), layers.Dense(3)])
    with pytest.raises(SelfTestFailed):
        export(model, loss="mse", optimizer=keras.optimizers.SGD(0.1), path=tmp_path / "sly.svp")
    assert not (tmp_path / "sly.svp").exists()


def test_a_frozen_backbone_as_int8_under_a_head_that_learns() -> None:
    keras.utils.set_random_seed(1)
    backbone = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
        ],
        name="backbone",
    )
    backbone.trainable = False
    model = keras.Sequential([keras.Input((8, 8, 3)), backbone, layers.Dense(4, activation="softmax", name="head")])
    settings = {"loss": "sparse_categorical_crossentropy", "optimizer": keras.optimizers.SGD(0.5)}
    difference, small = compared(model, **settings, int8=True)
    assert difference <= 1e-5
    assert small.results[0].updates == ("head_kernel", "head_bias")
    assert len(small.flatbuffers["step"]) < 4 * backbone.count_params()


def _mobile_net() -> Any:
    """Return a little MobileNet for pixels of 0..255; smaller ones leave its rectifiers on their edges."""
    keras.utils.set_random_seed(0)
    blocks = [layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False), layers.BatchNormalization()]
    for _ in range(3):
        blocks += [layers.ReLU(6.0), layers.Conv2D(32, 1, use_bias=False), layers.BatchNormalization()]
        blocks += [layers.ReLU(6.0), layers.DepthwiseConv2D(3, padding="same", use_bias=False)]
        blocks += [layers.BatchNormalization()]
    ends = [layers.ReLU(6.0), layers.GlobalAveragePooling2D(), layers.Dense(5)]
    return keras.Sequential([keras.Input((16, 16, 3)), layers.Rescaling(1 / 127.5, offset=-1), *blocks, *ends])


def test_the_self_test_is_not_decided_by_rounding() -> None:
    """Weights that differ in their last bit, as devices do, learn the same of its batches."""
    training = training_of(_mobile_net(), loss=keras.losses.SparseCategoricalCrossentropy(True), optimizer="sgd")
    for name in ("first", "a"):
        source = source_of(training, name, "")
        broadcast = {**source.initial, **source.test_broadcast}
        near = {each: np.nextafter(value, np.float32(9)) for each, value in broadcast.items()}
        here, there = (source.reference(each, source.test_batches) for each in (broadcast, near))
        assert max(np.abs(here[each] - there[each]).max() for each in here) <= source.tolerance
