"""Writes visits.svp, a program with client state that is small enough to check by hand; needs TensorFlow.

    python tests/edge_agent/write_visits.py

It sums a column, and keeps on the device what all committed rounds before have summed, and how many they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from models.ops import Tensor
from models.program_export import ProgramSource, export_program
from sottovoce.bundle import ClientState, Port, Result, encode_bundle
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array

TARGET = Path(__file__).parent / "visits.svp"
TEST_TOTAL, TEST_ROUNDS = 100.0, 7


def _begin(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    before = tf.identity(tensors["total"])
    return {"local_sum": before * 0.0, "local_total": before, "local_rounds": tf.identity(tensors["rounds"])}


def _step(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    kept = {name: tf.identity(tensors[name]) for name in ("local_total", "local_rounds")}
    return {"local_sum": tensors["local_sum"] + tf.reshape(tf.reduce_sum(tensors["x"]), [1]), **kept}


def _finish(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {
        "sum_now": tf.identity(tensors["local_sum"]),
        "sum_before": tf.identity(tensors["local_total"]),
        "next_total": tensors["local_total"] + tensors["local_sum"],
        "next_rounds": tensors["local_rounds"] + 1,
    }


def _reference(broadcast: Mapping[str, Array], batches: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
    summed = np.float32(sum(batch["x"].sum() for batch in batches))
    return {
        "sum_now": np.array([summed], np.float32),
        "sum_before": np.array([TEST_TOTAL], np.float32),
        "next_total": np.array([TEST_TOTAL + summed], np.float32),
        "next_rounds": np.array([TEST_ROUNDS + 1], np.int32),
    }


def _scalar(name: str, dtype: str = "float32") -> Port:
    return Port(name=name, type=f"{dtype}[1]")


def _source() -> ProgramSource:
    return ProgramSource(
        name="visits",
        description="Sums a column, and keeps what the rounds before have summed.",
        functions={"begin": _begin, "step": _step, "finish": _finish},
        broadcast=(),
        state=(_scalar("local_sum"), _scalar("local_total"), _scalar("local_rounds", "int32")),
        batch=(Port(name="x", type="float32[?]"),),
        results=(
            Result(name="now", ports=(_scalar("sum_now"),)),
            Result(name="before", ports=(_scalar("sum_before"),)),
        ),
        initial={},
        test_batches=[{"x": np.arange(size, dtype=np.float32)} for size in (3, 1, 5)],
        test_broadcast={},
        reference=_reference,
        tolerance=0.0,
        client_state=ClientState(
            slot="visits",
            version=1,
            ports=(_scalar("total"), _scalar("rounds", "int32")),
            initial=encode_tensors({"total": np.zeros(1, np.float32), "rounds": np.zeros(1, np.int32)}),
            maximum_bytes=1024,
        ),
        test_client_state={
            "total": np.array([TEST_TOTAL], np.float32),
            "rounds": np.array([TEST_ROUNDS], np.int32),
        },
    )


if __name__ == "__main__":
    content = encode_bundle(export_program(_source()))
    TARGET.write_bytes(content)
    print(f"{TARGET.name}: {len(content)} bytes")
