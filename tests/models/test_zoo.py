"""The committed bundles are those that the zoo exports: the same types, and the same results on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from models.export import export
from models.personalised import export_personalised
from models.program_export import export_program
from models.scaffold import export_scaffold
from models.zoo.digits import digits
from models.zoo.har import har
from models.zoo.moments import moments
from sottovoce.bundle import Bundle, read_bundle
from sottovoce.runtime import open_program, run_self_test
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

FOLDER = Path(__file__).resolve().parents[2] / "simulation" / "bundles"
MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Bundle]]] = {
    "digits": (digits, export),
    "digits_scaffold": (digits, export_scaffold),
    "digits_personalised": (digits, export_personalised),
    "har": (har, export),
}


@pytest.mark.parametrize("name", [*MODELS, "moments_har"])
def test_a_committed_bundle_behaves_as_its_new_export(name: str) -> None:
    committed = read_bundle(FOLDER / f"{name}.svp")[0]
    exported = exported_again(name)
    left_out = {"flatbuffers": {}, "self_test": committed.self_test, "description": ""}
    assert msgspec.structs.replace(committed, **left_out) == msgspec.structs.replace(exported, **left_out)
    run_self_test(exported, open_program(committed))
    run_self_test(committed, open_program(exported))
    expected = results_of(exported)
    for role, values in results_of(committed).items():
        for port, value in values.items():
            np.testing.assert_allclose(value, expected[role][port], rtol=1e-5, atol=1e-5, err_msg=f"{role} {port}")


def exported_again(name: str) -> Bundle:
    """Return the bundle `name` made anew of the zoo."""
    if name == "moments_har":
        return export_program(moments("moments_har", shape=(128, 9)))
    make, export_one = MODELS[name]
    model = make()
    return export_one(model, loss=model.loss, optimizer=model.optimizer)


def results_of(bundle: Bundle) -> dict[str, dict[str, Array]]:
    """Return what every role gives on random batches of the label range and the shapes that the ports declare."""
    program, random = open_program(bundle), np.random.default_rng(3)
    broadcast = decode_tensors(bundle.initial)
    state = program.begin(broadcast, decode_tensors(bundle.client_state.initial) if bundle.client_state else {})
    for size in (32, 7):
        batch = {}
        for port in bundle.batch:
            shape = [d if d is not None else size for d in port.tensor_type.shape]
            draw = random.uniform(-1, 3, shape) if port.high is None else random.integers(0, port.high + 1, shape)
            batch[port.name] = draw.astype(port.tensor_type.numpy_dtype)
        state, metrics = program.step(state, batch)
    results = {"step": {**state, **metrics}, "finish": program.finish(state, broadcast)}
    if "infer" in bundle.roles:
        results["infer"] = program.infer(broadcast, {name: batch[name] for name in bundle.features})
        results["evaluate"] = program.evaluate(broadcast, batch)
    return results


def test_the_sizes_of_the_models_are_those_of_their_descriptions() -> None:
    sizes = {make: sum(variable.numpy().size for variable in make().trainable_variables) for make in (digits, har)}
    assert sizes == {digits: 4_810, har: 29_830}


def test_no_constant_of_a_data_set_is_in_the_har_bundle() -> None:
    initial = decode_tensors(read_bundle(FOLDER / "har.svp")[0].initial)
    assert (initial["mean"] == 0).all()
    assert (initial["variance"] == 1).all()


def test_har_standardises_its_own_input() -> None:
    bundle = read_bundle(FOLDER / "har.svp")[0]
    program, broadcast = open_program(bundle), decode_tensors(bundle.initial)
    x = np.random.default_rng(0).normal(size=(5, 128, 9)).astype(np.float32)
    mean, variance = np.linspace(-2, 2, 9, dtype=np.float32), np.linspace(0.25, 9, 9, dtype=np.float32)
    plain = program.infer(broadcast, {"x": (x - mean) / np.sqrt(variance)})["prediction"]
    inside = program.infer({**broadcast, "mean": mean, "variance": variance}, {"x": x})["prediction"]
    np.testing.assert_allclose(inside, plain, atol=1e-6)
    still = program.infer({**broadcast, "variance": np.zeros(9, np.float32)}, {"x": np.zeros_like(x)})["prediction"]
    assert np.isfinite(still).all()


def test_every_bundle_is_small_enough_for_a_slow_link() -> None:
    sizes = {path.stem: path.stat().st_size for path in FOLDER.glob("*.svp")}
    assert set(sizes) == {*MODELS, "moments_har"}
    assert max(sizes.values()) < 300_000
