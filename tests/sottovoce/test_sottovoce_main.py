"""The command `sottovoce inspect`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sottovoce.__main__ import main
from sottovoce.blobs import digest_of

BUNDLES = Path(__file__).parents[2] / "simulation" / "bundles"


def test_inspect_shows_what_a_program_reads_and_gives_away(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(BUNDLES / "digits.svp")]) == 0
    printed = capsys.readouterr().out
    assert digest_of((BUNDLES / "digits.svp").read_bytes()).hex() in printed
    assert "reads        x float32[?,64], y int32[?] from 0..9" in printed
    assert "added to hidden_kernel" in printed


def test_inspect_can_print_json_and_run_the_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(BUNDLES / "moments_har.svp"), "--json", "--self-test"]) == 0
    contents = json.loads(capsys.readouterr().out)
    assert contents["reads"] == {"x": "float32[?,128,9]"}
    assert list(contents["results"]) == ["count", "sum", "sum_of_squares"]
    assert contents["updates"] == {}
    assert contents["self_test"]["result"].startswith("passed on ")


@pytest.mark.parametrize(("content", "text"), [(None, "cannot read the bundle"), (b"junk", "not a bundle")])
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, text: str
) -> None:
    path = tmp_path / "some.svp"
    if content is not None:
        path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.splitlines()) == 1


def test_help_teaches_and_imports_no_runtime() -> None:
    code = (
        "import sys; from sottovoce.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'ai_edge_litert', 'tensorflow', 'paho'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sottovoce inspect digits.svp" in done.stdout


def test_what_a_program_keeps_on_devices_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(Path(__file__).parents[1] / "edge_agent" / "visits.svp")]) == 0
    assert "keeps        visits v1, " in capsys.readouterr().out
