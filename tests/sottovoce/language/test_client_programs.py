"""Client programs in the language: their types, and the very results that a device computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sottovoce as sv
from edge_agent.work import prepare
from sottovoce.bundle import read_bundle
from sottovoce.errors import BadExamples, ConfigError, DefinitionError, TypeMismatch
from sottovoce.plan import LocalWork
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array
from sottovoce.values import Record

BUNDLES = Path(__file__).resolve().parents[3] / "simulation" / "bundles"
DIGITS = BUNDLES / "digits.svp"
SCAFFOLD = BUNDLES / "digits_scaffold.svp"


def examples_of(size: int, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "x": random.uniform(0, 16, (size, 64)).astype(np.float32),
        "y": random.integers(10, size=size, dtype=np.int32),
    }


def broadcast_of(path: Path) -> dict[str, Array]:
    values = decode_tensors(read_bundle(path)[0].initial)
    return {**values, "learning_rate": np.array([0.05], np.float32)}


def on_a_device(path: Path, work: LocalWork, examples: dict[str, Array]) -> dict[str, list[Array]]:
    """What the agent's own code makes of the same work."""
    bundle, _ = read_bundle(path)
    run = prepare(open_program(bundle), bundle, work, broadcast=broadcast_of(path), examples=examples)
    state = run.start(os.urandom)
    while not run.is_done(state):
        state = run.advance(state)
    return dict(run.result(state).values)


def test_the_type_of_a_program() -> None:
    program = sv.client_program(DIGITS)
    assert str(program.parameter) == (
        "<broadcast=<hidden_kernel=float32[64,64],hidden_bias=float32[64],output_kernel=float32[64,10],"
        "output_bias=float32[10],learning_rate=float32[1]>,examples=<x=float32[64],y=int32>*>"
    )
    assert str(program.result) == (
        "<delta=<delta_hidden_kernel=float32[64,64],delta_hidden_bias=float32[64],delta_output_kernel=float32[64,10],"
        "delta_output_bias=float32[10]>,loss=float32[1],correct=float32[1],weight=int32>"
    )


def test_path_bytes_and_bundle_make_the_same_program() -> None:
    programs = [sv.client_program(source) for source in (DIGITS, str(DIGITS), DIGITS.read_bytes())]
    programs.append(sv.client_program(read_bundle(DIGITS)[0]))
    assert len({program.content for program in programs}) == 1


def test_what_cannot_be_a_program() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the bundle nowhere\.svp"):
        sv.client_program("nowhere.svp")
    with pytest.raises(ConfigError, match="epochs and batch_size must be at least 1"):
        sv.client_program(DIGITS, epochs=0)


def round_of(program: Any) -> Any:
    broadcast, examples = (kind for _, kind in program.parameter.elements)

    @sv.federated_computation(sv.at_server(broadcast), sv.at_clients(examples))
    def train(model: Any, examples: Any) -> Any:
        work = sv.federated_map(program, (sv.federated_broadcast(model), examples))
        return sv.federated_mean(work.delta, work.weight), sv.federated_sum(work.loss), work.weight

    return train


def test_members_compute_what_devices_compute() -> None:
    work = LocalWork(epochs=2, batch_size=8, max_examples=20, order="stored")
    train = round_of(sv.client_program(DIGITS, epochs=2, batch_size=8, max_examples=20, order="stored"))
    members = [examples_of(30, 1), examples_of(12, 2)]
    delta, loss, weight = train(broadcast_of(DIGITS), members)
    devices = [on_a_device(DIGITS, work, examples) for examples in members]
    assert weight == (20, 12)
    assert loss == pytest.approx(sum(device["loss"][0] for device in devices), rel=1e-6)
    for at, found in enumerate(delta):
        expected = sum(n * device["delta"][at].astype(np.float64) for n, device in zip(weight, devices, strict=True))
        assert found == pytest.approx(expected / 32, abs=1e-7)


def test_a_member_without_examples_is_refused() -> None:
    with pytest.raises(BadExamples, match="a member has no examples; leave it out, as a fleet does"):
        round_of(sv.client_program(DIGITS))(broadcast_of(DIGITS), [[]])


def test_client_state_of_a_program_goes_through_its_slot() -> None:
    program = sv.client_program(SCAFFOLD, batch_size=8)
    slot = sv.client_state_of(program)
    kinds = dict(program.parameter.elements)

    @sv.federated_computation(sv.at_server(kinds["broadcast"]), sv.at_clients(kinds["examples"]))
    def train(model: Any, examples: Any) -> Any:
        kept = slot.read()
        work = sv.federated_map(program, (sv.federated_broadcast(model), kept, examples))
        slot.write(work.client_state)
        return kept, work.client_state

    with sv.use(sv.reference_executor()):
        first, written = train(broadcast_of(SCAFFOLD), [examples_of(16, 1), examples_of(8, 2)])
        again, _ = train(broadcast_of(SCAFFOLD), [examples_of(16, 1), examples_of(8, 2)])
    assert all(not leaf.any() for member in first for leaf in member)
    assert any(leaf.any() for member in written for leaf in member)
    assert again == written
    assert isinstance(again[0], Record)


def test_a_program_without_state_has_no_slot() -> None:
    with pytest.raises(ConfigError, match="keeps no client state"):
        sv.client_state_of(sv.client_program(DIGITS))


def test_a_program_runs_on_devices_only_and_on_its_own_types() -> None:
    program = sv.client_program(DIGITS)
    with pytest.raises(DefinitionError, match="runs on devices: map it over values at CLIENTS"):
        sv.federated_computation(lambda x: sv.federated_map(program, x), sv.at_server(program.parameter))
    with pytest.raises(TypeMismatch, match=r"the argument of .*digits.* does not fit"):
        sv.federated_computation(lambda x: sv.federated_map(program, x), "{float32}@CLIENTS")
