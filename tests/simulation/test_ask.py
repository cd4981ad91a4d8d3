"""Questions without a program: what a fleet answers is what all readings together would have given."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import simulation
from simulation.memory_fleet import MemoryFleet
from sottovoce import ask
from sottovoce.__main__ import main
from sottovoce.ask_command import lines
from sottovoce.errors import ConfigError

READINGS = np.array([18.25, 19.5, 20.0, 21.0, 21.75, 40.0], np.float32)


@pytest.fixture(scope="module")
def fleet() -> Iterator[MemoryFleet]:
    """Six devices; each has read its thermometer twice, and only the newest reading counts."""
    readings = [[99.0, reading] for reading in READINGS]
    with simulation.fleet(len(READINGS), collections={"temperature": readings}, minimum=3) as made:
        yield made


def test_the_mean(fleet: MemoryFleet) -> None:
    answer = ask.ask_mean(fleet, "temperature")
    assert answer.mean == pytest.approx(READINGS.mean(dtype=np.float64), abs=1e-5)
    assert answer.devices == 6


def test_readings_outside_of_the_window_count_as_its_ends(fleet: MemoryFleet) -> None:
    answer = ask.ask_mean(fleet, "temperature", low=19.0, high=22.0)
    assert answer.mean == pytest.approx(np.clip(READINGS, 19, 22).mean(dtype=np.float64), abs=1e-5)


def test_the_fraction_above_and_below(fleet: MemoryFleet) -> None:
    above = ask.ask_fraction(fleet, "temperature", above=21.0)
    below = ask.ask_fraction(fleet, "temperature", below=21.0)
    assert above.fraction == pytest.approx(2 / 6, abs=1e-6)
    assert below.fraction == pytest.approx(3 / 6, abs=1e-6)


def test_the_histogram_is_exact(fleet: MemoryFleet) -> None:
    answer = ask.ask_histogram(fleet, "temperature", low=18.0, high=22.0, bins=4)
    expected, edges = np.histogram(READINGS[:5], bins=4, range=(18.0, 22.0))
    assert answer.counts.tolist() == expected.tolist()
    assert answer.edges.tolist() == edges.tolist()
    assert answer.devices == 6


@pytest.mark.parametrize(("fraction", "reading"), [(0.5, 20.0), (0.0, 18.25), (1.0, 40.0), (0.8, 21.75)])
def test_a_quantile_is_known_to_a_thousandth_of_the_range(fleet: MemoryFleet, fraction: float, reading: float) -> None:
    answer = ask.ask_quantile(fleet, "temperature", low=0.0, high=50.0, fraction=fraction)
    assert answer.low <= reading < answer.high
    assert answer.high - answer.low <= 0.05


def test_a_quantile_outside_of_the_range_says_so(fleet: MemoryFleet) -> None:
    answer = ask.ask_quantile(fleet, "temperature", low=0.0, high=10.0, fraction=0.5)
    assert (answer.low, answer.high) == (10.0, math.inf)
    assert "10 or above: outside of the range; ask again with a wider one" in "".join(lines(answer, "temperature"))


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (lambda: ask.ask_mean(NOBODY, "t", low=2, high=1), "two finite numbers, the lower one first"),
        (lambda: ask.ask_mean(NOBODY, "t", low=float("nan"), high=1), "two finite numbers"),
        (lambda: ask.ask_fraction(NOBODY, "t"), "a fraction needs one threshold: --above X or --below X"),
        (lambda: ask.ask_histogram(NOBODY, "t", low=0, high=1, bins=65), "a histogram has 1 to 64 bins"),
        (lambda: ask.ask_quantile(NOBODY, "t", low=0, high=1, fraction=50), "write a fraction from 0 to 1"),
    ],
)
def test_an_impossible_question_reaches_no_device(question, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as refused:
        question()
    assert text in str(refused.value)


class Nobody:
    """A fleet that must not be asked."""

    def run(self, request: object) -> None:
        raise AssertionError("a device was asked")


NOBODY = Nobody()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def connected(fleet: MemoryFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds the fleet in memory where it would connect to a coordinator."""

    @contextmanager
    def connect(config: Path, **terms: object) -> Iterator[MemoryFleet]:
        assert (config, terms) == (Path("coordinator.toml"), {"minimum": 3, "mode": "curious", "timeout_s": 60.0})
        yield fleet

    monkeypatch.setattr("sottovoce.__main__._connect", connect)


TERMS = ("--minimum", "3", "--mode", "curious")


@pytest.mark.usefixtures("connected")
def test_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "mean", "temperature", "--low", "0", "--high", "50", *TERMS]) == 0
    assert capsys.readouterr().out == "mean temperature: 23.4167 (6 devices)\n"
    assert main(["ask", "fraction", "temperature", "--above", "21", *TERMS]) == 0
    assert capsys.readouterr().out == "fraction of devices: 33.3% (2 of 6)\n"
    assert main(["ask", "histogram", "temperature", "--low", "18", "--high", "22", "--bins", "2", *TERMS]) == 0
    bars = capsys.readouterr().out.splitlines()
    assert [line.split() for line in bars[:2]] == [["18", "to", "20", "█" * 27, "2"], ["20", "to", "22", "█" * 40, "3"]]
    assert bars[2] == "6 devices, 1 of them outside of the range"
    assert main(["ask", "mean", "temperature", "--json", "--low", "1", *TERMS]) == 0
    assert json.loads(capsys.readouterr().out) == {"mean": pytest.approx(23.4167, abs=1e-3), "devices": 6}


def test_without_a_coordinator_it_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ask", "mean", "temperature", "--config", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err.startswith("sottovoce: cannot read ")


def test_a_fraction_needs_a_threshold(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ask", "fraction", "temperature"])
    assert "one of the arguments --above --below is required" in capsys.readouterr().err
