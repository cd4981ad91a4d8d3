"""Every demonstration takes the options that mean something to it, and refuses the others by name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from simulation import demo
from simulation.demo_options import KINDS, read_options


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("words --rounds 3", "words: error: --rounds means nothing to 'words', only to digits, har"),
        ("words --plot=here.png", "--plot means nothing to 'words', only to digits, har, attack"),
        ("temperature --no-kill", "--no-kill means nothing to 'temperature', only to digits, har"),
        ("attack --mode curious", "--mode means nothing to 'attack', only to digits, har, temperature, words"),
        ("digits --data-file x.npz", "--data-file means nothing to 'digits', only to har, temperature, words"),
        ("har --seed 2", "the following arguments are required: --data-file"),
        ("digits --loud", "'--loud' is not understood; ./scripts/demo digits --help lists what is"),
        ("--rounds 0", "argument --rounds: '0' is no whole number above 0"),
        ("words --devices many", "argument --devices: 'many' is no whole number above 0"),
        ("--devices 4 har", "the demonstration comes first, then its options: ./scripts/demo har ..."),
        ("dijits", "invalid choice: 'dijits'"),
    ],
)
def test_what_means_nothing_is_one_error(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments.split())
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_help_lists_what_a_demonstration_takes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_options([kind, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert ("--rounds" in printed) == ("--no-kill" in printed) == (kind in ("digits", "har"))
    assert ("--data-file" in printed) == (kind in ("har", "temperature", "words"))
    assert "--devices" in printed


def test_every_demonstration_can_be_asked_for() -> None:
    assert set(KINDS) == {*demo.DEMOS, *demo._KINDS}


def test_without_a_name_it_is_digits() -> None:
    assert read_options([]).kind == "digits"
    assert read_options(["--rounds", "2", "--no-kill"]) == argparse.Namespace(
        kind="digits", devices=None, rounds=2, seed=1, mode="active", no_kill=True, report=None, plot=None
    )
    words = read_options(["words", "--devices", "12", "--data-file", "mine.jsonl"])
    assert (words.devices, words.data_file, words.mode, words.report) == (12, Path("mine.jsonl"), "active", None)
