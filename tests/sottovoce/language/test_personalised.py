"""Personalised evaluation: before and after are what fine-tuning by hand gives, and nothing is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulation.datasets import digits
from sottovoce.bundle import read_bundle
from sottovoce.errors import ConfigError
from sottovoce.language.learning import ClientOptimizer, build_fed_avg
from sottovoce.language.personalised import build_personalised_evaluation
from sottovoce.plan import LocalWork
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array
from sottovoce.values import Record

BUNDLES = Path(__file__).parents[3] / "simulation" / "bundles"
DIGITS, PERSONALISED = BUNDLES / "digits.svp", BUNDLES / "digits_personalised.svp"
STEPS = 5


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Array]]:
    return list(digits(devices=4, seed=3).devices.values())


def model() -> Record[Array]:
    first = decode_tensors(read_bundle(DIGITS)[0].initial)
    return Record({name: value for name, value in first.items() if name != "learning_rate"})


def by_hand(weights: Mapping[str, Array], mine: Mapping[str, Array], rate: float) -> dict[str, float]:
    """Return the five sums of one trial, by the program that trains: its steps on the support, its scores."""
    program = open_program(read_bundle(DIGITS)[0])
    query = np.arange(len(mine["y"])) % 4 == 3
    parts = {
        kind: {name: column[rows] for name, column in mine.items()} for kind, rows in (("q", query), ("s", ~query))
    }
    broadcast = {**weights, "learning_rate": np.array([rate], np.float32)}
    state = program.begin(broadcast)
    for _ in range(STEPS):
        state, _ = program.step(state, parts["s"])
    deltas = program.finish(state, broadcast)
    tuned = {**broadcast, **{name: weights[name] + deltas[f"delta_{name}"] for name in weights}}
    before, after = program.evaluate(broadcast, parts["q"]), program.evaluate(tuned, parts["q"])
    return {
        "examples": float(query.sum()),
        **{f"before_{name}": float(before[name][0]) for name in ("correct", "loss")},
        **{f"after_{name}": float(after[name][0]) for name in ("correct", "loss")},
    }


def test_before_and_after_are_those_of_fine_tuning_by_hand(examples: list[dict[str, Array]]) -> None:
    work = LocalWork(batch_size=2048, order="stored")
    found = build_personalised_evaluation(PERSONALISED, learning_rate=0.3, work=work)(model(), examples)
    trials = [by_hand(dict(model().items()), mine, 0.3) for mine in examples]
    sums = {name: sum(trial[name] for trial in trials) for name in trials[0]}
    assert found.examples == sums["examples"]
    assert found.before_correct == pytest.approx(sums["before_correct"] / sums["examples"])
    # Two runtimes' last bits may decide about one example whose two best classes are as good as equal.
    assert found.after_correct == pytest.approx(sums["after_correct"] / sums["examples"], abs=1.5 / sums["examples"])
    for name in ("before_loss", "after_loss"):
        assert found[name] == pytest.approx(sums[name] / sums["examples"], rel=1e-4), name
    assert found.after_loss < found.before_loss


def test_every_batch_is_a_trial_of_its_own(examples: list[dict[str, Array]]) -> None:
    mine = {name: column[:44] for name, column in examples[0].items()}
    work = LocalWork(batch_size=20, order="stored")
    found = build_personalised_evaluation(PERSONALISED, learning_rate=0.3, work=work)(model(), [mine])
    trials = [
        by_hand(dict(model().items()), {name: column[at : at + 20] for name, column in mine.items()}, 0.3)
        for at in (0, 20, 40)
    ]
    assert found.examples == sum(trial["examples"] for trial in trials) == 5 + 5 + 1
    assert found.after_loss * 11 == pytest.approx(sum(trial["after_loss"] for trial in trials), rel=1e-4)


def test_a_device_with_habits_of_its_own_gains_and_says_so_only_in_a_sum(examples: list[dict[str, Array]]) -> None:
    """Everybody writes the digits alike, but each device calls them by other names."""
    process = build_fed_avg(DIGITS, ClientOptimizer(0.2, work=LocalWork(epochs=3, batch_size=16)))
    state = process.initialize()
    for _ in range(3):
        state, _ = process.next(state, examples)
    own = [{"x": mine["x"], "y": ((mine["y"] + at) % 10).astype(np.int32)} for at, mine in enumerate(examples)]
    work = LocalWork(batch_size=2048, order="stored")
    evaluate = build_personalised_evaluation(PERSONALISED, learning_rate=0.5, work=work)
    found = evaluate(state.model, own)
    assert found.after_correct > found.before_correct + 0.1
    assert set(found.keys()) == {"examples", "before_correct", "after_correct", "before_loss", "after_loss"}


def test_rows_too_few_for_a_query_are_not_scored(examples: list[dict[str, Array]]) -> None:
    few = [{name: column[:3] for name, column in examples[0].items()}]
    found = build_personalised_evaluation(PERSONALISED, learning_rate=0.3)(model(), few)
    assert found.examples == 0
    assert found.after_loss == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": DIGITS}, "'digits' does not compare before and after fine-tuning; make one of the model with"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; write a number above 0"),
        ({"work": LocalWork(epochs=2)}, "one pass over the examples, not 2; set epochs = 1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_personalised_evaluation(**{"model": PERSONALISED, "learning_rate": 0.1, **change})
