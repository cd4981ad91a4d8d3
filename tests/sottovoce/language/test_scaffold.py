"""SCAFFOLD against Algorithm 1 of the paper written out by hand, and against federated averaging on divided labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulation
import sottovoce as sv
from simulation.datasets import digits, digits_by_label
from sottovoce.bundle import NEXT, read_bundle
from sottovoce.errors import ConfigError
from sottovoce.language.expressions import Terms
from sottovoce.language.learning import ClientOptimizer, IterativeProcess, build_fed_avg
from sottovoce.language.ports import Bound
from sottovoce.language.scaffold import Scaffold, build_scaffold
from sottovoce.plan import LocalWork
from sottovoce.runtime import open_program, run_self_test
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array
from sottovoce.values import Record

BUNDLES = Path(__file__).parents[3] / "simulation" / "bundles"
DIGITS, SCAFFOLD = BUNDLES / "digits.svp", BUNDLES / "digits_scaffold.svp"
WEIGHTS = ("hidden_kernel", "hidden_bias", "output_kernel", "output_bias")
RATE = 0.1
WORK = LocalWork(batch_size=16, order="stored")


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Array]]:
    return list(digits(devices=4, seed=2).devices.values())


def gradient(weights: Mapping[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
    """Return the gradient at `weights` by one step of the plain program at rate 1 from there."""
    bundle = read_bundle(DIGITS)[0]
    program = open_program(bundle)
    broadcast = {
        **{name: weights[name].astype(np.float32) for name in WEIGHTS},
        "learning_rate": np.ones(1, np.float32),
    }
    state, _ = program.step(program.begin(broadcast), batch)
    finished = program.finish(state, broadcast)
    return {name: -finished[f"delta_{name}"].astype(np.float64) for name in WEIGHTS}


def device_round(
    x: Mapping[str, Array], c: Mapping[str, Array], own: Mapping[str, Array], mine: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return y - x and the next c_i: the device's loop of Algorithm 1, Option II."""
    y, steps = dict(x), 0
    for start in range(0, len(mine["y"]), WORK.batch_size):
        slopes = gradient(y, {name: column[start : start + WORK.batch_size] for name, column in mine.items()})
        y = {name: y[name] - RATE * (slopes[name] - own[name] + c[name]) for name in WEIGHTS}
        steps += 1
    following = {name: own[name] - c[name] + (x[name] - y[name]) / (steps * RATE) for name in WEIGHTS}
    return {name: y[name] - x[name] for name in WEIGHTS}, following


def test_three_rounds_are_algorithm_1_written_out_by_hand(examples: list[dict[str, Array]]) -> None:
    population, rate = 6, 0.8
    process = build_scaffold(SCAFFOLD, ClientOptimizer(RATE, work=WORK), population=population, learning_rate=rate)
    initial = decode_tensors(read_bundle(SCAFFOLD)[0].initial)
    x = {name: initial[name].astype(np.float64) for name in WEIGHTS}
    c = {name: np.zeros_like(value) for name, value in x.items()}
    owns = [dict(c) for _ in examples]
    with sv.use(sv.reference_executor()):
        state = process.initialize()
        for _ in range(3):
            rounds = [device_round(x, c, own, mine) for own, mine in zip(owns, examples, strict=True)]
            for name in WEIGHTS:
                x[name] = x[name] + rate * np.mean([delta[name] for delta, _ in rounds], axis=0)
                change = sum(following[name] - own[name] for (_, following), own in zip(rounds, owns, strict=True))
                c[name] = c[name] + change / population
            owns = [following for _, following in rounds]
            state, _ = process.next(state, examples)
    for name in WEIGHTS:
        np.testing.assert_allclose(state.model[name], x[name], atol=2e-5, err_msg=name)
        np.testing.assert_allclose(state.model[f"control_{name}"], c[name], atol=2e-4, err_msg=name)
        assert np.abs(c[name]).max() > 4e-3, "the controls are much larger than what they are compared within"


def test_a_first_round_is_federated_averaging_of_devices_that_count_alike(examples: list[dict[str, Array]]) -> None:
    alike = [{name: column[:40] for name, column in mine.items()} for mine in examples]
    client = ClientOptimizer(RATE, work=WORK)
    with sv.use(sv.reference_executor()):
        process = build_scaffold(SCAFFOLD, client, population=4)
        state, metrics = process.next(process.initialize(), alike)
    plain = build_fed_avg(DIGITS, client)
    averaged, expected = plain.next(plain.initialize(), alike)
    for name in WEIGHTS:
        np.testing.assert_allclose(state.model[name], averaged.model[name], atol=1e-5)
    assert metrics.examples == expected.examples == 160
    assert metrics.correct == expected.correct


