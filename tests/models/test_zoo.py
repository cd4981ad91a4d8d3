"""The committed bundles are those that the zoo exports: the same types, and the same results on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from models.export import export, export_model
from models.personalised import export_personalised
from models.scaffold import export_scaffold
from models.zoo.digits import digits
from models.zoo.har import har
from models.zoo.moments import moments
from sottovoce.bundle import Bundle, read_bundle
from sottovoce.runtime import open_program, run_self_test
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

FOLDER = Path(__file__).resolve().parents[2] / "simulation" / "bundles"
EXPORTS: dict[str, Callable[[], Bundle]] = {
    "digits": lambda: export_model(digits()),
    "digits_scaffold": lambda: export_scaffold(digits()),
    "digits_personalised": lambda: export_personalised(digits()),
    "har": lambda: export_model(har()),
    "moments_har": lambda: export(moments("moments_har", shape=(128, 9))),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_committed_bundle_behaves_as_its_new_export(name: str) -> None:
    committed, exported = read_bundle(FOLDER / f"{name}.svp")[0], EXPORTS[name]()
    left_out = {"flatbuffers": {}, "self_test": committed.self_test}
    assert msgspec.structs.replace(committed, **left_out) == msgspec.structs.replace(exported, **left_out)
    run_self_test(exported, open_program(committed))
    run_self_test(committed, open_program(exported))
    expected = results_of(exported)
    for role, values in results_of(committed).items():
        for port, value in values.items():
            np.testing.assert_allclose(value, expected[role][port], rtol=1e-5, atol=1e-5, err_msg=f"{role} {port}")


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
    assert sum(value.size for value in har().weights.values()) == 29_830
    assert sum(value.size for value in digits().weights.values()) == 64 * 64 + 64 + 64 * 10 + 10


def test_no_constant_of_a_data_set_is_in_the_har_bundle() -> None:
    initial = decode_tensors(read_bundle(FOLDER / "har.svp")[0].initial)
    assert (initial["mean"] == 0).all()
    assert (initial["std"] == 1).all()


def test_har_standardises_its_own_input() -> None:
    bundle = read_bundle(FOLDER / "har.svp")[0]
    program, broadcast = open_program(bundle), decode_tensors(bundle.initial)
    x = np.random.default_rng(0).normal(size=(5, 128, 9)).astype(np.float32)
    mean, std = np.linspace(-2, 2, 9, dtype=np.float32), np.linspace(0.5, 3, 9, dtype=np.float32)
    plain = program.infer(broadcast, {"x": (x - mean) / std})["probabilities"]
    inside = program.infer({**broadcast, "mean": mean, "std": std}, {"x": x})["probabilities"]
    np.testing.assert_allclose(inside, plain, atol=1e-6)
    still = program.infer({**broadcast, "std": np.zeros(9, np.float32)}, {"x": np.zeros_like(x)})["probabilities"]
    assert np.isfinite(still).all()


def test_every_bundle_is_small_enough_for_a_slow_link() -> None:
    sizes = {path.stem: path.stat().st_size for path in FOLDER.glob("*.svp")}
    assert set(sizes) == set(EXPORTS)
    assert max(sizes.values()) < 300_000
