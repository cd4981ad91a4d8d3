"""The client programs of SCAFFOLD and of personalised evaluation: what their roles compute, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.personalised import export_personalised
from models.scaffold import export_scaffold
from sottovoce.bundle import NEXT, Bundle
from sottovoce.errors import BadBundle, SelfTestFailed
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

keras, layers = tf.keras, tf.keras.layers
WEIGHTS = {"output_kernel": (4, 3), "output_bias": (3,)}
LOSS = "sparse_categorical_crossentropy"


def tiny(*before: Any) -> Any:
    """Return one layer, after others that are given."""
    output = layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(seed=7), name="output")
    return keras.Sequential([keras.Input((4,)), *before, output, layers.Softmax()], name="tiny")


def sgd(**options: Any) -> Any:
    return keras.optimizers.SGD(0.5, **options)


class Inconstant(tf.keras.layers.Layer):  # type: ignore[misc]
    """Computes something else when a graph is made of it."""

    def call(self, x: Any) -> Any:
        return x if tf.executing_eagerly() else x * 1.05


def batch(size: int) -> dict[str, Array]:
    random = np.random.default_rng(size)
    return {"x": random.normal(size=(size, 4)).astype(np.float32), "y": random.integers(3, size=size, dtype=np.int32)}


@pytest.fixture(scope="module")
def scaffold() -> Bundle:
    return export_scaffold(tiny(layers.Normalization()), loss=LOSS, optimizer=sgd())


@pytest.fixture(scope="module")
def personalised() -> Bundle:
    return export_personalised(tiny(), loss=LOSS, optimizer=sgd(), steps=2)


def test_scaffold_has_its_ports_and_a_slot(scaffold: Bundle) -> None:
    assert set(scaffold.roles) == {"begin", "step", "finish", "infer", "evaluate"}
    assert [port.name for port in scaffold.broadcast] == [
        "output_kernel", "output_bias", "mean", "variance", "learning_rate",
        "control_output_kernel", "control_output_bias",
    ]  # fmt: skip
    assert [result.name for result in scaffold.results] == ["delta", "control_delta"]
    assert [result.updates for result in scaffold.results] == [("output_kernel", "output_bias"), ()]
    assert scaffold.client_state is not None
    assert scaffold.client_state.slot == "scaffold-tiny"


def test_every_step_is_corrected_by_the_difference_of_the_controls(scaffold: Bundle) -> None:
    program, broadcast = open_program(scaffold), decode_tensors(scaffold.initial)
    own = {
        "own_control_output_kernel": np.full((4, 3), 0.3, np.float32),
        "own_control_output_bias": np.zeros(3, np.float32),
    }
    control = {"control_output_kernel": np.full((4, 3), 0.5, np.float32)}
    zeros = {name: np.zeros_like(value) for name, value in own.items()}
    plain, _ = program.step(program.begin(broadcast, zeros), batch(6))
    corrected, _ = program.step(program.begin({**broadcast, **control}, own), batch(6))
    moved = corrected["local_output_kernel"] - plain["local_output_kernel"]
    np.testing.assert_allclose(moved, np.full((4, 3), -0.5 * (0.5 - 0.3)), atol=1e-6)
    np.testing.assert_allclose(corrected["local_output_bias"], plain["local_output_bias"], atol=1e-6)


def test_the_next_control_is_that_of_option_ii(scaffold: Bundle) -> None:
    program = open_program(scaffold)
    random = np.random.default_rng(3)
    own = {
        port.name: random.normal(size=port.tensor_type.shape).astype(np.float32) for port in scaffold.client_state_ports
    }
    drawn = {f"control_{name}": random.normal(size=shape).astype(np.float32) for name, shape in WEIGHTS.items()}
    broadcast = {**decode_tensors(scaffold.initial), **drawn}
    state = program.begin(broadcast, own)
    for size in (3, 5):
        state, _ = program.step(state, batch(size))
    finished = program.finish(state, broadcast)
    for name in WEIGHTS:
        delta, control, before = finished[f"delta_{name}"], drawn[f"control_{name}"], own[f"own_control_{name}"]
        expected = before - control - delta / (2 * 0.5)
        np.testing.assert_allclose(finished[f"{NEXT}own_control_{name}"], expected, atol=1e-5)
        np.testing.assert_allclose(finished[f"delta_control_{name}"], expected - before, atol=1e-5)


def test_a_trial_scores_rows_that_the_fine_tuning_has_not_seen(personalised: Bundle) -> None:
    program, broadcast = open_program(personalised), decode_tensors(personalised.initial)
    rows = batch(8)
    found = program.finish(program.step(program.begin(broadcast), rows)[0], broadcast)
    assert found["examples"].tolist() == [2]
    other_support = {**rows, "y": rows["y"].copy()}
    other_support["y"][0] = (rows["y"][0] + 1) % 3
    changed = program.finish(program.step(program.begin(broadcast), other_support)[0], broadcast)
    assert changed["before_loss"] == found["before_loss"], "the support is not scored"
    assert changed["after_loss"] != found["after_loss"], "the support is trained on"
    still = {**broadcast, "learning_rate": np.zeros(1, np.float32)}
    kept = program.finish(program.step(program.begin(still), rows)[0], still)
    assert kept["after_loss"] == kept["before_loss"] == found["before_loss"]


def test_batches_do_not_see_one_another(personalised: Bundle) -> None:
    program, broadcast = open_program(personalised), decode_tensors(personalised.initial)
    totals = {name: np.zeros(1) for name in ("examples", "after_loss", "after_correct", "before_loss")}
    state = program.begin(broadcast)
    for size in (8, 4, 3):
        state, _ = program.step(state, batch(size))
        alone = program.finish(program.step(program.begin(broadcast), batch(size))[0], broadcast)
        totals = {name: total + alone[name] for name, total in totals.items()}
    together = program.finish(state, broadcast)
    for name, total in totals.items():
        np.testing.assert_allclose(together[name], total, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("make", [export_scaffold, export_personalised])
def test_a_program_that_disagrees_with_keras_is_refused(make: Callable[..., Bundle]) -> None:
    with pytest.raises(SelfTestFailed):
        make(tiny(Inconstant()), loss=LOSS, optimizer=sgd())


@pytest.mark.parametrize("make", [export_scaffold, export_personalised])
def test_a_layer_that_devices_do_not_have_is_named(make: Callable[..., Bundle]) -> None:
    with pytest.raises(BadBundle, match=r"layer 'odd'.*Erfinv"):
        make(tiny(layers.Lambda(lambda x: tf.math.erfinv(x / 10.0), name="odd")), loss=LOSS, optimizer=sgd())


@pytest.mark.parametrize(
    ("model", "optimizer", "text"),
    [
        (tiny(), sgd(momentum=0.9), "SCAFFOLD corrects the steps of plain SGD"),
        (tiny(), keras.optimizers.Adam(), "SCAFFOLD corrects the steps of plain SGD"),
        (tiny(layers.BatchNormalization(name="batch")), sgd(), "no control for the moving statistics batch_"),
    ],
)
def test_scaffold_refuses_what_has_no_control(model: Any, optimizer: Any, text: str) -> None:
    with pytest.raises(BadBundle, match=text):
        export_scaffold(model, loss=LOSS, optimizer=optimizer)


def test_a_trial_needs_right_answers_to_count() -> None:
    with pytest.raises(BadBundle, match="personalised evaluation counts right answers"):
        export_personalised(tiny(), loss="categorical_crossentropy", optimizer=sgd())


def test_a_model_with_statistics_and_masks_is_tuned_by_its_own_optimizer() -> None:
    # The exporter holds every number of it against Keras, tuned on the support and scored on the queries.
    body = (layers.Dense(6, activation="tanh"), layers.BatchNormalization(), layers.Dropout(0.3))
    bundle = export_personalised(tiny(*body), loss=LOSS, optimizer=keras.optimizers.Adam(0.05), steps=3)
    program, broadcast = open_program(bundle), decode_tensors(bundle.initial)
    found = program.finish(program.step(program.begin(broadcast), batch(8))[0], broadcast)
    assert found["after_loss"] != found["before_loss"]
