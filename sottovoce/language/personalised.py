"""Personalised evaluation: what each device would gain by fine-tuning the model, said only as sums over all of them.

The client program is `models.personalised`: within every batch it scores the broadcast model on one row in four, makes
a few gradient steps on the other three, and scores the result on the same rows again. Nothing is kept or sent but the
five sums (Wang et al. 2019, arXiv 1910.10252). With `work.batch_size` as large as a device's data there is one trial a
device; smaller batches make several, each on less data.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.computations import Computation, server_computation
from sottovoce.language.definition import Value
from sottovoce.language.learning import (
    FLOAT32,
    INT32,
    ModelFile,
    broadcast_of,
    defined,
    model_type,
    part_of,
    program_of,
)
from sottovoce.language.operators import federated_broadcast, federated_map, federated_sum
from sottovoce.language.ports import Bound
from sottovoce.plan import LocalWork
from sottovoce.types import Array, StructType, TensorType, at_clients, at_server
from sottovoce.values import Record

_COUNTS = ("examples", "before_correct", "after_correct")
_LOSSES = ("before_loss", "after_loss")
_SUMS = (*_COUNTS, *_LOSSES)
_MEANS = _SUMS[1:]


def build_personalised_evaluation(
    model: ModelFile,
    *,
    learning_rate: float,
    work: LocalWork = LocalWork(batch_size=256, max_examples=256),  # noqa: B008 - immutable
    example_cap: int | None = None,
    loss_bound: float | None = None,
    purpose: str | None = None,
) -> Computation:
    """Return (<model=...@SERVER,examples={...*}@CLIENTS> -> <examples,before_correct,...>@SERVER).

    `examples` counts the rows that were scored (int32); the four others are means over them (float32): the share that
    is `before_correct` and `after_correct`, and the mean `before_loss` and `after_loss`. The model's type is that of
    `learning.model_type`, so the `model` of a training state can be given as it is.

    Args:
        model: A bundle of `models.personalised`, its bytes, or the path of a `.svp`.
        learning_rate: Of the fine-tuning, above 0.
        work: One epoch; the size of a batch is the size of a trial.
        example_cap: Most rows of one device that count; needed on a fleet.
        loss_bound: Largest summed loss of one device; needed on a fleet.
        purpose: What this is for, in words that a device's owner understands; the default is the bundle's description.

    Raises:
        ConfigError: It is no such bundle, the rate is not above 0, or `work` has more than one epoch.
        BadBundle: It is no bundle.
    """
    program = program_of(model, work)
    if {result.name for result in program.bundle.results} != set(_SUMS):
        raise ConfigError(
            f"bundle {program.bundle.name!r} does not compare before and after fine-tuning; make one of the "
            "model with models.personalised.export_personalised"
        )
    if not 0 < learning_rate < float("inf"):
        raise ConfigError(f"learning_rate is {learning_rate}; write a number above 0")
    if work.epochs != 1:
        raise ConfigError(f"an evaluation is one pass over the examples, not {work.epochs}; set epochs = 1")
    kind = model_type(program.bundle)
    counted = None if example_cap is None else Bound(0, example_cap)
    lost = None if loss_bound is None else Bound(0, loss_bound)

    @server_computation(kind, result=part_of(program, "broadcast"))
    def prepare(model: Any) -> Record[Array]:
        return broadcast_of(program.bundle, model, rate=learning_rate)

    def evaluate(model: Value, examples: Value) -> object:
        found = federated_map(program, (federated_broadcast(federated_map(prepare, model)), examples))
        counts = {name: federated_sum(found[name][name], bound=counted) for name in _COUNTS}
        losses = {name: federated_sum(found[name][name], bound=lost) for name in _LOSSES}
        return federated_map(_divide, {**counts, **losses})

    return defined(
        evaluate,
        at_server(kind),
        at_clients(part_of(program, "examples")),
        name=program.bundle.name,
        purpose=purpose or program.bundle.description,
    )


@server_computation(
    StructType(
        (
            *((name, TensorType("int32", (1,))) for name in _COUNTS),
            *((name, TensorType("float32", (1,))) for name in _LOSSES),
        )
    ),
    result=StructType((("examples", INT32), *((name, FLOAT32) for name in _MEANS))),
)
def _divide(sums: Any) -> Record[Any]:
    examples = sums.examples[0]
    means = {name: np.float32(sums[name][0] / max(examples, 1)) for name in _MEANS}
    return Record({"examples": examples, **means})
