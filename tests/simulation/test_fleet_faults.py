"""Fleets of real processes over a real mosquitto, with real signals: whoever dies, sums are right and rounds go on."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulation.datasets import Examples, device_names
from simulation.process_fleet import peak_rss_mb
from simulation.trial import Trial, read_files
from sottovoce.blobs import digest_of
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

BUNDLES = Path(__file__).resolve().parents[2] / "simulation" / "bundles"
STAGES = ("advertise_keys", "share_keys", "masked_input", "consistency_check", "unmasking")
SLOW_S = 0.25
"""How long a slow device's questions are on their way: time enough to kill it before it answers."""


@pytest.fixture(scope="module", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The temporary folder of every process of a fleet; none of them can import TensorFlow."""
    front, temporary = tmp_path_factory.mktemp("front"), tmp_path_factory.mktemp("temporary")
    (front / "tensorflow.py").write_text("raise ImportError('no TensorFlow on this device')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(front), prepend=":")
        patch.setenv("TMPDIR", str(temporary))
        yield temporary


# --- killed at every stage: the sum is exactly the survivors' ---------------------------------------------------------

SUMS = {"count": 10_000, "sum": 1_000_000, "sum_of_squares": 20_000_000}
PLANTED = np.array([4001, 3989, 3967, 3947, 3931, 3929, 3923, 3919, 3917])
"""The sums of one device, by which its contribution would be known anywhere."""


@dataclass(frozen=True)
class Aftermath:
    """What is left of a fleet of which one agent after the other was killed.

    Attributes:
        trial: The fleet, still running.
        examples: Every device's own.
        victims: Stage -> who was killed in it.
        committed: Stage -> the event of the round that was under way.
        released: Stage -> the sums it released.
    """

    trial: Trial
    examples: Mapping[str, Array]
    victims: Mapping[str, str]
    committed: Mapping[str, Mapping[str, Any]]
    released: Mapping[str, Mapping[str, Array]]


def sums_task(name: str, *, goal: int) -> dict[str, Any]:
    return {
        "name": name,
        "bundle": str(BUNDLES / "moments_har.svp"),
        "collection": "motion",
        "purpose": "Count and add up, to see that a sum is exact.",
        "cohort": {"goal": goal, "minimum": 4},
        "time": {"selection_s": 20, "training_s": 20, "stage_s": 15, "retry_delay_s": 0.2},
        "work": {"batch_size": 2},
        "results": {result: {"maximum": maximum} for result, maximum in SUMS.items()},
    }


def whole_numbers(seed: int) -> Array:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 8, (2 + seed % 4, 128, 9)).astype(np.float32)


def plain_sums(examples: Array) -> dict[str, list[int]]:
    rows = examples.astype(np.int64).reshape(-1, 9)
    return {"count": [len(rows)], "sum": rows.sum(0).tolist(), "sum_of_squares": (rows**2).sum(0).tolist()}


def planted() -> Array:
    examples = np.zeros((1, 128, 9), np.float32)
    examples[0, 77] = PLANTED
    return examples


@pytest.fixture(scope="module")
def aftermath() -> Iterator[Aftermath]:
    devices = device_names(10)
    examples = {device: whole_numbers(seed) for seed, device in enumerate(devices)} | {devices[0]: planted()}
    victims = dict(zip(STAGES, devices[5:], strict=True))
    with Trial() as trial:
        trial.fleet.enrol(devices)
        for device in devices:
            trial.allow(device, minimum_cohort=4, minimum_honest_survivors=2)
            trial.fleet.give_examples(device, "motion", {"x": examples[device]})
        trial.slow_down(victims.values(), delay_s=SLOW_S)
        for dead, stage in enumerate(STAGES):
            trial.submit(sums_task(f"sums_{stage}", goal=len(devices) - dead))
        trial.start(devices)
        trial.fleet.start_coordinator(until_done=False)
        committed = {stage: killed_in(trial, stage, victim) for stage, victim in victims.items()}
        released = {stage: sums_of(trial, f"sums_{stage}") for stage in STAGES}
        yield Aftermath(trial, examples, victims, committed, released)


def killed_in(trial: Trial, stage: str, victim: str) -> Mapping[str, Any]:
    opened = trial.until("stage", "abandoned", plan=f"sums_{stage}", stage=stage)
    trial.fleet.kill_agent(victim)
    assert victim in opened["expected"]
    return trial.until("committed", "abandoned", plan=f"sums_{stage}")


def sums_of(trial: Trial, task: str) -> dict[str, Array]:
    with trial.journal() as journal:
        number = next(row.id for row in journal.tasks() if row.name == task)
        _, released = journal.state_at(number, 1) or (b"", None)
    return decode_tensors(released or b"")


@pytest.mark.parametrize("stage", STAGES)
def test_with_an_agent_killed_the_sum_is_exactly_that_of_the_survivors(aftermath: Aftermath, stage: str) -> None:
    survivors = aftermath.committed[stage]["survivors"]
    plain = [plain_sums(aftermath.examples[device]) for device in survivors]
    expected = {name: np.sum([each[name] for each in plain], axis=0).tolist() for name in SUMS}
    assert {name: value.tolist() for name, value in aftermath.released[stage].items()} == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_agent_is_reported_lost_in_the_stage_in_which_it_died(aftermath: Aftermath, stage: str) -> None:
    committed, victim = aftermath.committed[stage], aftermath.victims[stage]
    assert committed["dropped"] == {stage: [victim]}
    # From the consistency check on its masked vector is in the sum, and the others can unmask it.
    in_the_sum = STAGES.index(stage) > STAGES.index("masked_input")
    lost = set() if in_the_sum else {victim}
    assert set(committed["survivors"]) == set(committed["cohort"]) - lost
    dead = list(aftermath.victims.values())[: STAGES.index(stage)]
    assert set(committed["cohort"]) == aftermath.examples.keys() - set(dead)


# --- nothing that stays holds what one device said --------------------------------------------------------------------


def test_nothing_that_stays_holds_the_contribution_of_one_device(aftermath: Aftermath, temporary: Path) -> None:
    trial = aftermath.trial
    assert all("pi-01" in committed["survivors"] for committed in aftermath.committed.values())
    folder = trial.fleet.folder
    kept = read_files([trial.fleet.coordinator_home, folder / "coordinator.log", trial.fleet.events, temporary])
    assert {"journal.sqlite", "coordinator.log", "events.jsonl"} <= {path.name for path in kept}
    needles = forms_of_the_planted()
    assert where_found(kept, needles) == []
    trial.broker.save()
    at_the_broker = read_files([trial.broker.folder])
    assert where_found(at_the_broker, needles) == []
    # The search finds what is there: a device's id at the broker, and the sum of all.
    assert where_found(at_the_broker, {"a device": b"st/pi-01"}) == ["a device in mosquitto.db"]
    total = aftermath.released["unmasking"]["sum"]
    assert "the sum in journal.sqlite" in " ".join(where_found(kept, {"the sum": total.tobytes()}))


def forms_of_the_planted() -> dict[str, bytes]:
    """Return pieces of the planted contribution as it leaves the program, and as it goes into the masks."""
    forms: dict[str, bytes] = {}
    for name, values in (("sum", PLANTED), ("squares", PLANTED**2)):
        for kind in ("<f4", "<f8", "<u4", "<u8", "<i4", "<i8"):
            forms |= {f"{name} as {kind}": values.astype(kind)[:2].tobytes()}
    return forms


def where_found(kept: Mapping[Path, bytes], needles: Mapping[str, bytes]) -> list[str]:
    return [f"{name} in {path.name}" for path, content in kept.items() for name, n in needles.items() if n in content]


# --- a fleet that trains ----------------------------------------------------------------------------------------------

OTHERS = device_names(10)[6:]
STATIC, DIVERGENT, EMPTY, CAUTIOUS = OTHERS


def training_task(name: str, *, goal: int, minimum: int, rounds: int) -> dict[str, Any]:
    return {
        "name": name,
        "bundle": str(BUNDLES / "digits.svp"),
        "collection": "digits",
        "purpose": "Recognise handwritten digits, while one thing after the other goes wrong.",
        "rounds": rounds,
        "cohort": {"goal": goal, "minimum": minimum},
        "time": {"selection_s": 40, "training_s": 20, "stage_s": 4, "retry_delay_s": 0.2},
        "work": {"epochs": 5, "batch_size": 2},
        "optimizer": {"learning_rate": 0.1},
        "update": {"clip_norm": 5.0, "half_range": 1.0, "weight_cap": 400, "bits": 20},
    }


def written_digits(seed: int, count: int) -> Examples:
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 17, (count, 64)).astype(np.float32)
    return {"x": x, "y": generator.integers(0, 10, count).astype(np.int32)}


def test_an_agent_killed_in_training_goes_on_with_the_batch_that_was_cut_off() -> None:
    devices, busy = device_names(4), "pi-04"
    with Trial() as trial:
        trial.fleet.enrol(devices)
        for seed, device in enumerate(devices):
            trial.allow(device, minimum_cohort=4, minimum_honest_survivors=2)
            trial.fleet.give_examples(device, "digits", written_digits(seed, 400 if device == busy else 10))
        trial.allow(busy, checkpoint_s=0)
        trial.submit(training_task("patience", goal=4, minimum=4, rounds=1))
        trial.start(devices)
        trial.fleet.start_coordinator(until_done=False)
        trial.until("selected")
        checkpoints = trial.fleet.home(busy).pending
        trial.wait(lambda: len(list(checkpoints.glob("checkpoint-*"))) == 2, "two batches")
        trial.fleet.kill_agent(busy)
        trial.start([busy])
        assert trial.until("committed", "abandoned").get("survivors") == devices
        resumed = trial.wait_for_log(busy, r"resumed in epoch (\d+) after (\d+) of 400")
        ran = trial.wait_for_log(busy, r"ran (\d+) batches over 400")
        before = 200 * (int(resumed[1]) - 1) + int(resumed[2]) // 2
        # The second checkpoint may have been cut off while it was being written: no more than one batch is lost.
        assert before >= 1
        assert before + int(ran[1]) == 5 * 200


@pytest.fixture(scope="module")
def living() -> Iterator[Trial]:
    """A fleet of six that trains round after round; four others are enrolled and not started."""
    devices = device_names(6)
    with Trial() as trial:
        trial.fleet.enrol([*devices, *OTHERS])
        for seed, device in enumerate([*devices, *OTHERS]):
            trial.allow(device, minimum_cohort=4, minimum_honest_survivors=2)
            if device != EMPTY:
                trial.fleet.give_examples(device, "digits", written_digits(seed, 12))
        trial.slow_down(devices[-1:], delay_s=SLOW_S)
        trial.submit(training_task("digits", goal=len(devices), minimum=4, rounds=1000))
        trial.start(devices)
        trial.fleet.start_coordinator(until_done=False)
        trial.until("committed")
        yield trial


def assert_no_gap(trial: Trial) -> None:
    with trial.journal() as journal:
        rounds = journal.rounds()
    committed = [row.position for row in rounds if row.phase == "committed"]
    assert committed == list(range(len(committed)))
    numbers = [(row.round, row.attempt) for row in rounds]
    assert numbers == sorted(set(numbers))


MOMENTS = {"training": {"event": "selected"}, "rendezvous": {"event": "stage", "stage": "masked_input"}}


def until_moment(trial: Trial, moment: str) -> Mapping[str, Any]:
    """Return what happens at the next such moment of a round."""
    trial.skip()
    fields = dict(MOMENTS[moment])
    return trial.until(fields.pop("event"), **fields)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_coordinator_that_is_killed_goes_on_with_the_next_attempt(living: Trial, moment: str) -> None:
    then = until_moment(living, moment)
    living.fleet.kill_coordinator()
    with living.journal() as journal:
        (open_round,) = journal.open_rounds()
    assert (open_round.round, open_round.attempt) == (then["number"], then["attempt"])
    assert open_round.phase == ("configuration" if moment == "training" else "reporting")
    superseded = retained_states(living)
    living.fleet.start_coordinator(until_done=False)
    again = living.until("announced")
    assert (again["number"], again["attempt"]) == (then["number"], then["attempt"] + 1)
    committed = living.until("committed", "abandoned")
    assert (committed["event"], committed["number"]) == ("committed", then["number"])
    with living.journal() as journal:
        ended = next(row for row in journal.rounds() if row.id == open_round.id)
    assert (ended.phase, ended.reason) == ("abandoned", "coordinator_restarted")
    living.until("committed")
    living.until("committed")
    living.wait(lambda: not superseded & living.retained_blobs(), "superseded states to be cleared")
    assert_no_gap(living)


def retained_states(trial: Trial) -> frozenset[bytes]:
    """Return the digests of the states of which the broker retains a chunk."""
    with trial.journal() as journal:
        (task,) = journal.tasks()
        contents = [journal.state_at(task.id, position) for position in range(task.position + 1)]
    digests = {digest_of(content[0]) for content in contents if content is not None}
    return trial.retained_blobs() & digests


OUTAGES = [
    pytest.param("rendezvous", False, 3.0, id="killed for 3 s in a rendezvous"),
    pytest.param("training", True, 3.0, id="frozen for 3 s in training"),
    pytest.param("training", False, 3.0, id="killed for 3 s in training", marks=pytest.mark.slow),
    pytest.param("rendezvous", True, 3.0, id="frozen for 3 s in a rendezvous", marks=pytest.mark.slow),
    *(
        pytest.param(moment, frozen, 20.0, id=f"{'frozen' if frozen else 'killed'} for 20 s in {moment}", marks=slow)
        for moment in MOMENTS
        for frozen in (False, True)
        for slow in [pytest.mark.slow]
    ),
]


@pytest.mark.parametrize(("moment", "frozen", "outage_s"), OUTAGES)
def test_a_broker_that_goes_away_costs_at_most_the_round(
    living: Trial, moment: str, frozen: bool, outage_s: float
) -> None:
    then = until_moment(living, moment)
    living.without_broker(outage_s=outage_s, frozen=frozen)
    ended = living.until("committed", "abandoned")
    assert (ended["number"], ended["attempt"]) == (then["number"], then["attempt"])
    if ended["event"] == "abandoned":
        after = living.until("committed", "abandoned")
        assert (after["event"], after["number"]) == ("committed", then["number"])
    assert_no_gap(living)


def test_bad_devices_say_why_and_the_others_go_on(living: Trial) -> None:
    spoil_one_number(living, STATIC)
    living.fleet.give_examples(DIVERGENT, "digits", {**written_digits(1, 3), "y": np.array([3, 42, 1], np.int32)})
    living.allow(CAUTIOUS, minimum_cohort=5)
    living.skip()
    living.start(OTHERS)
    expected = {STATIC: "bad_examples", DIVERGENT: "bad_examples", EMPTY: "bad_examples", CAUTIOUS: "policy"}
    living.wait(lambda: withdrawals(living).keys() == expected.keys(), "four devices to withdraw")
    assert withdrawals(living) == expected
    living.skip()
    committed = living.until("committed", "abandoned")
    assert set(committed["survivors"]) == set(committed["cohort"]) - {STATIC, DIVERGENT}
    living.wait_for_log(STATIC, r"column 'x', row 5: the value nan is not a finite number")
    living.wait_for_log(DIVERGENT, r"column 'y', row 13: the value 42 is above 9")
    living.wait_for_log(EMPTY, r"no examples in collection 'digits'")
    living.wait_for_log(CAUTIOUS, r"sums of 4 devices; this device asks for at least 5")
    for device in OTHERS:
        living.fleet.kill_agent(device)


def withdrawals(trial: Trial) -> dict[str, str]:
    trial.skip()
    return {event["device"]: event["code"] for event in trial.events if event["event"] == "withdrew"}


def spoil_one_number(trial: Trial, device: str) -> None:
    """Write NaN into the store behind the back of the import, which would refuse it."""
    with contextlib.closing(sqlite3.connect(trial.fleet.home(device).examples)) as store:
        number, content = store.execute("SELECT id, content FROM example ORDER BY id LIMIT 1 OFFSET 5").fetchone()
        spoiled = np.float32(np.nan).tobytes() + content[4:]
        store.execute("UPDATE example SET content = ? WHERE id = ?", (spoiled, number))
        store.commit()


def test_agents_stay_small(living: Trial) -> None:
    assert all(peak_rss_mb(living.fleet.agent_pid(device)) <= 100 for device in device_names(6))
