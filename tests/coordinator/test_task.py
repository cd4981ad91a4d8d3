"""Every mistake in a task file is named by its key, with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.task import read_task
from sottovoce.errors import ConfigError
from sottovoce.plan import Counted, Quantised

TASKS = Path(__file__).parents[2] / "simulation" / "tasks"


def _text(task_folder: Path) -> str:
    return (task_folder / "tiny.toml").read_text()


def test_a_task_has_defaults_for_what_it_does_not_say(task_folder: Path) -> None:
    task = read_task(_text(task_folder))
    assert (task.secagg.mode, task.secagg.corrupt_share, task.work.epochs, task.optimizer.server) == (
        "active", 0.05, 1, "sgd",
    )  # fmt: skip
    assert task.update is not None
    assert task.update.bits == 16


def test_over_selection_rounds_up(task_folder: Path) -> None:
    task = read_task(_text(task_folder).replace("goal = 5", "goal = 5\nover_selection = 1.3"))
    assert task.cohort.wanted == 7
    exact = read_task(_text(task_folder).replace("goal = 5", "goal = 10\nover_selection = 1.1"))
    assert exact.cohort.wanted == 11, "1.1 * 10 is not 12 because of floating point"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("goal = 5", "gaol = 5", r"cohort.gaol: unknown key; the keys here are goal, minimum, over_selection"),
        ("goal = 5", 'goal = "5"', r"cohort.goal: expected `int`, got `str`"),
        ("goal = 5", "goal = 0", r"cohort.goal: expected `int` >= 1"),
        ("minimum = 4", "minimum = 2", r"cohort.minimum: expected `int` >= 3"),
        ("minimum = 4", "minimum = 6", r"cohort.minimum: 6 is more than cohort.goal, 5; lower it"),
        ("goal = 5", "goal = 65521", r"cohort.goal: 65521 devices with over-selection; at most 65520"),
        ("[cohort]", "[kohort]", r"kohort: unknown key; the keys here are .*cohort"),
        ("clip_norm = 10.0\n", "", r"update.clip_norm: this key is missing; add the line `clip_norm = ...`"),
        ("clip_norm = 10.0", "clip_norm = -1.0", r"update.clip_norm: expected `float` > 0"),
        ("[update]", "[update]\nnoise_multiplier = 1.0", r"update.noise_multiplier: this release cannot add noise yet"),
        ("[update]", '[update]\nlane = "uint64"', r"update.lane: invalid enum value .*"),
        ('name = "tiny"', 'name = "no spaces"', r"name: expected `str` matching regex"),
        ('purpose = "to test"', 'purpose = "  "', r"purpose: say in plain words"),
        ("maximum = 100", "maximun = 100", r"metrics\[...\].maximun: unknown key; the keys here are bits, clip_norm"),
        (
            "= 0.25",
            '= 0.25\nserver = "sdg"',
            r"optimizer.server: there is no server optimizer 'sdg'; choose one of sgd, ",
        ),
        ("= 0.25", '= 0.25\nserver = "adam"', r"optimizer.server: .*'adam' needs 'learning_rate', for example 0.01"),
        (
            "= 0.25",
            "= 0.25\nserver_tau = 0.1",
            r"optimizer.server: .*'sgd' has no 'tau'; it has learning_rate; its keys",
        ),
        (
            "= 0.25",
            "= 0.25\nserver_learning_rate = 0",
            r"optimizer.server: learning_rate is 0.0; write a number above 0",
        ),
        ("= 0.25", "= 0.25\nlearning_rate_decay = 2.0", r"optimizer.learning_rate_decay: expected `float` <= 1.0"),
        ("rounds = 2", "rounds = [", r"is not a TOML file"),
        ("rounds = 2", "rounds = 2.5", r"rounds: expected `int`, got `float`"),
    ],
)
def test_a_mistake_is_named_by_its_key(task_folder: Path, old: str, new: str, says: str) -> None:
    text = _text(task_folder)
    assert old in text
    with pytest.raises(ConfigError, match=says) as caught:
        read_task(text.replace(old, new), where="tiny.toml")
    assert str(caught.value).startswith("tiny.toml")


def test_a_server_optimizer_has_the_rates_that_the_file_gives_it(task_folder: Path) -> None:
    lines = '= 0.25\nserver = "yogi"\nserver_learning_rate = 0.01\nserver_beta_2 = 0.95\nlearning_rate_decay = 0.98'
    optimizer = read_task(_text(task_folder).replace("= 0.25", lines)).optimizer
    assert (optimizer.server, optimizer.server_options) == ("yogi", {"learning_rate": 0.01, "beta_2": 0.95})
    assert (optimizer.learning_rate, optimizer.learning_rate_decay) == (0.25, 0.98)


def test_a_missing_table_is_asked_for_by_its_name(task_folder: Path) -> None:
    text = _text(task_folder).replace("[cohort]\ngoal = 5\nminimum = 4\n", "")
    with pytest.raises(ConfigError, match=r"cohort: this key is missing; add the table \[cohort\]"):
        read_task(text)


def test_an_encoding_is_counted_or_quantised_and_not_both(task_folder: Path) -> None:
    def terms(lines: str) -> object:
        return (
            read_task(_text(task_folder).replace("maximum = 100", lines)).metrics["correct"].encoding("metrics.correct")
        )

    assert terms("maximum = 7") == Counted(maximum=7)
    assert terms("half_range = 2.0") == Quantised(half_range=2.0, bits=32)
    assert terms("half_range = 2.0\nbits = 9") == Quantised(half_range=2.0, bits=9)
    for wrong in ("maximum = 7\nhalf_range = 2.0", "bits = 9", "maximum = 7\nbits = 9"):
        with pytest.raises(ConfigError, match=r"metrics.correct: write either maximum .* or half_range and bits"):
            terms(wrong)


@pytest.mark.parametrize("name", ["digits", "har"])
def test_the_tasks_of_the_demo_are_tasks(name: str) -> None:
    assert read_task((TASKS / f"{name}.toml").read_text()).name == name
