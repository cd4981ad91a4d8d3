"""A fleet in memory: real rounds with exact sums, whoever dies at which stage, and nothing left behind."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulation import memory_fleet
from simulation.fleet_terms import FleetTerms, Mode, Stage
from simulation.memory_fleet import MemoryFleet
from sottovoce.errors import ConfigError, RoundAbandoned
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.plan import Aggregation, Counted, LocalWork
from sottovoce.tensors import encode_tensors
from sottovoce.transport.memory import MemoryBroker
from sottovoce.types import Array

BUNDLE = (Path(__file__).resolve().parents[2] / "simulation" / "bundles" / "moments_har.svp").read_bytes()
MAXIMA = {"count": 10_000, "sum": 1_000_000, "sum_of_squares": 20_000_000}


def examples(seed: int) -> Array:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 8, (1 + seed % 3, 128, 9)).astype(np.float32)


def sums_request(*, name: str = "sums", key: str = "", members: Sequence[Array] = ()) -> RoundRequest:
    types = {"count": "int32[1]", "sum": "float32[9]", "sum_of_squares": "float32[9]"}
    return RoundRequest(
        key=key,
        name=name,
        purpose="Count and add up, to see that a sum is exact.",
        collection="motion",
        bundle=BUNDLE,
        work=LocalWork(batch_size=2),
        aggregations=tuple(
            Aggregation(name=each, tensors=(types[each],), encoding=Counted(maximum=maximum))
            for each, maximum in MAXIMA.items()
        ),
        weight_cap=1000,
        broadcast=encode_tensors({}),
        members=tuple(encode_tensors({"x": member}) for member in members),
    )


def plain_sums(arrays: Sequence[Array]) -> dict[str, list[int]]:
    rows = np.concatenate(arrays).astype(np.int64).reshape(-1, 9)
    return {"count": [len(rows)], "sum": rows.sum(0).tolist(), "sum_of_squares": (rows**2).sum(0).tolist()}


def heard(sums: RoundSums) -> dict[str, list[int]]:
    return {name: [int(value) for value in arrays[0]] for name, arrays in sums.sums.items()}


def make(
    devices: int, *, terms: FleetTerms | None = None, seed: int = 0, **faults: float
) -> MemoryFleet:  # fmt: skip
    broker = MemoryBroker(random.Random(seed), **faults)
    made = MemoryFleet(devices, terms=terms or FleetTerms(), seed=seed, broker=broker)
    made.give("motion", [{"x": examples(number)} for number in range(devices)])
    return made


@pytest.fixture(scope="module")
def fleet() -> Iterator[MemoryFleet]:
    """Six devices in active mode, for tests that leave it as it was."""
    with make(6, terms=FleetTerms(mode="active", minimum=4)) as made:
        yield made


def cohort_of(fleet: MemoryFleet) -> list[str]:
    return next(list(fields["cohort"]) for event, fields in reversed(fleet.events) if event == "selected")


def survivors_of(fleet: MemoryFleet) -> list[str]:
    return next(list(fields["survivors"]) for event, fields in reversed(fleet.events) if event == "committed")


@pytest.mark.parametrize("mode", ["curious", "active"])
def test_round_after_round_the_sum_is_exact(mode: Mode) -> None:
    with make(5, terms=FleetTerms(mode=mode)) as made:
        rounds = [made.run(sums_request()) for _ in range(3)]
    expected = plain_sums([examples(number) for number in range(5)])
    assert [heard(sums) for sums in rounds] == [expected] * 3
    assert [sums.round for sums in rounds] == [1, 2, 3]
    assert {(sums.survivors, sums.weight, sums.clamped) for sums in rounds} == {(5, 9, 0)}


@pytest.mark.parametrize(
    ("stage", "counts"),
    [
        ("selection", False),
        ("training", False),
        ("advertise_keys", False),
        ("share_keys", False),
        ("masked_input", False),
        ("consistency_check", True),
        ("unmasking", True),
        ("outcome", True),
    ],
)
@pytest.mark.parametrize("how", ["kill", "drop", "restart"])
def test_a_device_lost_at_any_stage_is_in_the_sum_or_not_at_all(
    fleet: MemoryFleet, stage: Stage, counts: bool, how: str
) -> None:
    victim = fleet.devices[2]
    if how == "drop":
        fleet.drop(victim, stage=stage)
    else:
        fleet.kill(victim, stage=stage, restart=how == "restart")
    sums = fleet.run(sums_request(name=f"sums-{stage}-{how}"))
    # Back at once, and its result still on its disk: it takes its part.
    comes_back = how == "restart" and stage in ("selection", "training", "advertise_keys")
    survivors = [number for number in range(6) if number != 2 or counts or comes_back]
    assert survivors_of(fleet) == [fleet.devices[number] for number in survivors]
    assert heard(sums) == plain_sums([examples(number) for number in survivors])
    again = fleet.run(sums_request(name=f"sums-{stage}-{how}"))
    assert heard(again) == plain_sums([examples(number) for number in range(6)])


def test_too_few_are_left() -> None:
    with make(4, terms=FleetTerms(minimum=4)) as made:
        made.kill(made.devices[0], stage="masked_input")
        with pytest.raises(RoundAbandoned) as abandoned:
            made.run(sums_request())
        assert abandoned.value.reason.startswith("too_few")
        assert heard(made.run(sums_request())) == plain_sums([examples(number) for number in range(4)])


def test_an_abandoned_round_is_tried_again_where_that_is_wished() -> None:
    with make(4, terms=FleetTerms(minimum=4, attempts=2)) as made:
        made.kill(made.devices[0], stage="training", restart=False)
        made.kill(made.devices[1], stage="masked_input", restart=True)
        with pytest.raises(RoundAbandoned):
            made.run(sums_request())
        assert [event for event, _ in made.events].count("abandoned") == 2


def test_the_coordinator_is_killed_and_the_round_is_held_again() -> None:
    with make(4) as made:
        for stage in ("selection", "masked_input", "outcome"):
            made.kill("coordinator", stage=stage)
            sums = made.run(sums_request(key=f"a round that dies at {stage}"))
            assert heard(sums) == plain_sums([examples(number) for number in range(4)])
            assert made.run(sums_request(key=f"a round that dies at {stage}")).round == sums.round


def test_why_devices_withdrew_is_told() -> None:
    told = r"devices withdrew: bad_examples .*, and the log of edge-agent says why"
    with make(3) as made, pytest.raises(RoundAbandoned, match=told):
        made.run(sums_request(members=[examples(0)[:, :4], examples(1)[:, :4], examples(2)[:, :4]]))


def test_values_given_as_a_list_are_one_device_each(fleet: MemoryFleet) -> None:
    values = [examples(10), examples(11), examples(12), examples(13)]
    assert heard(fleet.run(sums_request(members=values))) == plain_sums(values)
    assert cohort_of(fleet) == list(fleet.devices[:4])
    others = [examples(20), examples(21), examples(22), examples(23), examples(24)]
    assert heard(fleet.run(sums_request(members=others))) == plain_sums(others)
    own = fleet.run(sums_request())
    assert heard(own) == plain_sums([examples(number) for number in range(6)])


def test_a_result_of_other_values_is_never_used_again() -> None:
    with make(4, terms=FleetTerms(minimum=4)) as made:
        made.kill(made.devices[3], stage="advertise_keys")
        with pytest.raises(RoundAbandoned):
            made.run(sums_request(members=[examples(seed) for seed in range(10, 14)]))
        values = [examples(seed) for seed in range(20, 24)]
        assert heard(made.run(sums_request(members=values))) == plain_sums(values)


def test_a_list_that_no_round_can_be_made_of(fleet: MemoryFleet) -> None:
    with pytest.raises(ConfigError, match=r"7 values were given to a fleet of 6 devices.*fleet\(devices=7\)"):
        fleet.run(sums_request(members=[examples(0)] * 7))
    with pytest.raises(ConfigError, match="2 values are too few for a sum that hides each of them"):
        fleet.run(sums_request(members=[examples(0)] * 2))


def test_each_round_draws_its_cohort() -> None:
    cohorts = []
    for _ in range(2):
        with make(12, terms=FleetTerms(cohort=4), seed=3) as made:
            drawn = []
            for _ in range(4):
                sums = made.run(sums_request())
                drawn.append(cohort_of(made))
                taken = [examples(made.devices.index(device)) for device in drawn[-1]]
                assert heard(sums) == plain_sums(taken)
                assert len(taken) == 4
            cohorts.append(drawn)
    assert cohorts[0] == cohorts[1]
    assert len({tuple(cohort) for cohort in cohorts[0]}) > 1


def test_a_bad_link_changes_nothing() -> None:
    with make(5, terms=FleetTerms(mode="active"), seed=1, loss=0.2, duplicate=0.2, reorder=0.2) as made:
        for _ in range(2):
            assert heard(made.run(sums_request())) == plain_sums([examples(number) for number in range(5)])


def test_examples_that_come_later_count_from_then_on() -> None:
    with make(3) as made:
        made.run(sums_request())
        made.give("motion", [{"x": examples(number + 30)} for number in range(3)])
        expected = plain_sums([examples(number) for number in (0, 1, 2, 30, 31, 32)])
        assert heard(made.run(sums_request())) == expected


def test_a_retired_device_takes_no_further_part() -> None:
    with make(4) as made:
        made.run(sums_request())
        made.retire(made.devices[1])
        assert heard(made.run(sums_request())) == plain_sums([examples(number) for number in (0, 2, 3)])
        values = [examples(seed) for seed in (10, 11, 12)]
        assert heard(made.run(sums_request(members=values))) == plain_sums(values)
        assert made.devices[1] not in cohort_of(made)


@pytest.mark.parametrize(
    ("devices", "terms", "text"),
    [
        (2, FleetTerms(), "a fleet of 2 devices hides nobody"),
        (5, FleetTerms(cohort=2), "cohort=2"),
        (5, FleetTerms(cohort=6), "cohort=6"),
        (5, FleetTerms(attempts=0), "attempts=0"),
    ],
)
def test_an_impossible_fleet_is_refused(devices: int, terms: FleetTerms, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MemoryFleet(devices, terms=terms, seed=0, broker=MemoryBroker(random.Random(0)))


def test_collections_that_do_not_fit_the_fleet(fleet: MemoryFleet) -> None:
    with pytest.raises(ConfigError, match="steps has 2 entries for 6 devices"):
        fleet.give("steps", [1, 2])
    with pytest.raises(ConfigError, match="the simulation's own"):
        fleet.give("arguments", [1] * 6)
    with pytest.raises(ConfigError, match="there is no device 'nobody'"):
        fleet.kill("nobody", stage="training")


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_fleet, "_MEMORY_DISK", tmp_path)
    threads = threading.active_count()
    made = make(4)
    made.kill(made.devices[1], stage="unmasking")
    made.run(sums_request())
    assert list(tmp_path.iterdir())
    made.close()
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == threads


def test_where_the_state_is_large_devices_that_are_not_chosen_are_stopped_and_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_fleet, "_LARGE_STATE_BYTES", 0)
    with make(6, terms=FleetTerms(cohort=3)) as fleet:
        taken_part: Counter[str] = Counter()
        for number in range(6):
            sums = fleet.run(sums_request(key=str(number)))
            cohort = cohort_of(fleet)
            assert heard(sums) == plain_sums([examples(fleet.devices.index(name)) for name in cohort])
            running = [name for name in fleet.devices if fleet.device(name).agent is not None]
            assert running == cohort
            taken_part.update(cohort)
        assert max(taken_part.values()) > 1


def test_importing_the_package_costs_nothing() -> None:
    program = (
        "import sys, simulation; simulation.fleet; print([m for m in ('tensorflow', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def one_of_each() -> dict[str, Any]:
    return {
        "a number": [1, 2.5, 3],
        "arrays": [np.arange(3), np.arange(4), np.arange(5)],
        "columns": [{"x": np.zeros((2, 4)), "y": [0, 1]}] * 3,
    }


@pytest.mark.parametrize("form", one_of_each())
def test_collections_may_be_written_in_every_form(form: str) -> None:
    with make(3) as made:
        made.give("c", one_of_each()[form])
        for device in made.devices:
            made.device(device)
