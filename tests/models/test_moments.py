"""Count, sum and sum of squares: as exact as float32 allows, for examples of any shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.program_export import export_program
from models.zoo.moments import moments
from sottovoce.bundle import Bundle, read_bundle
from sottovoce.runtime import open_program
from sottovoce.types import Array

COMMITTED = Path(__file__).resolve().parents[2] / "simulation" / "bundles" / "moments_har.svp"


def moments_of(bundle: Bundle, x: Array, *, batch_size: int) -> dict[str, Array]:
    program = open_program(bundle)
    state = program.begin({})
    for start in range(0, len(x), batch_size):
        state, metrics = program.step(state, {"x": x[start : start + batch_size]})
        assert metrics == {}
    return program.finish(state, {})


def assert_exact(found: dict[str, Array], x: Array, *, tolerance: float) -> None:
    samples = x.reshape(-1, x.shape[-1]).astype(np.float64)
    assert found["count"].tolist() == [len(samples)]
    # A sum near zero is as exact as what was added up, not as what is left of it.
    np.testing.assert_allclose(found["sum"], samples.sum(0), rtol=0, atol=tolerance * np.abs(samples).sum(0).max())
    np.testing.assert_allclose(found["sum_of_squares"], (samples**2).sum(0), rtol=tolerance)


@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_the_sums_of_a_persons_windows_are_those_of_float64(mean: float) -> None:
    x = np.random.default_rng(0).normal(mean, 1.0, (345, 128, 9)).astype(np.float32)
    assert_exact(moments_of(read_bundle(COMMITTED)[0], x, batch_size=32), x, tolerance=2e-7)


def test_the_error_does_not_grow_with_the_number_of_batches() -> None:
    x = np.full((20_000, 1), 0.1, np.float32)
    bundle = export_program(moments("moments_one", shape=(1,)))
    assert_exact(moments_of(bundle, x, batch_size=1), x, tolerance=1e-7)
    # Added up plainly, the same numbers lose a thousand times as much: the compensation does the work.
    plain = np.float32(0)
    for value in x[:, 0]:
        plain += value
    assert abs(float(plain) / (20_000 * float(x[0, 0])) - 1) > 1e-5


@pytest.mark.parametrize("shape", [(4,), (2, 3, 5)])
def test_examples_of_any_shape_have_their_features_last(shape: tuple[int, ...]) -> None:
    bundle = export_program(moments("moments_any", shape=shape))
    assert set(bundle.roles) == {"begin", "step", "finish"}
    assert [(r.name, r.ports[0].type) for r in bundle.results] == [
        ("count", "int32[1]"),
        ("sum", f"float32[{shape[-1]}]"),
        ("sum_of_squares", f"float32[{shape[-1]}]"),
    ]
    x = np.random.default_rng(1).normal(size=(11, *shape)).astype(np.float32)
    assert_exact(moments_of(bundle, x, batch_size=4), x, tolerance=1e-6)


@pytest.mark.shared_data
def test_real_peoples_moments_are_those_of_numpy(shared_data: Path) -> None:
    stored = np.load(shared_data / "har_hapt" / "har.npz")
    x = (stored["x"][stored["subject"] == 1] * stored["scale"]).astype(np.float32)
    found = moments_of(read_bundle(COMMITTED)[0], x, batch_size=32)
    assert_exact(found, x, tolerance=1e-6)
    variance = found["sum_of_squares"] / found["count"] - (found["sum"] / found["count"]) ** 2
    np.testing.assert_allclose(np.sqrt(variance), x.reshape(-1, 9).astype(np.float64).std(0), rtol=1e-4)
