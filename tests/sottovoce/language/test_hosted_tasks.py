"""Programs for task files: the rounds they ask for, what they make of the sums, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sottovoce.bundle import read_bundle
from sottovoce.errors import BadBundle, ConfigError, RoundAbandoned
from sottovoce.language import server_optimizer
from sottovoce.language.expressions import Terms
from sottovoce.language.hosted import HostedProgram, SumTerms
from sottovoce.language.hosted_tasks import hosted_sums, hosted_training
from sottovoce.language.ports import RoundSums
from sottovoce.plan import Counted, LocalWork, Quantised
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array

BUNDLES = Path(__file__).parents[3] / "simulation" / "bundles"
HAR, DIGITS, MOMENTS = ((BUNDLES / f"{name}.svp").read_bytes() for name in ("har", "digits", "moments_har"))
MOMENTS_RESULTS = {
    "count": SumTerms(Counted(maximum=10**6)),
    "sum": SumTerms(Quantised(half_range=1e6, bits=44)),
    "sum_of_squares": SumTerms(Quantised(half_range=1e6, bits=44)),
}
WORK = LocalWork(epochs=5, batch_size=32)
OTHERS: Mapping[str, Any] = {
    "name": "task",
    "purpose": "to see\nand to know",
    "collection": "mine",
    "largest_cohort": 21,
}


def training(bundle: bytes = DIGITS, **changed: Any) -> HostedProgram:
    terms = Terms(clip_norm=5.0, half_range=1.0, weight_cap=500, bits=20, lane="uint32")
    usual = {"rounds": 3, "work": WORK, "terms": terms, "learning_rate": 0.25, **OTHERS}
    return hosted_training(bundle, **{**usual, **changed})


def standardised(**changed: Any) -> HostedProgram:
    return training(HAR, **{"moments": MOMENTS, "moments_results": MOMENTS_RESULTS, **changed})


def sums_of(bundle: bytes = MOMENTS, **changed: Any) -> HostedProgram:
    return hosted_sums(bundle, **{"work": WORK, "results": MOMENTS_RESULTS, **OTHERS, **changed})


def round_sums(weight: int = 8, **sums: Any) -> RoundSums:
    arrays = {name: [np.asarray(value, np.float64) for value in values] for name, values in sums.items()}
    return RoundSums(sums=arrays, weight=weight, survivors=4, clamped=2, round=7)


def deltas(value: float) -> list[Array]:
    """Return a mean update of the digits' model, `value` everywhere."""
    return [np.full(port.tensor_type.shape, value) for port in read_bundle(BUNDLES / "digits.svp")[0].results[0].ports]


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_a_model_asks_for_its_update_and_the_metrics_named() -> None:
    metrics = {"correct": SumTerms(Counted(maximum=500))}
    program = training(metrics=metrics)
    request = program.request_at(0, program.first_state)
    delta, correct = request.aggregations
    assert (delta.name, delta.weighted, delta.clip_norm, delta.lane) == ("delta", True, 5.0, "uint32")
    assert delta.encoding == Quantised(half_range=1.0, bits=20)
    assert (correct.name, correct.encoding, correct.weighted, correct.lane) == (
        "correct", Counted(maximum=500), False, "uint32",
    )  # fmt: skip
    assert (request.name, request.purpose, request.collection) == ("task", "to see\nand to know", "mine")
    assert (request.key, request.work, request.weight_cap, request.bundle) == ("", WORK, 500, DIGITS)
    assert program.length == 3
    assert program.model == read_bundle(BUNDLES / "digits.svp")[0]


def test_every_round_is_the_same_but_for_its_broadcast() -> None:
    program = training(server_optimizer="adam", server_options={"learning_rate": 0.01}, learning_rate_decay=0.5)
    state, requests = program.first_state, []
    for position in range(3):
        requests.append(program.request_at(position, state))
        state = program.apply(position, state, round_sums(delta=deltas(0.5))).state
    without = {msgspec.msgpack.encode(msgspec.structs.replace(each, broadcast=b"")) for each in requests}
    assert len(without) == 1
    assert len({each.broadcast for each in requests}) == 3
    rates = [float(decode_tensors(each.broadcast)["learning_rate"][0]) for each in requests]
    assert rates == [0.25, 0.125, 0.0625]
    again = training(server_optimizer="adam", server_options={"learning_rate": 0.01}, learning_rate_decay=0.5)
    assert again.request_at(0, again.first_state) == requests[0], "the same task is the same plan"


