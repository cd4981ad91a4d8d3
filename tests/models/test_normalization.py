"""A Normalization layer: what its author adapted is part of the program, what nobody adapted the fleet fills in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.export import export, random_batches
from models.keras_reference import reference_of
from models.keras_training import training_of
from sottovoce.bundle import Bundle
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

keras, layers = tf.keras, tf.keras.layers
SETTINGS: dict[str, Any] = {"loss": "sparse_categorical_crossentropy", "optimizer": keras.optimizers.SGD(0.1)}
MOMENTS = {"mean": np.array([3, -2, 0.5, 1], np.float32), "variance": np.array([4, 0.25, 1, 9], np.float32)}


def model_of(*first: Any) -> Any:
    keras.utils.set_random_seed(2)
    body = [layers.Dense(5, activation="tanh", name="hidden"), layers.Dropout(0.2)]
    return keras.Sequential([keras.Input((4,)), *first, *body, layers.Dense(3, activation="softmax", name="last")])


def example(size: int = 6) -> Array:
    return np.random.default_rng(size).normal(2, 3, (size, 4)).astype(np.float32)


def predicted(bundle: Bundle, x: Array, **filled: Array) -> Array:
    return open_program(bundle).infer({**decode_tensors(bundle.initial), **filled}, {"x": x})["prediction"]


def test_what_nobody_adapted_is_broadcast_and_no_part_of_the_update() -> None:
    bundle = export(model_of(layers.Normalization()), **SETTINGS)
    names = [port.name for port in bundle.broadcast]
    assert names[4:] == ["mean", "variance", "learning_rate"]
    assert bundle.results[0].updates == ("hidden_kernel", "hidden_bias", "last_kernel", "last_bias")
    initial = decode_tensors(bundle.initial)
    assert initial["mean"].tolist() == [0.0] * 4
    assert initial["variance"].tolist() == [1.0] * 4


def test_filled_in_it_computes_what_keras_does_with_an_adapted_layer() -> None:
    model = model_of(layers.Normalization(name="first"))
    found = predicted(export(model, **SETTINGS), example(), **MOMENTS)
    first = model.get_layer("first")
    first.adapt_mean.assign(MOMENTS["mean"])
    first.adapt_variance.assign(MOMENTS["variance"])
    first.finalize_state()
    np.testing.assert_allclose(found, model(example()), atol=1e-6)


def test_it_trains_as_keras_does_and_keeps_what_it_was_given() -> None:
    model = model_of(layers.Normalization())
    bundle, training = export(model, **SETTINGS), training_of(model, **SETTINGS)
    broadcast = {**decode_tensors(bundle.initial), **MOMENTS}
    program, batches = open_program(bundle), random_batches(bundle.batch, "moments", (1, 3, 8, 3))
    state = program.begin(broadcast)
    for batch in batches:
        state, _ = program.step(state, batch)
    np.testing.assert_array_equal(state["local_variance"], MOMENTS["variance"])
    expected = reference_of(training, broadcast, batches)
    for name, value in program.finish(state, broadcast).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


def test_what_its_author_adapted_is_a_constant() -> None:
    adapted = layers.Normalization()
    adapted.adapt(example(50))
    model = model_of(adapted)
    bundle = export(model, **SETTINGS)
    assert not {"mean", "variance"} & {port.name for port in bundle.broadcast}
    np.testing.assert_allclose(predicted(bundle, example()), model(example()), atol=1e-6)


def test_two_of_them_are_named_after_their_layers() -> None:
    bundle = export(model_of(layers.Normalization(name="one"), layers.Normalization(name="two")), **SETTINGS)
    names = {port.name for port in bundle.broadcast}
    assert {"one_mean", "one_variance", "two_mean", "two_variance"} < names
    scaled = {"two_variance": np.full(4, 4.0, np.float32)}
    np.testing.assert_allclose(predicted(bundle, example(), **scaled), predicted(bundle, example() / 2), atol=1e-6)


@pytest.mark.parametrize("filled", [{}, MOMENTS])
def test_an_export_leaves_the_layer_as_it_was(filled: dict[str, Array]) -> None:
    first = layers.Normalization()
    model = model_of(first)
    if filled:
        first.adapt_mean.assign(filled["mean"])
        first.finalize_state()
    before = model(example()).numpy()
    export(model, **SETTINGS)
    np.testing.assert_array_equal(model(example()), before)
    assert np.isfinite(np.asarray(first.mean)).all()


@pytest.mark.slow
def test_a_training_whose_batches_grow_is_the_same_however_the_memory_lies() -> None:
    """With one interpreter for all sizes of a batch, a few of these trainings went wrong."""
    bundle = export(model_of(layers.Normalization()), **SETTINGS)
    broadcast = {**decode_tensors(bundle.initial), **MOMENTS}
    batches, random = random_batches(bundle.batch, "moments", (1, 3, 8, 3)), np.random.default_rng(1)
    results: set[bytes] = set()
    kept: list[Array] = []
    for _ in range(1500):
        program = open_program(bundle)
        state = program.begin(broadcast)
        for batch in batches:
            state, _ = program.step(state, batch)
        results.add(b"".join(value.tobytes() for value in program.finish(state, broadcast).values()))
        kept = [np.zeros(random.integers(1, 200_000), np.float32) + len(kept) for _ in range(random.integers(1, 8))]
    assert len(results) == 1
