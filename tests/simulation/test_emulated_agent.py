"""The device's software on the other processor: aarch64 Python and wheels under qemu, in a round with native agents.

The first test of a fresh clone builds the emulated root (about a minute, from the network); later ones reuse it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulation.datasets import digits
from simulation.guarded import GuardedFolder
from simulation.trial import Trial

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
EMULATED_AGENT = str(ROOT / "scripts" / "emulated-agent")
BUNDLES = ROOT / "simulation" / "bundles"

SELF_TEST = """
import platform, sys
from pathlib import Path
from sottovoce.bundle import read_bundle
from sottovoce.runtime import open_program, run_self_test
for name in sys.argv[1:]:
    bundle, _ = read_bundle(Path(name))
    run_self_test(bundle, open_program(bundle))
print(platform.machine())
"""


@pytest.fixture(scope="module", autouse=True)
def emulated_root() -> None:
    subprocess.run([EMULATED_AGENT, "prepare"], check=True)


@pytest.fixture
def trial() -> Iterator[Trial]:
    with Trial(within_s=240.0) as trial:
        yield trial


def test_every_bundle_passes_its_self_test_on_aarch64() -> None:
    bundles = sorted(str(path) for path in BUNDLES.glob("*.svp"))
    assert bundles
    command = [EMULATED_AGENT, "run", "--", "python3", "-c", SELF_TEST, *bundles]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "aarch64"


def test_an_emulated_agent_takes_part_in_a_committed_round_with_native_ones(trial: Trial) -> None:
    data = digits(devices=4, seed=1)
    trial.fleet.enrol(list(data.devices))
    for device, examples in data.devices.items():
        trial.fleet.give_examples(device, "digits", examples)
        trial.allow(device, minimum_cohort=3, minimum_honest_survivors=2)
    trial.submit(
        {
            "name": "digits",
            "bundle": str(BUNDLES / "digits.svp"),
            "collection": "digits",
            "rounds": 1,
            "purpose": "Show that one fleet may have two kinds of processor.",
            "cohort": {"goal": 4, "minimum": 4},
            "time": {"selection_s": 120, "training_s": 120, "stage_s": 60},
            "work": {"epochs": 1, "batch_size": 16},
            "optimizer": {"learning_rate": 0.2},
            "update": {"clip_norm": 5.0, "half_range": 1.0, "weight_cap": 400, "bits": 20},
            "metrics": {"loss": {"half_range": 10000.0, "bits": 32}, "correct": {"maximum": 400}},
        }
    )
    emulated, *native = data.devices
    with GuardedFolder("sottovoce-emulated-") as guarded:
        home = str(trial.fleet.home(emulated).path)
        guarded.spawn([EMULATED_AGENT, "run", "--", "edge-agent", "run", "--home", home], log=guarded.path / "log")
        trial.fleet.start_coordinator(until_done=False)
        trial.start(native)
        committed = trial.until("committed", "abandoned")
        assert committed["event"] == "committed", (guarded.path / "log").read_text()
    assert sorted(committed["survivors"]) == sorted(data.devices)
