"""From a task to rounds, and from their sums to the next state: whoever implements the hosted program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.hosted import check_plans, hosted_program
from coordinator.requests import plan_of
from coordinator.task import Task, read_task
from sottovoce.blobs import DEFAULT_CHUNK_BYTES
from sottovoce.errors import BadBundle, ConfigError, RoundAbandoned
from sottovoce.language.hosted import HostedProgram
from sottovoce.language.ports import RoundSums
from sottovoce.plan import Counted, Plan, Quantised
from sottovoce.tensors import decode_tensors

TASKS = Path(__file__).parents[2] / "simulation" / "tasks"
STANDARDISE = """
[standardise]
bundle = "moments.svp"
[standardise.results.count]
maximum = 1000
[standardise.results.sum]
half_range = 1000.0
bits = 40
[standardise.results.sum_of_squares]
half_range = 1000.0
bits = 40
"""


def _task(folder: Path, *, extra: str = "", change: tuple[str, str] = ("", ""), name: str = "tiny") -> Task:
    return read_task((folder / f"{name}.toml").read_text().replace(*change) + extra)


def _hosted(folder: Path, task: Task) -> HostedProgram:
    moments = (folder / "moments.svp").read_bytes() if task.standardise else None
    program = hosted_program(task, (folder / task.bundle).read_bytes(), moments=moments)
    check_plans(program, task, fleet="choir", chunk_bytes=DEFAULT_CHUNK_BYTES)
    return program


def _program(folder: Path, **changes: Any) -> HostedProgram:
    return _hosted(folder, _task(folder, **changes))


def _plan(folder: Path, position: int = 0, **changes: Any) -> Plan:
    task = _task(folder, **changes)
    program = _hosted(folder, task)
    request = program.request_at(position, program.first_state)
    return plan_of(request, task.terms, fleet="choir", chunk_bytes=DEFAULT_CHUNK_BYTES)


def _sums(weight: int = 8, **sums: Any) -> RoundSums:
    """What a round brings: sums, and the weighted mean of `delta`."""
    arrays = {name: [np.asarray(value, np.float64)] for name, value in sums.items()}
    return RoundSums(sums=arrays, weight=weight, survivors=4, clamped=0, round=1)


def test_a_model_becomes_one_plan_with_its_update_and_the_metrics_asked_for(task_folder: Path) -> None:
    plan, program = _plan(task_folder), _program(task_folder)
    delta, correct = plan.aggregations
    assert (delta.name, delta.weighted, delta.clip_norm, delta.lane) == ("delta", True, 10.0, "uint32")
    assert delta.encoding == Quantised(half_range=1.0, bits=16)
    assert (correct.name, correct.encoding, correct.weighted) == ("correct", Counted(maximum=100), False)
    assert plan.privacy.minimum_cohort == 4
    assert plan.privacy.weight_cap == 10
    assert program.length == 2
    assert program.model is not None
    assert _plan(task_folder, 1).digest == plan.digest, "the plan is the same in every round"


def test_fedavg_adds_the_weighted_mean_times_the_servers_rate(task_folder: Path) -> None:
    program = _program(task_folder, change=("learning_rate = 0.25", "learning_rate = 0.25\nserver_learning_rate = 0.5"))
    state = program.first_state
    before = program.broadcast_at(0, state)
    advance = program.apply(0, state, _sums(delta=np.ones((3, 2)), correct=[6.0]))
    after = program.broadcast_at(1, advance.state)
    np.testing.assert_allclose(after["kernel"], before["kernel"] + 0.5, rtol=1e-6)
    assert after["kernel"].dtype == np.float32
    assert list(after) == ["kernel", "mean", "variance", "learning_rate"]
    assert after["learning_rate"] == np.float32(0.25)
    assert advance.metrics == {"examples": 8.0, "clamped": 0.0, "correct": 0.75}
    assert advance.released == {}
    start = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(before["kernel"], start, "the old state is left alone")
    assert decode_tensors(program.request_at(1, advance.state).broadcast).keys() == after.keys()


def test_a_state_that_is_not_finite_is_not_adopted(task_folder: Path) -> None:
    program = _program(task_folder)
    with pytest.raises(RoundAbandoned, match="not_finite"), np.errstate(over="ignore"):
        program.apply(0, program.first_state, _sums(delta=np.full((3, 2), 1e39), correct=[0.0]))


def test_standardisation_is_a_first_round_that_fills_mean_and_variance(task_folder: Path) -> None:
    program = _program(task_folder, extra=STANDARDISE)
    assert program.length == 3
    moments, training = _plan(task_folder, 0, extra=STANDARDISE), _plan(task_folder, 1, extra=STANDARDISE)
    assert (moments.name, training.name) == ("tiny-moments", "tiny")
    assert program.broadcast_at(0, program.first_state) == {}
    assert [a.lane for a in moments.aggregations] == ["uint32", "uint64", "uint64"]
    data = np.random.default_rng(1).normal(3, 2, (40, 3))
    data[:, 2] = 5.0  # never varies: dividing by its deviation of 0 would ruin everything
    sums = {"count": [40.0], "sum": data.sum(0), "sum_of_squares": (data**2).sum(0)}
    advance = program.apply(0, program.first_state, _sums(**sums))
    model = program.broadcast_at(1, advance.state)
    np.testing.assert_allclose(model["mean"], data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model["variance"][:2], data.var(0)[:2], rtol=1e-5)
    assert np.isfinite(model["variance"]).all()
    assert (model["variance"] > 0).all()
    np.testing.assert_array_equal(model["kernel"], np.arange(6, dtype=np.float32).reshape(3, 2))
    trained = program.apply(1, advance.state, _sums(delta=np.full((3, 2), 0.8), correct=[1.0]))
    np.testing.assert_array_equal(program.broadcast_at(2, trained.state)["mean"], model["mean"])


def test_moments_of_nothing_abandon_the_round(task_folder: Path) -> None:
    program = _program(task_folder, extra=STANDARDISE)
    zeros = {"count": [0.0], "sum": np.zeros(3), "sum_of_squares": np.zeros(3)}
    with pytest.raises(RoundAbandoned, match="no_examples"):
        program.apply(0, program.first_state, _sums(**zeros))


def test_a_task_that_only_sums_releases_its_results_once(task_folder: Path) -> None:
    program = _program(task_folder, name="moments")
    assert program.length == 1
    assert program.model is None
    sums = {"count": [7.0], "sum": [1.0, 2.0, 3.0], "sum_of_squares": [4.0, 5.0, 6.0]}
    advance = program.apply(0, program.first_state, _sums(**sums))
    assert {name: list(value) for name, value in advance.released.items()} == sums
    assert program.broadcast_at(1, advance.state) == {}


@pytest.mark.parametrize(
    ("change", "extra", "says"),
    [
        (
            ("[update]\nclip_norm = 10.0\nhalf_range = 1.0\nweight_cap = 10\n", ""),
            "",
            r"update: bundle 'tiny' trains a model",
        ),
        (
            ("", ""),
            "[metrics.accuracy]\nmaximum = 3\n",
            r"metrics.accuracy: bundle 'tiny' has no such name; it has loss, correct",
        ),
        (("", ""), "[results.sum]\nmaximum = 3\n", r"results.sum: bundle 'tiny' has no such name; it has none"),
        (("bits", "bits"), "[metrics.loss]\nbits = 3\n", r"metrics.loss: write either maximum"),
        (('bundle = "tiny.svp"', 'bundle = "moments.svp"'), "", r"bundle 'moments' only sums and updates no model"),
        (
            ("goal = 5\nminimum = 4", "goal = 3\nminimum = 3"),
            "",
            r"cohort.goal: 3 devices are too few in active mode, which needs 4",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(task_folder: Path, change: tuple[str, str], extra: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _program(task_folder, change=change, extra=extra)


def test_a_learning_rate_needs_a_port_for_it(task_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: bundle 'moments' has no port"):
        _program(task_folder, name="moments", extra="[optimizer]\nlearning_rate = 0.1\n")


def test_standardising_needs_a_moments_bundle(task_folder: Path, model_bundle: bytes) -> None:
    (task_folder / "moments.svp").write_bytes(model_bundle)
    with pytest.raises(ConfigError, match=r"standardise.bundle: 'tiny' is not a moments program"):
        _program(task_folder, extra=STANDARDISE)


def test_every_moment_needs_its_encoding(task_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"standardise.results.count: say how it is encoded"):
        _program(task_folder, extra=STANDARDISE.replace("[standardise.results.count]\nmaximum = 1000\n", ""))


def test_sums_have_lanes_as_wide_as_the_largest_cohort_needs(task_folder: Path) -> None:
    line = "[results.count]\nmaximum = 1000\n"
    wide = (line, line.replace("1000", str(2**31)))
    lanes = [a.lane for a in _plan(task_folder, name="moments", change=wide).aggregations]
    assert lanes == ["uint64", "uint64", "uint64"], "5 * 2^31 is more than 2^32"
    assert next(a.lane for a in _plan(task_folder, name="moments").aggregations) == "uint32"


def test_the_task_names_the_lane_of_the_update_and_hears_if_it_is_too_narrow(task_folder: Path) -> None:
    line = "half_range = 1.0"
    for lane, bits in (("uint16", 13), ("3x21", 18), ("dense", 24), ("uint32", 24)):
        plan = _plan(task_folder, change=(line, f'{line}\nlane = "{lane}"\nbits = {bits}'))
        assert [a.lane for a in plan.aggregations] == [lane, "uint32"]
    with pytest.raises(
        ConfigError, match=r"aggregation 'delta'.* 5 devices.* 16-bit lane; use fewer bits \(at most 13"
    ):
        _program(task_folder, change=(line, f'{line}\nlane = "uint16"\nbits = 14'))


def test_what_is_no_bundle_is_refused(task_folder: Path) -> None:
    (task_folder / "tiny.svp").write_bytes(b"not a bundle")
    with pytest.raises(BadBundle):
        _program(task_folder)


@pytest.mark.parametrize("name", ["digits", "har"])
def test_the_demos_tasks_fit_their_bundles(name: str) -> None:
    task = read_task((TASKS / f"{name}.toml").read_text())
    moments = (TASKS / task.standardise.bundle).read_bytes() if task.standardise else None
    program = hosted_program(task, (TASKS / task.bundle).read_bytes(), moments=moments)
    check_plans(program, task, fleet="demo", chunk_bytes=DEFAULT_CHUNK_BYTES)
    assert program.length == task.rounds + (name == "har")