def test_what_is_broadcast_is_what_the_request_carries_and_at_the_end_the_model() -> None:
    program = standardised()
    state = program.first_state
    assert program.broadcast_at(0, state) == {}
    for position in (0, 1, 2, 3):
        sent = encode_tensors(program.broadcast_at(position, state))
        assert sent == program.request_at(position, state).broadcast
    ports = [port.name for port in read_bundle(BUNDLES / "har.svp")[0].broadcast]
    assert list(program.broadcast_at(program.length, state)) == ports


def test_standardisation_is_a_first_round_that_fills_mean_and_variance() -> None:
    program = standardised(rounds=2)
    assert program.length == 3
    state = program.first_state
    request = program.request_at(0, state)
    assert (request.name, request.bundle, request.work.epochs) == ("task-moments", MOMENTS, 1)
    assert request.weight_cap == 10**6
    assert [a.encoding for a in request.aggregations] == [terms.encoding for terms in MOMENTS_RESULTS.values()]
    assert [a.lane for a in request.aggregations] == ["uint32", "uint64", "uint64"]
    data = np.random.default_rng(1).normal(3, 2, (40, 9))
    data[:, 2] = 5.0  # never varies: dividing by its deviation of 0 would ruin everything
    sums = {"count": [[40]], "sum": [data.sum(0)], "sum_of_squares": [(data**2).sum(0)]}
    advance = program.apply(0, state, round_sums(**sums))
    np.testing.assert_allclose(advance.state["model.mean"], data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.delete(advance.state["model.variance"], 2), np.delete(data.var(0), 2), rtol=1e-4)
    assert 0 < advance.state["model.variance"][2] < np.inf
    np.testing.assert_array_equal(advance.state["model.conv1_kernel"], state["model.conv1_kernel"])
    assert advance.metrics == {"examples": 8.0, "clamped": 2.0}
    assert advance.released == {}
    np.testing.assert_array_equal(program.broadcast_at(1, advance.state)["mean"], advance.state["model.mean"])


def test_sums_ask_for_one_round_and_release_every_port() -> None:
    program = sums_of()
    request = program.request_at(0, program.first_state)
    assert (program.length, program.model, program.first_state) == (1, None, {})
    assert [a.name for a in request.aggregations] == ["count", "sum", "sum_of_squares"]
    assert request.weight_cap == 10**6
    totals = {"count": [[5 * 10**9]], "sum": [np.arange(9.0)], "sum_of_squares": [np.ones(9)]}
    advance = program.apply(0, {}, round_sums(**totals))
    assert advance.released["count"].tolist() == [5 * 10**9], "wider than the int32 of one device"
    assert advance.released["sum"].tolist() == list(range(9))
    assert advance.metrics == {"examples": 8.0, "clamped": 2.0}


def test_lanes_of_sums_are_as_wide_as_the_largest_cohort_needs() -> None:
    metrics = {"loss": SumTerms(Quantised(half_range=100.0, bits=30)), "correct": SumTerms(Counted(maximum=2**27))}
    lanes = {
        cohort: {a.name: a.lane for a in program.request_at(0, program.first_state).aggregations}
        for cohort in (3, 31, 40)
        for program in [training(metrics=metrics, largest_cohort=cohort)]
    }
    assert {cohort: (named["loss"], named["correct"]) for cohort, named in lanes.items()} == {
        3: ("uint32", "uint32"),
        31: ("uint64", "uint32"),
        40: ("uint64", "uint64"),
    }


# --- what becomes of the sums -----------------------------------------------------------------------------------------


def test_fedavg_adds_the_mean_times_the_servers_rate() -> None:
    program = training(server_options={"learning_rate": 0.5}, metrics={"correct": SumTerms(Counted(maximum=500))})
    state = program.first_state
    advance = program.apply(0, state, round_sums(delta=deltas(0.8), correct=[[6]]))
    np.testing.assert_allclose(advance.state["model.output_kernel"], state["model.output_kernel"] + 0.4, rtol=1e-6)
    assert advance.state["model.output_kernel"].dtype == np.float32
    assert (int(state["round"]), int(advance.state["round"])) == (0, 1)
    assert advance.metrics == {"examples": 8.0, "clamped": 2.0, "correct": 0.75}
    assert advance.released == {}


