"""`sottovoce lint` and `sottovoce export`, as an author runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorflow as tf

from models.keras_command import peak_bytes
from models.keras_training import training_of
from models.lint import lint
from sottovoce.__main__ import main
from sottovoce.bundle import read_bundle

layers = tf.keras.layers
_SOURCE = """
import tensorflow as tf
layers = tf.keras.layers

def good():
    frozen = layers.Dense(4, name="old", trainable=False)
    return tf.keras.Sequential([tf.keras.Input((6,)), frozen, layers.Dense(3, activation="softmax", name="new")])

def bad():
    up = layers.UpSampling2D(2, interpolation="bilinear", name="enlarge")
    return tf.keras.Sequential([tf.keras.Input((3, 3, 1)), layers.Conv2D(2, 2, name="see"), up])

class Halve(layers.Layer):
    def call(self, x):
        return tf.while_loop(lambda x: tf.reduce_max(x) > 1.0, lambda x: [x / 2.0], [x])[0]

class Mean(layers.Layer):
    def call(self, x):
        return tf.reduce_mean(x)

class Length(layers.Layer):
    def call(self, x):
        return tf.cast(tf.strings.length(x), "float32")

class Host(layers.Layer):
    def call(self, x):
        return tf.constant(x.numpy())

def image(*between):
    see, last = layers.Conv2D(3, 1, name="see"), layers.Dense(2)
    return tf.keras.Sequential([tf.keras.Input((4, 4, 3)), see, *between, layers.Flatten(), last])

def contrast():
    return image(layers.Lambda(lambda x: tf.image.adjust_contrast(x, 2.0), name="contrast"))

def loop():
    return image(Halve(name="halve"))

def host():
    return image(Host(name="host"))

def mean():
    x = tf.keras.Input((4,))
    return tf.keras.Model(x, Mean(name="mean")(layers.Dense(2)(x)))

def volume():
    deep = [layers.Conv3D(1, 1), layers.Conv3D(1, 2, name="volume"), layers.Flatten(), layers.Dense(2)]
    return tf.keras.Sequential([tf.keras.Input((4, 4, 4, 1)), *deep])

def noise():
    return image(layers.GaussianNoise(0.1, name="noise"))

def first():
    return image(layers.Conv2D(2, 1, data_format="channels_first", name="first"))

def held():
    return image(layers.Conv2D(2, 1, kernel_constraint="max_norm", name="held"))

def words():
    x = tf.keras.Input((1,), dtype="string")
    return tf.keras.Model(x, layers.Dense(1)(Length(name="length")(x)))

"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "my_models.py"
    path.write_text(_SOURCE)
    return path


def test_the_table_says_what_each_layer_will_do(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", f"{source}:bad"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["see", "Conv2D", "10", "trains"] in lines
    assert ["enlarge", "UpSampling2D", "0", "only", "infers"] in lines
    assert lines[-1][:2] == ["enlarge:", "ResizeBilinear"]
    assert main(["lint", f"{source}:good"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["old", "Dense", "28", "frozen"], ["new", "Dense", "15", "trains"]]


def test_an_export_says_what_the_bundle_costs(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.parent / "good.svp"
    arguments = ["export", f"{source}:good", "--out", str(out), "--loss", "sparse_categorical_crossentropy"]
    assert main(arguments) == 0
    printed, progress = capsys.readouterr()
    assert "now converting" in progress
    assert f"{out.stat().st_size} bytes" in printed
    assert "15 learned, 28 frozen" in printed
    assert "ms for a step of 10" in printed
    assert read_bundle(out)[0].results[0].updates == ("new_kernel", "new_bias")


# Keras' own way of reading a variable does not know numpy's newest argument.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_saved_model_brings_its_loss_and_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tf.keras.Sequential([tf.keras.Input((6,)), layers.Dense(3, name="only")])
    model.compile(loss="mse", optimizer=tf.keras.optimizers.SGD(0.1, momentum=0.5))
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "saved.keras")
    assert main(["export", str(tmp_path / "saved.keras"), "--out", str(tmp_path / "saved.svp")]) == 0
    state = [port.name for port in read_bundle(tmp_path / "saved.svp")[0].state]
    assert "local_momentum_only_kernel" in state


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("nowhere.keras", "there is no file nowhere.keras"),
        ("nowhere", "neither a .keras file"),
        ("{source}:missing", "has no 'missing'"),
        ("{source}:layers", "not a Keras model"),
        ("{source}:bad", "replace UpSampling2D"),
        ("{source}:good", "name its loss"),
        ("{source}:contrast", "layer 'contrast' (Lambda) cannot run on a device: AdjustContrastv2"),
        ("{source}:loop", "replace the loop by a recurrent layer"),
        ("{source}:host", "my_models.py, line 27: AttributeError"),
        ("{source}:mean", "layer 'mean' gives the model's output the shape ()"),
        ("missing_module:model", "cannot import missing_module"),
        ("{source}:volume", "replace Conv3D by Conv2D"),
        ("{source}:noise", "replace GaussianNoise by Dropout"),
        ("{source}:first", "data_format='channels_last'"),
        ("{source}:held", "has a constraint"),
        ("{source}:words", "input 'x' is of string"),
    ],
)
def test_what_is_wrong_is_one_line(source: Path, model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    loss = [] if model.endswith("good") else ["--loss", "mse"]
    assert main(["export", model.format(source=source), "--out", str(source.parent / "x.svp"), *loss]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error


# As above.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("command", ["lint", "export"])
def test_a_saved_model_with_a_function_of_its_authors_is_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    contrast = layers.Lambda(lambda x: tf.image.adjust_contrast(x, 2.0), name="contrast")
    tf.keras.Sequential([tf.keras.Input((2, 2, 3)), contrast]).save(tmp_path / "saved.keras")
    out = [] if command == "lint" else ["--out", str(tmp_path / "saved.svp"), "--loss", "mse"]
    assert main([command, str(tmp_path / "saved.keras"), *out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "file.py:function" in error


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--loss", "sparse_categorical_crossentropy", "--metrics", "auc"], "the metric 'AUC' does not travel"),
        (["--loss", "mse", "--metrics", "accuracy"], "use mean_absolute_error"),
        (["--loss", "mse", "--batch-size", "0"], "at least one example"),
        (["--loss", "mse", "--optimizer", "rmsprop"], "use keras.optimizers.SGD"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    source: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"{source}:good", "--out", str(source.parent / "x.svp"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error


def test_what_comes_before_the_first_trained_weight_needs_no_gradient() -> None:
    resize = layers.UpSampling2D(2, interpolation="bilinear", name="enlarge")
    body = [resize, layers.Flatten(), layers.Dense(2)]
    model = tf.keras.Sequential([tf.keras.Input((3, 3, 1)), *body])
    assert not [finding for finding in lint(model) if finding.problem]
    head = layers.Conv2D(1, 1)
    assert [f.layer for f in lint(tf.keras.Sequential([tf.keras.Input((3, 3, 1)), head, *body])) if f.problem] == [
        "enlarge"
    ]


def test_the_estimated_memory_grows_with_the_batch_and_holds_the_state() -> None:
    model = tf.keras.Sequential([tf.keras.Input((5,)), layers.Dense(400), layers.Dense(3, activation="softmax")])
    training = training_of(model, loss="sparse_categorical_crossentropy", optimizer="adam")
    small, large = (peak_bytes(training, size) for size in (1, 100))
    assert small >= 2 * 3 * 4 * model.count_params()
    assert large - small >= 99 * 4 * 400
