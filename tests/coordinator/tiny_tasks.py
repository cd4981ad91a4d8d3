"""What a coordinator is given to do: two small bundles that are never run, a task file for each, and requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sottovoce.bundle import FORMAT, Bundle, Port, Result, Role, RoleName, SelfTest, encode_bundle
from sottovoce.language.ports import RoundRequest
from sottovoce.plan import Aggregation, Counted, LocalWork, Quantised
from sottovoce.tensors import encode_tensors

MODEL_TASK = """
name = "tiny"
bundle = "tiny.svp"
collection = "numbers"
rounds = 2
purpose = "to test"
[cohort]
goal = 5
minimum = 4
[time]
selection_s = 10
training_s = 20
stage_s = 5
retry_delay_s = 1
[optimizer]
learning_rate = 0.25
[update]
clip_norm = 10.0
half_range = 1.0
weight_cap = 10
[metrics.correct]
maximum = 100
"""

SUM_TASK = """
name = "moments"
bundle = "moments.svp"
collection = "numbers"
purpose = "to count"
[cohort]
goal = 5
minimum = 4
[results.count]
maximum = 1000
[results.sum]
half_range = 1000.0
[results.sum_of_squares]
half_range = 1000.0
bits = 40
"""

Ask = Callable[..., RoundRequest]


def model_bundle() -> bytes:
    """A model: 2 weights, mean and variance for inputs of 3 features."""
    initial = {
        "kernel": np.arange(6, dtype=np.float32).reshape(3, 2),
        "mean": np.zeros(3, np.float32),
        "variance": np.ones(3, np.float32),
        "learning_rate": np.array([0.5], np.float32),
    }
    types = {"kernel": "float32[3,2]", "mean": "float32[3]", "variance": "float32[3]", "learning_rate": "float32[1]"}
    return _bundle(
        "tiny",
        roles=("begin", "step", "finish", "infer", "evaluate"),
        broadcast=tuple(Port(name=name, type=types[name]) for name in initial),
        state=(Port(name="k", type="float32[3,2]"),),
        metrics=(Port(name="loss", type="float32[1]"), Port(name="correct", type="float32[1]")),
        results=(Result(name="delta", ports=(Port(name="delta_kernel", type="float32[3,2]"),), updates=("kernel",)),),
        initial=encode_tensors(initial),
        features=("x",),
        predictions=(Port(name="p", type="float32[?,2]"),),
        sums=(Port(name="examples", type="float32[1]"),),
    )


def moments_bundle() -> bytes:
    """Count, sum and sum of squares of 3 features."""
    results = {"count": "int32[1]", "sum": "float32[3]", "sum_of_squares": "float32[3]"}
    return _bundle(
        "moments",
        roles=("begin", "step", "finish"),
        broadcast=(),
        state=(Port(name="s", type="float32[3]"),),
        metrics=(),
        results=tuple(Result(name=name, ports=(Port(name=name, type=kind),)) for name, kind in results.items()),
        initial=encode_tensors({}),
    )


def _bundle(name: str, *, roles: tuple[RoleName, ...], **parts: Any) -> bytes:
    nothing = encode_tensors({})
    bundle = Bundle(
        format=FORMAT,
        name=name,
        description="For tests.",
        flatbuffers={"main": b"never run"},
        roles={role: Role(flatbuffer="main", signature=role) for role in roles},
        batch=(Port(name="x", type="float32[?,3]"),),
        self_test=SelfTest(broadcast=nothing, batches=(), expected=nothing, tolerance=1e-5),
        **parts,
    )
    return encode_bundle(bundle)


def make_request(key: str = "", *, bundle: bytes, broadcast: float | None = None, **changed: Any) -> RoundRequest:
    """A round that sums what the moments bundle gives."""
    aggregations = (
        Aggregation(name="count", tensors=("int32[1]",), encoding=Counted(maximum=1000)),
        Aggregation(name="sum", tensors=("float32[3]",), encoding=Quantised(half_range=100.0, bits=40), lane="uint64"),
    )
    tensors = {} if broadcast is None else {"threshold": np.array([broadcast], np.float32)}
    parts: dict[str, Any] = {
        "key": key,
        "name": "mean_temperature",
        "purpose": "to know how warm it is",
        "collection": "temperature",
        "bundle": bundle,
        "work": LocalWork(batch_size=1, max_examples=1, order="stored"),
        "aggregations": aggregations,
        "weight_cap": 10,
        "broadcast": encode_tensors(tensors),
    }
    return RoundRequest(**{**parts, **changed})