@pytest.mark.parametrize("name", server_optimizer.NAMES)
def test_the_state_survives_the_journal_and_advances_as_the_server_optimizer_says(name: str) -> None:
    options = {"learning_rate": 0.1}
    program = training(server_optimizer=name, server_options=options)
    state = program.first_state
    optimizer = server_optimizer.by_name(name, options)
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    moments = optimizer.init(weights)
    for position, value in enumerate((0.5, -0.25)):
        delta = dict(zip(weights, (d.astype(np.float32) for d in deltas(value)), strict=True))
        moments, weights = optimizer.apply(moments, weights, delta)
        state = decode_tensors(encode_tensors(state))
        state = program.apply(position, state, round_sums(delta=deltas(value))).state
    for key, expected in weights.items():
        np.testing.assert_allclose(state[f"model.{key}"], expected, rtol=1e-6)
    kept = {key for key in state if key.startswith("optimizer.")}
    assert kept == {f"optimizer.{part}.{key}" for part, named in moments.items() for key in named}


def test_sums_without_a_usable_state_abandon_the_round() -> None:
    program = training()
    with pytest.raises(RoundAbandoned, match="not_finite"), np.errstate(over="ignore"):
        program.apply(0, program.first_state, round_sums(delta=deltas(1e39)))
    nothing = {"count": [[0]], "sum": [np.zeros(9)], "sum_of_squares": [np.zeros(9)]}
    first = standardised()
    with pytest.raises(RoundAbandoned, match="no_examples"):
        first.apply(0, first.first_state, round_sums(**nothing))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda: training(MOMENTS, learning_rate=None),
            "bundle 'moments_har' only sums and updates no model; leave out",
        ),
        (lambda: sums_of(DIGITS), r"update: bundle 'digits' trains a model; add the table \[update\] with clip_norm"),
        (
            lambda: training(metrics={"accuracy": SumTerms(Counted(maximum=3))}),
            "metrics.accuracy: bundle 'digits' has no such name; it has loss, correct",
        ),
        (
            lambda: training(results={"sum": SumTerms(Counted(maximum=3))}),
            "results.sum: bundle 'digits' has no such name; it has none",
        ),
        (
            lambda: sums_of(results={**MOMENTS_RESULTS, "mode": SumTerms(Counted(maximum=3))}),
            "results.mode: bundle 'moments_har' has no such name; it has count, sum, sum_of_squares",
        ),
        (
            lambda: sums_of(results={"count": MOMENTS_RESULTS["count"]}),
            "results.sum: say how it is encoded: maximum, or half_range and bits",
        ),
        (
            lambda: standardised(moments_results={"count": MOMENTS_RESULTS["count"]}),
            "standardise.results.sum: say how it is encoded",
        ),
        (lambda: sums_of(learning_rate=0.1), "optimizer.learning_rate: bundle 'moments_har' has no port"),
        (lambda: standardised(moments=DIGITS), "standardise.bundle: 'digits' is not a moments program"),
        (
            lambda: training(moments=MOMENTS, moments_results=MOMENTS_RESULTS),
            "standardise: the task's bundle has no broadcast port 'mean'; remove the table",
        ),
        (
            lambda: training(server_optimizer="lamb"),
            "optimizer: there is no server optimizer 'lamb'; choose one of sgd,",
        ),
        (lambda: training(server_optimizer="adam"), "optimizer: the server optimizer 'adam' needs 'learning_rate'"),
        (lambda: training(server_options={"beta_1": 0.5}), "optimizer: the server optimizer 'sgd' has no 'beta_1'"),
    ],
)
def test_what_does_not_fit_together_is_named(build: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build()


def test_what_is_no_bundle_is_refused() -> None:
    with pytest.raises(BadBundle):
        training(b"not a bundle")


def test_a_coordinator_needs_no_tensorflow() -> None:
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "import pathlib\n"
        "from sottovoce.language.expressions import Terms\n"
        "from sottovoce.language.hosted_tasks import hosted_training\n"
        "from sottovoce.plan import LocalWork\n"
        f"bundle = pathlib.Path({str(BUNDLES / 'digits.svp')!r}).read_bytes()\n"
        "program = hosted_training(bundle, name='a', purpose='b', collection='c', rounds=1, work=LocalWork(),\n"
        "    terms=Terms(1.0, 1.0, 10, 16, 'uint32'), largest_cohort=3, learning_rate=None)\n"
        "print(len(program.request_at(0, program.first_state).aggregations))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
