"""Exported Keras models on the runtimes of other devices: tflite-runtime beside numpy 1, and LiteRT on aarch64.

Each runs 20 steps with batches of 1, 3 and 8 in an environment of its own; what it has learned is held against Keras.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.export import export, random_batches
from models.keras_reference import reference_of
from models.keras_training import training_of
from models.zoo.har_gru import har_gru
from models.zoo.two_nn import two_nn
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array

pytestmark = pytest.mark.slow

keras, layers = tf.keras, tf.keras.layers
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SIZES = (1, 3, 8) * 6 + (1, 3)
LEARN = """
import platform, sys
from pathlib import Path
import numpy
from sottovoce.bundle import read_bundle
from sottovoce.runtime import open_program, run_self_test, runtime_name
from sottovoce.tensors import decode_tensors, encode_tensors
runtime, *paths = sys.argv[1:]
for path in map(Path, paths):
    bundle, _ = read_bundle(path)
    program = open_program(bundle, runtime=runtime)
    run_self_test(bundle, program)
    broadcast = decode_tensors(bundle.initial)
    state = program.begin(broadcast)
    for batch in sorted(path.parent.glob(path.stem + ".batch*")):
        state, _ = program.step(state, decode_tensors(batch.read_bytes()))
    path.with_suffix(".learned").write_bytes(encode_tensors(program.finish(state, broadcast)))
print(runtime_name(runtime), platform.machine(), "numpy", numpy.__version__)
"""


def mlp_with_adam() -> Any:
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(16, activation="gelu"), layers.Dropout(0.2), layers.Dense(3)]
    )
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(0.01))
    return model


def small_cnn() -> Any:
    model = keras.Sequential(
        [
            keras.Input((12, 12, 2)),
            layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2DTranspose(4, 3, strides=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, activation="softmax"),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.05))
    return model


MODELS: dict[str, tuple[Callable[[], Any], float]] = {
    "mlp_with_adam": (mlp_with_adam, 5e-5),
    "small_cnn": (small_cnn, 1e-5),
    "har_gru": (har_gru, 5e-5),
    "two_nn": (two_nn, 1e-5),
}
"""Name -> (model, largest difference of a weight from Keras)."""


@dataclass(frozen=True)
class Exported:
    """Bundles and batches in a folder, and what Keras learns of these batches."""

    folder: Path
    expected: dict[str, dict[str, Array]]

    def differences(self, command: str, names: Iterable[str], runtime: str) -> tuple[str, dict[str, float]]:
        """Run `names` under a script; return what it says of itself, and how far a weight is from Keras' at most."""
        paths = [str(self.folder / f"{name}.svp") for name in names]
        done = subprocess.run(
            [*command.split(), "-c", LEARN, runtime, *paths], cwd=SCRIPTS, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = {name: decode_tensors((self.folder / f"{name}.learned").read_bytes()) for name in names}
        return done.stdout.strip(), {
            name: max(float(np.abs(value - self.expected[name][port]).max()) for port, value in tensors.items())
            for name, tensors in found.items()
        }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder, expected = tmp_path_factory.mktemp("bundles"), {}
    for name, (make, _) in MODELS.items():
        keras.utils.set_random_seed(2)
        model = make()
        settings = {"loss": model.loss, "optimizer": model.optimizer}
        bundle = export(model, **settings, name=name, path=folder / f"{name}.svp")
        batches = random_batches(bundle.batch, "runtimes", SIZES)
        for at, batch in enumerate(batches):
            (folder / f"{name}.batch{at:02d}").write_bytes(encode_tensors(batch))
        expected[name] = reference_of(training_of(model, **settings), decode_tensors(bundle.initial), batches)
        assert all(np.abs(expected[name][port.name]).max() > 1e-4 for port in bundle.results[0].ports)
    return Exported(folder, expected)


def test_tflite_runtime_beside_numpy_1_learns_as_keras(exported: Exported) -> None:
    told, found = exported.differences("./tflite-python", MODELS, "tflite")
    assert told.startswith("tflite-runtime 2.14")
    assert "numpy 1." in told
    assert {name: value for name, value in found.items() if value > MODELS[name][1]} == {}


def test_litert_on_aarch64_learns_as_keras(exported: Exported) -> None:
    names = ["two_nn", "har_gru"]
    told, found = exported.differences("./emulated-agent run -- python3", names, "litert")
    assert "aarch64" in told
    assert {name: value for name, value in found.items() if value > MODELS[name][1]} == {}
