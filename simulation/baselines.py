"""What a fleet is compared with: a device alone, and all data in one place, by the same program and runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np

from edge_agent.work import prepare
from sottovoce.bundle import Bundle
from sottovoce.plan import LocalWork
from sottovoce.runtime import Program
from sottovoce.types import Array

Arrays = Mapping[str, Array]
_EVALUATION_BATCH = 512


def train_alone(
    program: Program,
    bundle: Bundle,
    work: LocalWork,
    *,
    broadcast: Arrays,
    examples: Arrays,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Array]:
    """Return the broadcast after one long run over `examples`, without anybody else.

    Args:
        program: The opened program.
        bundle: The program's ports.
        work: All epochs in one run; `max_examples` is not looked at.
        broadcast: Where to start from.
        examples: One array for each column.
        on_batch: Called after every batch, for progress.
    """
    run = prepare(
        program,
        bundle,
        LocalWork(epochs=work.epochs, batch_size=work.batch_size),
        broadcast=broadcast,
        examples=examples,
    )
    state = run.start(os.urandom)
    while not run.is_done(state):
        state = run.advance(state)
        on_batch()
    return add_results(bundle, broadcast, run.result(state).values)


def add_results(bundle: Bundle, broadcast: Arrays, values: Mapping[str, list[Array]]) -> dict[str, Array]:
    """Return `broadcast` with every result added to the ports that it updates."""
    updated = dict(broadcast)
    for result in bundle.results:
        for name, delta in zip(result.updates, values[result.name], strict=bool(result.updates)):
            updated[name] = (updated[name] + delta).astype(updated[name].dtype)
    return updated


def standardised(bundle: Bundle, broadcast: Arrays, examples: Arrays) -> dict[str, Array]:
    """Return `broadcast` with `mean` and `variance` of `examples` in plain, where the program has such ports."""
    filled = dict(broadcast)
    if {"mean", "variance"} <= {port.name for port in bundle.broadcast}:
        flat = examples["x"].reshape(-1, examples["x"].shape[-1]).astype(np.float64)
        filled |= {"mean": flat.mean(axis=0).astype(np.float32), "variance": flat.var(axis=0).astype(np.float32)}
    return filled


def accuracy(program: Program, broadcast: Arrays, test: Arrays) -> float:
    """Return the share of `test` that the model `broadcast` gets right, evaluated by TFLite in batches."""
    count = len(test["y"])
    correct = examples = 0.0
    for start in range(0, count, _EVALUATION_BATCH):
        batch = {name: column[start : start + _EVALUATION_BATCH] for name, column in test.items()}
        sums = program.evaluate(broadcast, batch)
        correct += float(sums["correct"][0])
        examples += float(sums["examples"][0])
    return correct / examples
