"""The comparison of learning methods: its data, its settings, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simulation.datasets import digits_by_label
from simulation.learning_bench import main
from simulation.learning_runs import BUNDLES, accuracies, redrawn
from simulation.learning_settings import HAR_CHOSEN, HAR_TRIED, digits_methods
from sottovoce.bundle import read_bundle
from sottovoce.tensors import decode_tensors


def test_digits_by_label_give_every_device_few_classes_and_lose_none() -> None:
    data = digits_by_label(devices=10, seed=3)
    assert all(len(set(mine["y"].tolist())) <= 4 for mine in data.devices.values())
    assert np.mean([len(set(mine["y"].tolist())) for mine in data.devices.values()]) < 3.2
    assert sum(len(mine["y"]) for mine in data.devices.values()) + len(data.test["y"]) == 1797
    again = digits_by_label(devices=10, seed=3)
    assert all((data.devices[name]["y"] == again.devices[name]["y"]).all() for name in data.devices)


def test_first_weights_are_drawn_anew_and_controls_stay_zero() -> None:
    bundle = read_bundle(BUNDLES / "digits_scaffold.svp")[0]
    before = decode_tensors(bundle.initial)
    after = decode_tensors(redrawn(bundle, np.random.default_rng(1)).initial)
    changed = {name for name, value in after.items() if (value != before[name]).any()}
    assert changed == {"hidden_kernel", "output_kernel"}
    limit = np.sqrt(6 / (64 + 64))
    assert np.abs(after["hidden_kernel"]).max() == pytest.approx(limit, rel=0.01)


def test_every_setting_that_was_chosen_was_tried_and_every_server_optimizer_has_one() -> None:
    tried = [setting.method.name for setting in HAR_TRIED]
    assert {setting.method.name for setting in HAR_CHOSEN} <= set(tried)
    assert {str(setting.server).split("(")[0] for setting in HAR_CHOSEN} == {
        "sgd", "momentum", "adagrad", "adam", "yogi",
    }  # fmt: skip
    assert len(set(tried)) == len(tried)


def test_a_run_is_fixed_by_its_seed() -> None:
    (name, method), *_ = digits_methods(devices=4)
    bundle, data = read_bundle(BUNDLES / name)[0], digits_by_label(devices=4, seed=1)
    first, second = (list(accuracies(method, bundle, data, rounds=2, seed=5)) for _ in range(2))
    assert first == second
    assert 0.1 < first[-1] <= 1


def test_the_command_prints_a_table_and_writes_every_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["digits", "--rounds", "1", "--seeds", "1", "--devices", "4", "--json", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "scaffold; devices 0.2" in printed
    lines = json.loads((tmp_path / "out").read_text())
    assert [line["method"].split(";")[0] for line in lines] == ["fed_avg"] * 3 + ["scaffold"] * 3
    assert all(len(line["accuracies"]) == 1 and len(line["accuracies"][0]) == 1 for line in lines)


def test_the_command_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["har"]) == 2
    assert "har needs --data FILE" in capsys.readouterr().err
    assert main(["digits", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
