"""The talk's example as a newcomer starts it: here, on simulated devices, and with a mistake in the command."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "temperature.py"


@pytest.fixture(scope="module")
def main() -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location("temperature_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[], None] = module.main
    return found


def test_on_a_few_numbers(
    main: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["temperature.py"])
    main()
    assert capsys.readouterr().out == "mean temperature: 69.53\ndevices above 70: 33.3%\n"


def test_on_simulated_devices(
    main: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["temperature.py", "--fleet", "5", "--threshold", "-100"])
    main()
    told = capsys.readouterr().out
    assert re.fullmatch(r"mean temperature: [0-9.]+\ndevices above -100: 100.0%\n", told)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--fleet", "2"], "a fleet of 2 devices hides nobody in a sum; make it at least 3"),
        (["--fleet", "0"], "make it at least 3"),
        (["--config", "nowhere.toml"], "cannot read nowhere.toml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_no_stack_trace(
    main: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    advice: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["temperature.py", *arguments])
    with pytest.raises(SystemExit, match="1"):
        main()
    told = capsys.readouterr().err
    assert told.startswith("temperature.py: ")
    assert advice in told
    assert told.count("\n") == 1
