"""Computations whose author brings the client program: what is sent, summed and refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sottovoce as sv
from sottovoce.bundle import Bundle, read_bundle
from sottovoce.errors import DefinitionError
from sottovoce.language.computations import Computation
from sottovoce.language.expressions import ClientProgram
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.language.lowering import lower
from sottovoce.plan import Aggregation, LocalWork, Quantised
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array, Type
from sottovoce.values import Record, flatten

BUNDLES = Path(__file__).resolve().parents[3] / "simulation" / "bundles"


def program_of(name: str) -> ClientProgram:
    return sv.client_program(BUNDLES / f"{name}.svp", epochs=2, batch_size=8, order="stored")


DIGITS = program_of("digits")
MOMENTS = program_of("moments_har")
SCAFFOLD = program_of("digits_scaffold")


def part(program: ClientProgram, name: str) -> Type:
    return program.parameter.elements[program.parameter.index(name)][1]


def initial(bundle: Bundle) -> Record[Array]:
    arrays = decode_tensors(bundle.initial)
    return Record({port.name: arrays[port.name] for port in bundle.broadcast})


def defined(function: Callable[..., Any], program: ClientProgram = DIGITS) -> Computation:
    """Return the computation of (broadcast at SERVER, examples at CLIENTS) that `function` describes of the results."""

    def computed(model: Any, examples: Any) -> Any:
        return function(sv.federated_map(program, (sv.federated_broadcast(model), examples)))

    return sv.federated_computation(sv.at_server(part(program, "broadcast")), sv.at_clients(part(program, "examples")))(
        computed
    )


def images(count: int, seed: int) -> list[tuple[Array, np.int32]]:
    random = np.random.default_rng(seed)
    return [(random.uniform(0, 1, 64).astype(np.float32), np.int32(random.integers(10))) for _ in range(count)]


def weighted(found: Any) -> Any:
    return sv.federated_mean(
        found.delta, weight=found.weight, clip_norm=0.5, half_range=0.05, weight_cap=20, bits=20, lane="uint32"
    )


def test_a_training_round_is_the_spines() -> None:
    lowered = lower(
        defined(lambda found: {"delta": weighted(found), "loss": sv.federated_sum(found.loss, bound=(0, 500))})
    )
    bundle, _ = read_bundle(BUNDLES / "digits.svp")
    delta = next(result for result in bundle.results if result.name == "delta")
    assert lowered.bundle == (BUNDLES / "digits.svp").read_bytes()
    assert lowered.work == LocalWork(epochs=2, batch_size=8, order="stored")
    assert lowered.weight_cap == 20
    assert lowered.aggregations == (
        Aggregation(
            name="delta",
            tensors=tuple(port.type for port in delta.ports),
            encoding=Quantised(half_range=0.05, bits=20),
            weighted=True,
            clip_norm=0.5,
            lane="uint32",
        ),
        Aggregation(name="loss", tensors=("float32[1]",), encoding=Quantised(half_range=500.0, bits=32), lane="uint64"),
    )
    assert lowered.columns == (("x", sv.type_of("float32[64]")), ("y", sv.type_of("int32")))


def test_a_training_round_gives_what_the_reference_gives(fleet: FleetExecutor) -> None:
    computation = defined(
        lambda found: {
            "delta": weighted(found),
            "correct": sv.federated_sum(found.correct, bound=(0, 100)),
            "examples": sv.federated_sum(found.weight, bound=(0, 20)),
        }
    )
    members = [images(count, seed) for seed, count in enumerate((5, 12, 30))]
    model = initial(DIGITS.bundle)
    expected = computation(model, members)
    with sv.use(fleet):
        found = computation(model, members)
    named: Mapping[str, object] = {"model": model, "examples": tuple(members)}
    errors = fleet.lowered(computation, named).errors(3)
    kind = computation.type_signature.result
    for wanted, got, error in zip(flatten(kind, expected), flatten(kind, found), errors, strict=True):
        assert error is not None
        np.testing.assert_allclose(got, wanted, rtol=0, atol=error + 1e-6)
    # A device counts for at most 20 examples.
    assert found.examples == 5 + 12 + 20
    assert np.abs(found.delta[0]).max() > 1e-4


def test_sums_of_a_program_without_broadcast(fleet: FleetExecutor, plain_rounds: Any) -> None:
    computation = defined(
        lambda found: (
            sv.federated_sum(found.count, bound=(0, 10**6)),
            sv.federated_sum(found["sum"], bound=(-(10**4), 10**4)),
            sv.federated_sum(found.sum_of_squares[0], bound=(0, 10**5)),
        ),
        MOMENTS,
    )
    random = np.random.default_rng(0)
    members = [[(random.normal(size=(128, 9)).astype(np.float32),) for _ in range(3)] for _ in range(3)]
    with sv.use(fleet):
        count, total, squares = computation(Record({}), members)
    (request,) = plain_rounds.requests
    assert request.broadcast == encode_tensors({})
    stacked = np.stack([row[0] for member in members for row in member]).reshape(-1, 9).astype(np.float64)
    # Two epochs of three examples a device; MOMENTS' first epoch is summed with the second.
    assert count[0].tolist() == [2 * len(stacked)]
    np.testing.assert_allclose(total[0], 2 * stacked.sum(0), atol=0.01)
    np.testing.assert_allclose(squares, 2 * (stacked**2).sum(0), rtol=1e-4)


def test_client_state_goes_through_the_program(fleet: FleetExecutor, plain_rounds: Any) -> None:
    slot = sv.client_state_of(SCAFFOLD)

    @sv.federated_computation(sv.at_server(part(SCAFFOLD, "broadcast")), sv.at_clients(part(SCAFFOLD, "examples")))
    def train(model, examples):
        found = sv.federated_map(SCAFFOLD, (sv.federated_broadcast(model), slot.read(), examples))
        slot.write(found.client_state)
        return sv.federated_sum(found.control_delta, bound=(-1, 1))

    assert [aggregation.name for aggregation in lower(train).aggregations] == ["control_delta"]
    with sv.use(fleet):
        train(initial(SCAFFOLD.bundle), [images(4, seed) for seed in range(3)])
    assert len(plain_rounds.kept) == 3
    assert any(np.abs(array).max() > 0 for array in plain_rounds.kept[slot.slot.name, 0].values())


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a sum without a bound": (
        lambda found: sv.federated_sum(found.loss),
        r"federated_sum: the value has no bound, and a fleet can only",
    ),
    "something computed from a result": (
        lambda found: sv.federated_sum(sv.federated_map(sv.clip(0, 1), found.loss)),
        r"after a client program, only its results can be summed, as they are: sv.federated_sum\(found.RESULT\)",
    ),
    "a part of a result": (
        lambda found: sv.federated_sum(found.delta[0], bound=(-1, 1)),
        r"and delta has 4 tensors: sum delta whole, and select from the sum",
    ),
    "a weight of the author's own": (
        lambda found: sv.federated_mean(found.delta, weight=found.loss, half_range=1.0, weight_cap=3),
        r"a client program's result can only be weighted by its own number of examples: weight=found.weight",
    ),
    "no cap on the weight": (
        lambda found: sv.federated_mean(found.delta, weight=found.weight, half_range=1.0),
        r"the number of examples has no bound; say for how many a device may count at most: weight_cap=",
    ),
    "no bound of the number of examples": (
        lambda found: sv.federated_sum(found.weight),
        r"the number of examples has no bound; say for how many a device may count at most: bound=\(0, most examples\)",
    ),
    "two caps": (
        lambda found: (
            sv.federated_mean(found.delta, weight=found.weight, half_range=1.0, weight_cap=5),
            sv.federated_sum(found.weight, bound=(0, 7)),
        ),
        r"a device's weight is capped at 5 and at 7; a round has one cap",
    ),
    "only the weight": (
        lambda found: sv.federated_sum(found.weight, bound=(0, 7)),
        r"only the weight of the program is summed; sum one of its results, too",
    ),
    "one result with two bounds": (
        lambda found: (sv.federated_sum(found.loss, bound=(0, 7)), sv.federated_sum(found.loss, bound=(0, 8))),
        r"'loss' is summed twice with different bounds or terms",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_with_a_program_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(DefinitionError, match=r"test_given_program.py:\d+, .*" + message):
        lower(defined(function))


def test_a_program_whose_broadcast_is_no_broadcast_is_refused() -> None:
    value = sv.federated_value

    @sv.federated_computation(sv.at_clients(part(DIGITS, "examples")))
    def train(examples):
        found = sv.federated_map(DIGITS, (value(initial(DIGITS.bundle), sv.CLIENTS), examples))
        return sv.federated_sum(found.loss, bound=(0, 1))

    with pytest.raises(DefinitionError, match=r"must be one sv.federated_broadcast of a value at SERVER"):
        lower(train)


def test_negative_whole_numbers_of_a_program_are_refused() -> None:
    with pytest.raises(DefinitionError, match=r"are summed from 0 on; give bound=\(0, largest\)"):
        lower(defined(lambda found: sv.federated_sum(found.count, bound=(-1, 5)), MOMENTS))