def test_a_fleet_keeps_the_controls_on_its_devices_and_trains_as_the_reference_does(
    examples: list[dict[str, Array]],
) -> None:
    bounds = {"correct": Bound(0, 1000), "loss": Bound(0, 10_000)}
    terms = Terms(half_range=1.0, weight_cap=1000, bits=22)
    process = build_scaffold(
        SCAFFOLD,
        ClientOptimizer(RATE, work=WORK),
        population=4,
        terms=terms,
        control_bound=4.0,
        metrics=bounds,
    )
    with sv.use(sv.reference_executor()):
        expected = three_rounds(process, examples)
    forgetful = process.initialize()
    for _ in range(3):
        with sv.use(sv.reference_executor()):
            forgetful, _ = process.next(forgetful, examples)
    with simulation.fleet(devices=4):
        found = three_rounds(process, examples)
    for name, value in expected.model.items():
        np.testing.assert_allclose(found.model[name], value, atol=2e-3, err_msg=name)
    lost = np.abs(forgetful.model.hidden_kernel - expected.model.hidden_kernel).max()
    assert lost > 2e-2, "devices that forgot their controls would be far off"


def three_rounds(process: IterativeProcess, examples: list[dict[str, Array]]) -> Any:
    state = process.initialize()
    for _ in range(3):
        state, _ = process.next(state, examples)
    return state


def test_with_two_classes_a_device_it_beats_federated_averaging_at_equal_rounds() -> None:
    data = digits_by_label(devices=10, seed=1)
    client = ClientOptimizer(0.2, work=LocalWork(epochs=5, batch_size=16))
    found = {
        name: run(process, list(data.devices.values()), data.test, rounds=8)
        for name, process in (
            ("scaffold", build_scaffold(SCAFFOLD, client, population=10)),
            ("fed_avg", build_fed_avg(DIGITS, client)),
        )
    }
    assert found["scaffold"] > found["fed_avg"] + 0.02, found


def run(process: IterativeProcess, devices: list[dict[str, Array]], test: Mapping[str, Array], *, rounds: int) -> float:
    random = np.random.default_rng(4)
    with sv.use(sv.reference_executor()):
        state = process.initialize()
        for _ in range(rounds):
            orders = [random.permutation(len(mine["y"])) for mine in devices]
            shuffled = [{n: c[order] for n, c in mine.items()} for mine, order in zip(devices, orders, strict=True)]
            state, _ = process.next(state, shuffled)
    bundle = process.trained(state)
    predicted = open_program(bundle).infer(decode_tensors(bundle.initial), {"x": test["x"]})["prediction"]
    return float(np.mean(predicted.argmax(axis=1) == test["y"]))


def test_the_state_is_the_model_with_its_controls() -> None:
    signature = str(build_scaffold(SCAFFOLD, population=5))
    assert "control_hidden_kernel=float32[64,64]" in signature
    assert "own_control" not in signature, "a device's own control never leaves it"


def test_the_committed_bundle_keeps_its_control_in_a_slot_and_passes_its_self_test() -> None:
    bundle = read_bundle(SCAFFOLD)[0]
    kept = bundle.client_state
    assert kept is not None
    assert (kept.slot, kept.version) == ("scaffold-digits", 1)
    assert [port.name for port in kept.ports] == [f"own_control_{name}" for name in WEIGHTS]
    assert not any(value.any() for value in decode_tensors(kept.initial).values())
    given = decode_tensors(bundle.self_test.client_state)
    assert all(value.any() for value in given.values()), "the self-test notices a control that is not read"
    assert {f"{NEXT}own_control_{name}" for name in WEIGHTS} <= set(decode_tensors(bundle.self_test.expected))
    run_self_test(bundle, open_program(bundle))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": DIGITS}, "'digits' is not a SCAFFOLD program; make one .* models.scaffold.export_scaffold"),
        ({"population": 0}, "population is 0; write how many devices the fleet has"),
        ({"learning_rate": 0.0}, "the server's learning_rate is 0.0; write a number above 0"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_scaffold(**{"model": SCAFFOLD, "population": 5, **change})


def test_the_servers_step_is_pure() -> None:
    bundle = read_bundle(SCAFFOLD)[0]
    server = Scaffold(bundle, ClientOptimizer(0.1, decay=0.5), 1.0, 4)
    state = server.first_state()
    ones = [
        Record({port.name: np.ones(port.tensor_type.shape, np.float32) for port in r.ports}) for r in bundle.results
    ]
    after = server.advance(state, *ones)
    assert float(after.model.hidden_bias[0]) == 1.0
    assert float(after.model.control_hidden_bias[0]) == 0.25
    assert float(state.model.hidden_bias[0]) == 0.0
    assert float(server.broadcast(state).learning_rate[0]) == pytest.approx(0.1)
    assert float(server.broadcast(after).learning_rate[0]) == pytest.approx(0.05)
