"""Federated averaging as computations: against a step written out by hand, and against what it must do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulation
from simulation.datasets import DividedData, digits
from sottovoce.blobs import blob_ref
from sottovoce.bundle import Bundle, read_bundle, with_initial
from sottovoce.errors import ConfigError, RoundAbandoned
from sottovoce.language import server_optimizer, sums
from sottovoce.language.arguments import collection
from sottovoce.language.expressions import Terms
from sottovoce.language.learning import (
    Averaging,
    ClientOptimizer,
    IterativeProcess,
    build_fed_avg,
    build_federated_evaluation,
)
from sottovoce.language.lowering import lower
from sottovoce.language.ports import Bound, RoundRequest, RoundSums
from sottovoce.plan import LocalWork, Plan, PrivacyTerms
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array
from sottovoce.values import Record

BUNDLES = Path(__file__).parents[3] / "simulation" / "bundles"
DIGITS = BUNDLES / "digits.svp"
MODEL = "hidden_kernel=float32[64,64],hidden_bias=float32[64],output_kernel=float32[64,10],output_bias=float32[10]"
STATE = f"<model=<{MODEL}>,optimizer=<>,round=int32>@SERVER"


@pytest.fixture(scope="module")
def data() -> DividedData:
    return digits(devices=5, seed=1)


@pytest.fixture(scope="module")
def examples(data: DividedData) -> list[dict[str, Array]]:
    return list(data.devices.values())


def accuracy(bundle: Bundle, test: Mapping[str, Array]) -> float:
    probabilities = open_program(bundle).infer(decode_tensors(bundle.initial), {"x": test["x"]})["prediction"]
    return float(np.mean(probabilities.argmax(axis=1) == test["y"]))


def test_the_process_prints_its_type_signature() -> None:
    assert str(build_fed_avg(DIGITS)) == (
        f"initialize: ( -> {STATE})\n"
        f"next: (<state={STATE},examples={{<x=float32[64],y=int32>*}}@CLIENTS> -> "
        f"<state={STATE},metrics=<examples=int32,loss=float32,correct=float32>@SERVER>)"
    )


def test_the_state_has_the_server_optimizers_tensors() -> None:
    process = build_fed_avg(DIGITS, server_optimizer=server_optimizer.adam(0.01))
    optimizer = f"optimizer=<first_moment=<{MODEL}>,second_moment=<{MODEL}>>"
    assert optimizer in str(process.initialize.type_signature)


def test_it_learns(data: DividedData, examples: list[dict[str, Array]]) -> None:
    process = build_fed_avg(DIGITS, ClientOptimizer(0.2, work=LocalWork(epochs=3, batch_size=16)))
    state = process.initialize()
    first = accuracy(process.trained(state), data.test)
    seen = []
    for _ in range(8):
        state, metrics = process.next(state, examples)
        seen.append(float(metrics.correct))
    assert metrics.examples == sum(len(mine["y"]) for mine in examples)
    assert seen[-1] > 0.95 > seen[0]
    assert first < 0.3
    assert accuracy(process.trained(state), data.test) > 0.85
    assert state.round == 8


# --- against a step written out by hand -------------------------------------------------------------------------------


def forward(weights: Mapping[str, Array], x: Array) -> tuple[Array, Array, Array]:
    before = x / 16.0 @ weights["hidden_kernel"] + weights["hidden_bias"]
    hidden = np.maximum(before, 0)
    logits = hidden @ weights["output_kernel"] + weights["output_bias"]
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return before, hidden, exponents / exponents.sum(axis=1, keepdims=True)


def gradient(weights: Mapping[str, Array], x: Array, y: Array) -> dict[str, Array]:
    before, hidden, probabilities = forward(weights, x)
    d_logits = (probabilities - np.eye(10)[y]) / len(y)
    d_hidden = (d_logits @ weights["output_kernel"].T) * (before > 0)
    return {
        "hidden_kernel": (x / 16.0).T @ d_hidden,
        "hidden_bias": d_hidden.sum(axis=0),
        "output_kernel": hidden.T @ d_logits,
        "output_bias": d_logits.sum(axis=0),
    }


def locally_trained(
    first: Mapping[str, Array], mine: Mapping[str, Array], *, rate: float, batch: int
) -> dict[str, Array]:
    weights = dict(first)
    for start in range(0, len(mine["y"]), batch):
        x, y = mine["x"][start : start + batch].astype(np.float64), mine["y"][start : start + batch]
        slopes = gradient(weights, x, y)
        weights = {name: value - rate * slopes[name] for name, value in weights.items()}
    return {name: weights[name] - first[name] for name in weights}


def test_one_round_is_the_step_of_fedavg_written_out_by_hand(examples: list[dict[str, Array]]) -> None:
    optimizer = ClientOptimizer(0.1, work=LocalWork(batch_size=16, order="stored"))
    process = build_fed_avg(DIGITS, optimizer)
    state, _ = process.next(process.initialize(), examples)
    first = {name: v.astype(np.float64) for name, v in decode_tensors(read_bundle(DIGITS)[0].initial).items()}
    first.pop("learning_rate")
    counts = np.array([len(mine["y"]) for mine in examples])
    deltas = [locally_trained(first, mine, rate=0.1, batch=16) for mine in examples]
    for name, value in first.items():
        mean = sum(count * delta[name] for count, delta in zip(counts, deltas, strict=True)) / counts.sum()
        np.testing.assert_allclose(state.model[name], value + mean, atol=1e-6, err_msg=name)
        assert np.abs(mean).max() > 1e-3, "the step is much larger than what it is compared within"


def test_an_update_is_clipped_weighted_and_clamped_by_its_terms(examples: list[dict[str, Array]]) -> None:
    work = LocalWork(batch_size=16, order="stored")
    terms = Terms(clip_norm=0.2, half_range=0.01, weight_cap=200)
    process = build_fed_avg(DIGITS, ClientOptimizer(0.1, work=work), terms=terms)
    free = build_fed_avg(DIGITS, ClientOptimizer(0.1, work=work))
    first = process.initialize()
    state, metrics = process.next(first, examples)
    shares = [min(len(mine["y"]), 200) / 200 for mine in examples]
    assert metrics.examples == sum(min(len(mine["y"]), 200) for mine in examples)
    total = {name: np.zeros_like(value) for name, value in first.model.items()}
    for mine, share in zip(examples, shares, strict=True):
        alone, _ = free.next(first, [mine])
        delta = {name: alone.model[name] - value for name, value in first.model.items()}
        norm = np.sqrt(sum(float(np.sum(np.square(d))) for d in delta.values()))
        assert norm > 0.2, "every device is clipped"
        for name, value in delta.items():
            total[name] += np.clip(value * (0.2 / norm) * share, -0.01, 0.01)
    for name, value in total.items():
        np.testing.assert_allclose(state.model[name] - first.model[name], value / sum(shares), atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        server_optimizer.sgd(0.5),
        server_optimizer.momentum(0.5),
        server_optimizer.adagrad(0.01),
        server_optimizer.adam(0.01),
        server_optimizer.yogi(0.01),
    ],
    ids=str,
)
def test_the_server_optimizer_gets_the_mean_update(
    optimizer: server_optimizer.ServerOptimizer, examples: list[dict[str, Array]]
) -> None:
    client = ClientOptimizer(0.1, work=LocalWork(batch_size=64, order="stored"))
    plain, process = build_fed_avg(DIGITS, client), build_fed_avg(DIGITS, client, optimizer)
    state = process.initialize()
    moments = optimizer.init(dict(state.model))
    for _ in range(2):
        averaged, _ = plain.next(Record({"model": state.model, "optimizer": (), "round": np.int32(0)}), examples)
        delta = {name: averaged.model[name] - value for name, value in state.model.items()}
        moments, expected = optimizer.apply(moments, dict(state.model), delta)
        state, _ = process.next(state, examples)
        for name, value in expected.items():
            np.testing.assert_allclose(state.model[name], value, atol=1e-5)
    assert state.round == 2
    assert set(state.optimizer.keys() if len(state.optimizer) else ()) == set(moments)


# --- on a fleet -------------------------------------------------------------------------------------------------------


FLEET_TERMS = Terms(clip_norm=5.0, half_range=1.0, weight_cap=700, bits=20)
FLEET_METRICS = {"loss": Bound(0, 10_000), "correct": Bound(0, 700)}


def test_every_round_asks_the_devices_for_the_same_plan() -> None:
    client = ClientOptimizer(0.1, decay=0.5)
    process = build_fed_avg(DIGITS, client, server_optimizer.adam(0.01), terms=FLEET_TERMS, metrics=FLEET_METRICS)
    lowered, state, plans, broadcasts = lower(process.next), process.initialize(), set(), set()
    for _ in range(3):
        request = lowered.request({"state": state, "examples": collection("digits")})
        plans.add(plan_of(request).digest)
        broadcasts.add(request.broadcast)
        delta = [np.full(port.tensor_type.shape, 0.1) for port in process.bundle.results[0].ports]
        sums = {"delta": delta, "loss": [np.ones(1)], "correct": [np.ones(1)]}
        state = lowered.result({"state": state}, RoundSums(sums, weight=10, survivors=5, clamped=0, round=1)).state
    assert len(plans) == 1
    assert len(broadcasts) == 3


def plan_of(request: RoundRequest) -> Plan:
    """Return the plan that a coordinator makes of `request`."""
    return Plan(
        fleet="test",
        name=request.name,
        collection=request.collection,
        program=blob_ref(request.bundle),
        work=request.work,
        aggregations=request.aggregations,
        privacy=PrivacyTerms(purpose=request.purpose, minimum_cohort=3, weight_cap=request.weight_cap),
    )


def test_a_fleet_trains_as_the_reference_does_within_its_rounding(examples: list[dict[str, Array]]) -> None:
    client = ClientOptimizer(0.1, work=LocalWork(batch_size=16, order="stored"))
    process = build_fed_avg(DIGITS, client, server_optimizer.momentum(0.5), terms=FLEET_TERMS, metrics=FLEET_METRICS)
    evaluate = build_federated_evaluation(DIGITS, metrics=FLEET_METRICS, weight_cap=700)
    expected = two_rounds(process, examples)
    scores = evaluate(expected[0].model, examples)
    with simulation.fleet(devices=len(examples)):
        found = two_rounds(process, examples)
        scored = evaluate(expected[0].model, examples)
    for name, value in expected[0].model.items():
        np.testing.assert_allclose(found[0].model[name], value, atol=2e-5)
    assert found[1].examples == expected[1].examples == scored.examples
    assert found[1].correct == pytest.approx(float(expected[1].correct), abs=1e-6)
    assert scored.correct == pytest.approx(float(scores.correct), abs=1e-6)
    assert scored.loss == pytest.approx(float(scores.loss), abs=1e-4)


def two_rounds(process: IterativeProcess, examples: list[dict[str, Array]]) -> tuple[Any, Any]:
    state, _ = process.next(process.initialize(), examples)
    state, metrics = process.next(state, examples)
    return state, metrics


# --- rates, evaluation, refusals --------------------------------------------------------------------------------------


def test_the_devices_rate_decays_from_round_to_round(examples: list[dict[str, Array]]) -> None:
    one_batch = [{name: column[:8] for name, column in examples[0].items()}]
    steady = build_fed_avg(DIGITS, ClientOptimizer(0.1))
    decaying = build_fed_avg(DIGITS, ClientOptimizer(0.1, decay=0.5))
    first = decaying.initialize()
    for number, share in ((0, 1.0), (1, 0.5), (3, 0.125)):
        state = Record({**dict(first.items()), "round": np.int32(number)})
        full, _ = steady.next(state, one_batch)
        less, _ = decaying.next(state, one_batch)
        for name, value in first.model.items():
            np.testing.assert_allclose(less.model[name] - value, share * (full.model[name] - value), atol=1e-6)


def test_evaluation_scores_the_model_and_changes_nothing(data: DividedData, examples: list[dict[str, Array]]) -> None:
    process, evaluate = build_fed_avg(DIGITS), build_federated_evaluation(DIGITS)
    assert str(evaluate.type_signature) == (
        f"(<model=<{MODEL}>@SERVER,examples={{<x=float32[64],y=int32>*}}@CLIENTS> -> "
        "<examples=int32,loss=float32,correct=float32>@SERVER)"
    )
    state, _ = process.next(process.initialize(), examples)
    bundle, pooled = process.trained(state), data.pooled()
    found = evaluate(state.model, examples)
    expected = open_program(bundle).evaluate(decode_tensors(bundle.initial), pooled)
    assert found.examples == len(pooled["y"])
    assert found.correct == pytest.approx(float(expected["correct"][0]) / len(pooled["y"]))
    assert found.loss == pytest.approx(float(expected["loss"][0]) / len(pooled["y"]), rel=1e-5)


def test_only_the_metrics_asked_for_are_summed_within_their_bounds(examples: list[dict[str, Array]]) -> None:
    process = build_fed_avg(DIGITS, metrics={"correct": Bound(0, 10)})
    _, metrics = process.next(process.initialize(), examples)
    assert list(metrics.keys()) == ["examples", "correct"]
    assert metrics.correct * metrics.examples == pytest.approx(10 * len(examples))


def test_a_model_that_is_not_finite_is_not_adopted() -> None:
    averaging = Averaging(read_bundle(DIGITS)[0], ClientOptimizer(), server_optimizer.sgd(3e38))
    state = averaging.first_state()
    delta = Record({"delta": Record({f"delta_{name}": value * 100 for name, value in state.model.items()})})
    with pytest.raises(RoundAbandoned, match="not_finite"), np.errstate(over="ignore"):
        averaging.advance(state, delta)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: build_fed_avg(BUNDLES / "moments_har.svp"), "only sums and updates no model"),
        (lambda: build_fed_avg(DIGITS, metrics={"accuracy": None}), "metrics.accuracy: .* it has loss, correct"),
        (lambda: build_fed_avg(DIGITS, ClientOptimizer(0.0)), "learning_rate is 0.0; write a number above 0"),
        (lambda: ClientOptimizer(decay=1.5), "decay is 1.5; write a number above 0 and at most 1"),
        (lambda: build_federated_evaluation(BUNDLES / "moments_har.svp"), "cannot be told not to train"),
        (lambda: build_federated_evaluation(DIGITS, work=LocalWork(epochs=2)), "one pass over the examples, not 2"),
    ],
)
def test_what_does_not_fit_together_is_refused(build: object, says: str) -> None:
    assert callable(build)
    with pytest.raises(ConfigError, match=says):
        build()


def test_a_trained_model_starts_the_next_process(examples: list[dict[str, Array]]) -> None:
    process = build_fed_avg(DIGITS)
    state, _ = process.next(process.initialize(), examples)
    again: IterativeProcess = build_fed_avg(process.trained(state))
    assert again.initialize().model == state.model


# --- moments and plain sums -------------------------------------------------------------------------------------------


def test_standardisation_finds_mean_and_variance_without_pooling() -> None:
    random = np.random.default_rng(5)
    examples = [{"x": random.normal(at, 1 + at, (7 + at, 128, 9)).astype(np.float32)} for at in range(3)]
    for mine in examples:
        mine["x"][:, :, 4] = 2.5  # never varies
    found = sums.build_standardisation(BUNDLES / "moments_har.svp")(examples)
    pooled = np.concatenate([mine["x"] for mine in examples]).reshape(-1, 9).astype(np.float64)
    np.testing.assert_allclose(found.mean, pooled.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.delete(found.variance, 4), np.delete(pooled.var(axis=0), 4), rtol=1e-5)
    assert 0 < found.variance[4] < np.inf


def test_standardising_needs_a_moments_program() -> None:
    with pytest.raises(ConfigError, match="'digits' is not a moments program; it must broadcast nothing"):
        sums.build_standardisation(DIGITS)


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(RoundAbandoned, match="no_examples"):
        sums.mean_and_variance({"count": np.zeros(1), "sum": np.zeros(2), "sum_of_squares": np.zeros(2)})


def test_plain_sums_release_every_result_and_the_weight() -> None:
    examples = [{"x": np.full((n, 128, 9), n, np.float32)} for n in (1, 2)]
    found = sums.build_sums(BUNDLES / "moments_har.svp")(examples)
    assert found.weight == 3
    assert found.count.count.tolist() == [3 * 128]
    np.testing.assert_allclose(found.sum.sum, np.full(9, 128 * (1 + 2 * 2)))


def test_sums_of_a_model_can_start_from_other_values(examples: list[dict[str, Array]]) -> None:
    still = sums.build_sums(DIGITS, broadcast={"learning_rate": np.zeros(1, np.float32)}, metrics=("correct",))
    found = still(examples)
    assert all(not np.any(value) for value in found.delta.values())
    bundle = with_initial(read_bundle(DIGITS)[0], {"learning_rate": np.zeros(1, np.float32)})
    same, _ = build_fed_avg(bundle).next(build_fed_avg(bundle).initialize(), examples)
    assert same.model == build_fed_avg(bundle).initialize().model
