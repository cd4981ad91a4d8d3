"""The measurement of a training step: both sides do the work, and what is printed is what was measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from models import step_bench
from models.step_bench import Comparison, Timing, compare, in_turn, keras_step, main, table
from models.step_formulations import QUESTIONS, Question, opened
from sottovoce.errors import ProgramError

keras = tf.keras


def _model() -> object:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3, activation="softmax")], name="small")
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.1))
    return model


def test_runs_take_turns_and_the_first_ones_do_not_count() -> None:
    order: list[str] = []
    found = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 5
    assert set(found) == {"a", "b"}
    assert all(0 <= timing.minimum_ms <= timing.median_ms for timing in found.values())


def test_a_comparison_trains_on_both_sides() -> None:
    model = _model()
    before = model.get_weights()[0].copy()
    line = compare(model, batch_size=3, repeats=2)
    assert (line.model, line.parameters, line.batch_size) == ("small", 15, 3)
    assert line.device.median_ms > 0
    assert line.tensorflow.median_ms > 0
    assert line.xla.median_ms > 0
    assert np.abs(model.get_weights()[0] - before).max() > 0


@pytest.mark.parametrize("xla", [False, True])
def test_tensorflow_s_step_is_that_of_keras(xla: bool) -> None:
    ours, theirs = _model(), _model()
    x, y = np.ones((3, 4), np.float32), np.array([0, 1, 1], np.int32)
    loss = keras_step(ours, [x], [y], xla=xla)()
    assert float(loss) == pytest.approx(float(theirs.train_on_batch(x, y)), rel=1e-6)
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-7)


@pytest.mark.parametrize(("tensorflow", "xla"), [(4.0, 5.0), (5.0, 4.0)])
def test_the_table_shows_the_ratio_to_the_faster_form(tensorflow: float, xla: float) -> None:
    line = Comparison("two_nn", 199_210, 10, Timing(1.0, 0.5), Timing(tensorflow, 3.0), Timing(xla, 2.0))
    assert line.ratio == 0.25
    shown = ["1.00", "(0.50)", f"{tensorflow:.2f}", "(3.00)", f"{xla:.2f}", "(2.00)", "0.25"]
    assert table([line])[1].split() == ["two_nn", "199,210", "10", *shown]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_bench, "MODELS", {"small": _model})
    assert main(["small", "--json", "--repeats", "2", "--batch-size", "2"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["model"] == "small"
    assert found["ratio"] == found["device"]["median_ms"] / min(
        found["tensorflow"]["median_ms"], found["xla"]["median_ms"]
    )


@pytest.mark.parametrize("arguments", [["no_such_model"], ["--repeats", "0"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)


def test_a_formulation_that_computes_something_else_is_refused() -> None:
    ways = {"double": lambda x: x + x, "square": lambda x: x * x}
    with pytest.raises(ProgramError, match="'square' does not compute what the first"):
        opened(Question("twice x", {"x": (2, 3)}, ways))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_all_formulations_of_a_question_agree(name: str) -> None:
    assert set(opened(QUESTIONS[name])) == set(QUESTIONS[name].ways)
