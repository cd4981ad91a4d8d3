"""From a model to a bundle: what comes out works and is checked, what cannot work is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from models.export import Model, Tensors, export_model
from models.ops import Operations, Plain, Tensor
from models.zoo.layers import conv1d_weights, dense_weights
from sottovoce.bundle import Bundle, encode_bundle
from sottovoce.errors import BadBundle, SelfTestFailed
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors


def _forward(operations: Operations, weights: Tensors, constants: Tensors, x: Tensor) -> Tensor:
    # 13 times with stride 3 leave one over, and 4 taps with stride 3 are filled up: both edges of the folded stride.
    x = operations.relu(operations.conv1d(x, weights["first_kernel"], weights["first_bias"], stride=1))
    x = operations.conv1d(x * constants["gain"], weights["second_kernel"], weights["second_bias"], stride=3)
    return operations.dense(operations.average_over_time(x), weights["output_kernel"], weights["output_bias"])


def tiny() -> Model:
    random = np.random.default_rng(7)
    return Model(
        name="tiny",
        description="Two convolutions.",
        features="float32[?,15,2]",
        feature_range=(-1.0, 1.0),
        classes=3,
        weights={
            **conv1d_weights("first", random, taps=3, channels=2, filters=4),
            **conv1d_weights("second", random, taps=4, channels=4, filters=5),
            **dense_weights("output", random, inputs=5, outputs=3),
        },
        learning_rate=0.5,
        forward=_forward,
        constants={"gain": np.ones(1, np.float32)},
        test_constants={"gain": np.full(1, 1.5, np.float32)},
    )


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return export_model(tiny())


def test_a_model_becomes_a_bundle_with_five_roles_and_the_ports_of_its_kind(bundle: Bundle) -> None:
    model = tiny()
    assert set(bundle.roles) == {"begin", "step", "finish", "infer", "evaluate"}
    assert [port.name for port in bundle.broadcast] == [*model.weights, "gain", "learning_rate"]
    assert [port.name for port in bundle.state] == [f"local_{port.name}" for port in bundle.broadcast]
    assert [(port.name, port.type, port.low, port.high) for port in bundle.batch] == [
        ("x", "float32[?,15,2]", None, None),
        ("y", "int32[?]", 0, 2),
    ]
    (delta,) = bundle.results
    assert (delta.name, delta.updates) == ("delta", tuple(model.weights))
    assert [port.name for port in bundle.metrics] == ["loss", "correct"]
    assert [port.name for port in bundle.sums] == ["loss", "correct", "examples"]
    assert [port.type for port in bundle.predictions] == ["float32[?,3]"]
    initial = decode_tensors(bundle.initial)
    assert initial["learning_rate"].tolist() == [0.5]
    np.testing.assert_array_equal(initial["output_kernel"], model.weights["output_kernel"])


def test_labels_and_constants_are_used(bundle: Bundle) -> None:
    program = open_program(bundle)
    broadcast = decode_tensors(bundle.initial)
    batch = {"x": np.ones((2, 15, 2), np.float32), "y": np.array([0, 1], np.int32)}
    loss = program.evaluate(broadcast, batch)["loss"]
    assert program.evaluate(broadcast, {**batch, "y": batch["y"][::-1].copy() * 2})["loss"] != loss
    assert program.evaluate({**broadcast, "gain": np.zeros(1, np.float32)}, batch)["loss"] != loss


def test_two_exports_are_the_same_bytes(bundle: Bundle) -> None:
    assert encode_bundle(export_model(tiny())) == encode_bundle(bundle)


def test_a_program_that_disagrees_with_tensorflow_is_refused() -> None:
    def forward(operations: Operations, weights: Tensors, constants: Tensors, x: Tensor) -> Tensor:
        logits = _forward(operations, weights, constants, x)
        return logits if isinstance(operations, Plain) else logits * 1.01

    with pytest.raises(SelfTestFailed) as failure:
        export_model(dataclasses.replace(tiny(), forward=forward))
    assert failure.value.difference > failure.value.tolerance


def test_a_gradient_that_tflite_does_not_have_is_refused() -> None:
    def forward(operations: Operations, weights: Tensors, constants: Tensors, x: Tensor) -> Tensor:
        return tf.nn.elu(_forward(operations, weights, constants, x))

    with pytest.raises(BadBundle, match="tiny, step: TFLite has no built-in for this"):
        export_model(dataclasses.replace(tiny(), forward=forward))
