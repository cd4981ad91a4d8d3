"""`sottovoce lint` and `sottovoce export`, as an author runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorflow as tf

from models.keras_command import peak_bytes
from models.keras_training import training_of
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
    printed = capsys.readouterr().out
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
    ],
)
def test_what_is_wrong_is_one_line(source: Path, model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    loss = ["--loss", "mse"] if model.endswith("bad") else []
    assert main(["export", model.format(source=source), "--out", str(source.parent / "x.svp"), *loss]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error


def test_the_estimated_memory_grows_with_the_batch_and_holds_the_state() -> None:
    model = tf.keras.Sequential([tf.keras.Input((5,)), layers.Dense(400), layers.Dense(3, activation="softmax")])
    training = training_of(model, loss="sparse_categorical_crossentropy", optimizer="adam")
    small, large = (peak_bytes(training, size) for size in (1, 100))
    assert small >= 2 * 3 * 4 * model.count_params()
    assert large - small >= 99 * 4 * 400
