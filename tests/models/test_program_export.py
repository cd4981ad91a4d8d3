"""From functions to a bundle: what comes out works and is checked, what cannot work is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import tensorflow as tf

from models.ops import Tensor
from models.program_export import ProgramSource, export_program, run_with_tensorflow
from sottovoce.bundle import Port, Result, encode_bundle
from sottovoce.errors import BadBundle, SelfTestFailed
from sottovoce.runtime import open_program
from sottovoce.types import Array


def scaled_sum(transform: Callable[[Tensor], Tensor] = tf.identity) -> ProgramSource:
    """Return the program that sums `transform` of a column, times a broadcast factor."""
    functions = {
        "begin": lambda tensors: {"local_sum": tensors["factor"] * 0.0, "local_factor": tf.identity(tensors["factor"])},
        "step": lambda tensors: {
            "local_sum": tensors["local_sum"]
            + tensors["local_factor"] * tf.reshape(tf.reduce_sum(transform(tensors["x"])), [1]),
            "local_factor": tf.identity(tensors["local_factor"]),
        },
        "finish": lambda tensors: {"total": tf.identity(tensors["local_sum"])},
    }
    factor = Port(name="factor", type="float32[1]")
    return ProgramSource(
        name="scaled",
        description="A sum.",
        functions=functions,  # type: ignore[arg-type]
        broadcast=(factor,),
        state=(Port(name="local_sum", type="float32[1]"), Port(name="local_factor", type="float32[1]")),
        batch=(Port(name="x", type="float32[?]"),),
        results=(Result(name="total", ports=(Port(name="total", type="float32[1]"),)),),
        initial={"factor": np.ones(1, np.float32)},
        test_broadcast={"factor": np.full(1, 1.5, np.float32)},
        test_batches=[{"x": np.arange(size, dtype=np.float32)} for size in (3, 1, 2)],
        reference=lambda broadcast, batches: run_with_tensorflow(functions, broadcast, batches),  # type: ignore[arg-type]
        tolerance=1e-6,
    )


def test_a_program_runs_on_batches_of_any_size() -> None:
    program = open_program(export_program(scaled_sum()))
    state = program.begin({"factor": np.full(1, 2.0, np.float32)})
    for size in (5, 2):
        state, _ = program.step(state, {"x": np.ones(size, np.float32)})
    assert program.finish(state, {"factor": np.ones(1, np.float32)})["total"].tolist() == [14.0]


def test_two_exports_are_the_same_bytes() -> None:
    assert encode_bundle(export_program(scaled_sum())) == encode_bundle(export_program(scaled_sum()))


def test_a_program_that_disagrees_with_its_reference_is_refused() -> None:
    def reference(broadcast: Mapping[str, Array], batches: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
        return {"total": np.array([0.25], np.float32)}

    with pytest.raises(SelfTestFailed) as failure:
        export_program(dataclasses.replace(scaled_sum(), reference=reference))
    assert failure.value.difference == pytest.approx(1.5 * 4 - 0.25)


def test_an_operation_that_devices_do_not_have_is_named() -> None:
    with pytest.raises(BadBundle, match=r"scaled, step: devices have no .*Erfinv"):
        export_program(scaled_sum(lambda x: tf.math.erfinv(x / 10.0)))
