"""Client programs that count: words, pairs of words, values in bins, amounts by index, moments by group.

Nothing in them depends on what is counted, only on how many entries there are; so they are exported once, in a few
sizes, committed (`sottovoce/counting/*.svp`), and counting needs no TensorFlow. What is counted comes with the plan (a
vocabulary) or with the broadcast (edges of bins, a window). A row whose index is outside of the entries, such as -1,
adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from models.ops import Tensor
from models.program_export import Arrays, ProgramSource, Tensors, run_with_tensorflow, seed_of
from sottovoce.bundle import Port, Result, RoleName
from sottovoce.language.counting import AMOUNT_SIZES, BINS, GROUPS, SIZES, START, program_name
from sottovoce.sketches import FIELD
from sottovoce.types import Array

_TEST_ROWS = (4, 1, 3)
_MOMENTS = ("count", "sum", "squares")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counting:
    """One program: what it reads, and which entries of its accumulator a batch adds to.

    Attributes:
        name: Of the bundle.
        description: One sentence in plain words.
        size: Entries of each accumulator.
        batch: Columns, each with the dtype of one example.
        broadcast: Ports and the values they have at first and in the self-test, beside `start`.
        added: (batch and broadcast) -> index [b], and what is added there for each accumulator [b].
        results: Name -> dtype; each is one accumulator.
        finished: What leaves, of an accumulator.
    """

    name: str
    description: str
    size: int
    batch: Mapping[str, str]
    broadcast: Mapping[str, Array]
    added: Callable[[Tensors], tuple[Tensor, tuple[Tensor, ...]]]
    results: Mapping[str, str]
    finished: Callable[[Tensor], Tensor] = tf.identity


def counting_programs() -> Iterator[ProgramSource]:
    """Yield every program that is committed."""
    for size in SIZES:
        yield _source(_words(size))
        yield _source(_pairs(size))
    for size in AMOUNT_SIZES:
        yield _source(_amounts(size))
    yield _source(_bins())
    yield _source(_groups())


def _words(size: int) -> _Counting:
    return _Counting(
        name=program_name("words", size),
        description=f"Counts how often each of {size} listed words occurs.",
        size=size,
        batch={"word": "int32"},
        broadcast={},
        added=lambda tensors: (tensors["word"], (tf.ones_like(tensors["word"]),)),
        results={"counts": "int32"},
    )


def _pairs(size: int) -> _Counting:
    def added(tensors: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
        first, second, width = tensors["first"], tensors["second"], tensors["seconds"]
        listed = (first >= 0) & (second >= 0) & (second < width)
        return tf.where(listed, first * width + second, -tf.ones_like(first)), (tf.ones_like(first),)

    return _Counting(
        name=program_name("pairs", size),
        description=f"Counts how often each of {size} pairs of listed words follow one another.",
        size=size,
        batch={"first": "int32", "second": "int32"},
        broadcast={"seconds": np.array([3], np.int32)},
        added=added,
        results={"counts": "int32"},
    )


def _amounts(size: int) -> _Counting:
    return _Counting(
        name=program_name("amounts", size),
        description=f"Adds amounts to {size} cells, modulo the prime {FIELD}.",
        size=size,
        batch={"index": "int32", "amount": "int32"},
        broadcast={},
        added=lambda tensors: (tensors["index"], (tensors["amount"],)),
        results={"cells": "int32"},
        finished=lambda cells: tf.math.floormod(cells, FIELD),
    )


def _bins() -> _Counting:
    def added(tensors: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
        reached = tf.cast(tensors["value"][:, tf.newaxis] >= tensors["edges"][tf.newaxis, :], tf.int32)
        index = tf.reduce_sum(reached, axis=1) - 1
        return index, (tf.ones_like(index),)

    return _Counting(
        name=program_name("bins", BINS),
        description=f"Counts how many values lie in each of {BINS} bins.",
        size=BINS,
        batch={"value": "float32"},
        broadcast={"edges": np.linspace(-0.5, 1.5, BINS + 1).astype(np.float32)},
        added=added,
        results={"counts": "int32"},
    )


def _groups() -> _Counting:
    def added(tensors: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
        low, high = tensors["window"][0], tensors["window"][1]
        fraction = (tf.minimum(tf.maximum(tensors["value"], low), high) - low) / (high - low)
        return tensors["group"], (tf.ones_like(tensors["group"]), fraction, fraction * fraction)

    return _Counting(
        name=program_name("groups", GROUPS),
        description=f"Counts the values of each of {GROUPS} groups, and adds up them and their squares.",
        size=GROUPS,
        batch={"group": "int32", "value": "float32"},
        broadcast={"window": np.array([-1.0, 2.0], np.float32)},
        added=added,
        results=dict(zip(_MOMENTS, ("int32", "float32", "float32"), strict=True)),
    )


def _source(program: _Counting) -> ProgramSource:
    functions: dict[RoleName, Callable[[Tensors], Tensors]] = {
        "begin": lambda tensors: _begin(program, tensors),
        "step": lambda tensors: _step(program, tensors),
        "finish": lambda tensors: {name: program.finished(tensors[f"local_{name}"]) for name in program.results},
    }
    local = tuple(Port(name=f"local_{name}", type=f"{kind}[{program.size}]") for name, kind in program.results.items())
    given = tuple(Port(name=name, type=f"{value.dtype}[{len(value)}]") for name, value in program.broadcast.items())
    kept = tuple(Port(name=f"kept_{port.name}", type=port.type) for port in given)
    start = Port(name=START, type="int32[1]")
    return ProgramSource(
        name=program.name,
        description=program.description,
        functions=functions,
        broadcast=(start, *given),
        state=local + kept,
        batch=tuple(Port(name=name, type=f"{dtype}[?]") for name, dtype in program.batch.items()),
        results=tuple(
            Result(name=name, ports=(Port(name=name, type=f"{dtype}[{program.size}]"),))
            for name, dtype in program.results.items()
        ),
        initial={START: np.zeros(1, np.int32), **program.broadcast},
        test_broadcast={START: np.array([2], np.int32)},
        test_batches=_test_batches(program),
        reference=lambda arrays, batches: run_with_tensorflow(functions, arrays, batches),
        tolerance=1e-5,
    )


def _begin(program: _Counting, tensors: Tensors) -> Tensors:
    """Fill the accumulators with `start`: zeros of its own would make a program as large as what it counts."""
    first = {
        f"local_{name}": tf.fill([program.size], tf.cast(tensors[START][0], dtype))
        for name, dtype in program.results.items()
    }
    return first | {f"kept_{name}": tf.identity(tensors[name]) for name in program.broadcast}


def _step(program: _Counting, tensors: Tensors) -> Tensors:
    """Add a batch: what lies outside of the entries goes to one entry more, which is cut off."""
    kept = {name: tensors[f"kept_{name}"] for name in program.broadcast}
    index, amounts = program.added({**tensors, **kept})
    inside = (index >= 0) & (index < program.size)
    where = tf.where(inside, index, program.size * tf.ones_like(index))[:, tf.newaxis]
    after = {
        f"local_{name}": tensors[f"local_{name}"] + tf.scatter_nd(where, amount, [program.size + 1])[: program.size]
        for name, amount in zip(program.results, amounts, strict=True)
    }
    return after | {f"kept_{name}": tf.identity(value) for name, value in kept.items()}


def _test_batches(program: _Counting) -> Sequence[Arrays]:
    """Return batches that hit entries twice, at both ends and outside."""
    random = np.random.default_rng(seed_of(program.name))
    return [{name: _column(random, name, dtype, rows) for name, dtype in program.batch.items()} for rows in _TEST_ROWS]


def _column(random: np.random.Generator, name: str, dtype: str, rows: int) -> Array:
    if dtype == "float32":
        return random.uniform(-1.0, 2.0, rows).astype(np.float32)
    if name == "amount":
        return random.integers(0, FIELD, rows).astype(np.int32)
    return random.integers(-1, 4, rows).astype(np.int32)
