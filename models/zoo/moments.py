"""Count, sum and sum of squares of every feature: a client program that is not a model.

From the sums over all devices follow mean = sum / count and variance = sum_of_squares / count - mean^2, so inputs can
be standardised although nobody's measurements leave their device. A device may add up millions of float32 values, so
each batch is summed one axis at a time and the batches are added with compensation (Kahan 1965): the error stays at a
few units in the last place instead of growing with the number of batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from models.ops import Tensor
from models.program_export import Arrays, ProgramSource, Tensors, seed_of
from sottovoce.bundle import Port, Result
from sottovoce.types import Array

_SUMS = ("sum", "sum_of_squares")
_SELF_TEST_BATCHES = (4, 1, 3, 1, 2)


def moments(name: str, *, shape: tuple[int, ...]) -> ProgramSource:
    """Return the program for examples of `shape`; the last axis holds the features, the others are samples of them.

    Args:
        name: Name of the bundle.
        shape: Shape of one example without the batch dimension, for example (128, 9): nine features, 128 samples.
    """
    features = shape[-1]
    samples = math.prod(shape[:-1])
    per_feature = f"float32[{features}]"
    random = np.random.default_rng(seed_of(name))
    return ProgramSource(
        name=name,
        description=f"Counts and adds up {features} features and their squares, to standardise inputs without pooling.",
        functions={
            "begin": lambda tensors: _begin(features),
            "step": lambda tensors: _step(tensors, samples=samples),
            "finish": _finish,
        },
        broadcast=(),
        state=(
            Port(name="local_count", type="int32[1]"),
            *(Port(name=f"local_{part}", type=per_feature) for each in _SUMS for part in (each, f"{each}_rest")),
        ),
        batch=(Port(name="x", type=f"float32[?,{','.join(map(str, shape))}]"),),
        results=(
            Result(name="count", ports=(Port(name="count", type="int32[1]"),)),
            *(Result(name=each, ports=(Port(name=each, type=per_feature),)) for each in _SUMS),
        ),
        initial={},
        test_broadcast={},
        test_batches=[{"x": random.normal(0.5, 1.0, (size, *shape)).astype(np.float32)} for size in _SELF_TEST_BATCHES],
        reference=lambda broadcast, batches: _reference(batches, samples=samples),
        tolerance=1e-3,
    )


def _begin(features: int) -> Tensors:
    zeros = {f"local_{part}": tf.zeros([features]) for each in _SUMS for part in (each, f"{each}_rest")}
    return {"local_count": tf.zeros([1], tf.int32), **zeros}


def _step(tensors: Tensors, *, samples: int) -> Tensors:
    x = tensors["x"]
    state = {"local_count": tensors["local_count"] + tf.shape(x)[:1] * samples}
    for name, values in zip(_SUMS, (x, x * x), strict=True):
        total, rest = _add(tensors[f"local_{name}"], tensors[f"local_{name}_rest"], _sum_over_examples(values))
        state |= {f"local_{name}": total, f"local_{name}_rest": rest}
    return state


def _finish(tensors: Tensors) -> Tensors:
    return {
        "count": tensors["local_count"] + 0,
        **{name: tensors[f"local_{name}"] - tensors[f"local_{name}_rest"] for name in _SUMS},
    }


def _sum_over_examples(values: Tensor) -> Tensor:
    """Add up all axes but the last, one at a time: short sums of short sums lose less than one long sum."""
    for axis in reversed(range(values.shape.rank - 1)):
        values = tf.reduce_sum(values, axis=axis)
    return values


def _add(total: Tensor, rest: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
    """Return total + amount and what rounding added too much, to be taken off the next amount."""
    corrected = amount - rest
    grown = total + corrected
    return grown, (grown - total) - corrected


def _reference(batches: Sequence[Arrays], *, samples: int) -> dict[str, Array]:
    x = np.concatenate([batch["x"] for batch in batches]).astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    sums = {"sum": x.sum(axes), "sum_of_squares": (x * x).sum(axes)}
    return {
        "count": np.array([len(x) * samples], np.int32),
        **{name: value.astype(np.float32) for name, value in sums.items()},
    }
