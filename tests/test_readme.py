"""What the README tells people to type is typed here, as it stands, but for the port."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_coordinator_and_three_agents_by_hand() -> None:
    """The block runs to its end, trains three rounds, and a device uses what all learned."""
    match = re.search(r"^```bash by-hand\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert match, "the README has no block marked by-hand"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    activate = f". {sys.prefix}/bin/activate"
    script = match[1].replace("1883", str(port)).replace(". .venv/bin/activate", activate)
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail; trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT\n" + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"digits\W+done\W+3\b", done.stdout), done.stdout
    assert re.search(r"^0: prediction largest at \d", done.stdout, re.MULTILINE)
    assert re.search(r"released +3 masked updates", done.stdout)
