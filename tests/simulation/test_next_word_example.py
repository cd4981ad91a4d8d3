"""The example `next_word.py` answers in one process and on a simulated fleet, without TensorFlow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
WITHOUT_TENSORFLOW = "import sys, runpy; sys.modules['tensorflow'] = None; runpy.run_path('{}', run_name='__main__')"


@pytest.mark.parametrize("arguments", [[], ["--fleet", "5"]], ids=["lists", "fleet"])
def test_the_example_suggests_what_enough_devices_wrote(arguments: list[str]) -> None:
    example = str(ROOT / "examples" / "next_word.py")
    code = WITHOUT_TENSORFLOW.format(example)
    done = subprocess.run(
        [sys.executable, "-c", code, "hello", "secret", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "hello … there (3 times, 3 devices)",
        "secret … nothing that enough devices wrote",
    ]
