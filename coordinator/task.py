"""What an operator asks for: a task file (TOML) as a frozen document. `docs/coordinator.md` describes every key."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from coordinator.graph_parameters import graph_parameters
from coordinator.settings import Name, Positive, Seconds, Share, read_toml
from sottovoce.errors import ConfigError
from sottovoce.plan import Counted, Document, Encoding, Quantised
from sottovoce.secagg.graph import BASIS_POINTS, COMPLETE_GRAPH_LIMIT, LARGEST_COHORT, SMALLEST_COHORT, threshold

UNCAPPED_WEIGHT = 1_000_000
"""Weight cap of plans in which nothing is weighted: the number of examples is only counted."""


class CohortTerms(Document, frozen=True):
    """How many devices take part.

    Attributes:
        goal: Devices wanted in a round.
        minimum: Fewest devices whose sum may be unmasked; also the plan's promise to every device.
        over_selection: So many times the goal are asked to train, because some will drop out.
    """

    goal: Positive
    minimum: Annotated[int, msgspec.Meta(ge=SMALLEST_COHORT)]
    over_selection: Annotated[float, msgspec.Meta(ge=1, le=4)] = 1.0

    @property
    def wanted(self) -> int:
        """Devices to select: the goal with over-selection."""
        return math.ceil(self.goal * self.over_selection - 1e-9)


class Timing(Document, frozen=True):
    """How long things may take, in seconds.

    Attributes:
        selection_s: For check-ins.
        training_s: For training, from the announcement's selection to the rendezvous.
        stage_s: For each of the five stages of the rendezvous.
        retry_delay_s: Before an abandoned round is tried again.
    """

    selection_s: Seconds = 60.0
    training_s: Seconds = 3600.0
    stage_s: Seconds = 60.0
    retry_delay_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0


class WorkTerms(Document, frozen=True):
    """How a device walks over its examples; see `sottovoce.plan.LocalWork`."""

    epochs: Positive = 1
    batch_size: Positive = 32
    max_examples: Annotated[int, msgspec.Meta(ge=0)] = 0


class OptimizerTerms(Document, frozen=True):
    """Learning rates: the devices' (broadcast to the program's port `learning_rate`) and the server's (1.0: FedAvg)."""

    learning_rate: Annotated[float, msgspec.Meta(gt=0)] | None = None
    server_learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 1.0


class UpdateTerms(Document, frozen=True):
    """How a model update is bounded and encoded.

    Attributes:
        clip_norm: L2 bound of one device's update.
        half_range: Each coordinate, once clipped and weighted, is clamped to +- this.
        weight_cap: Most examples of one device that count.
        bits: Width of one coordinate before summation.
        lane: How wide it is on the wire; see `sottovoce.secagg.lanes`.
        noise_multiplier: Reserved; anything but 0 is refused until noise exists.
    """

    clip_norm: Annotated[float, msgspec.Meta(gt=0)]
    half_range: Annotated[float, msgspec.Meta(gt=0)]
    weight_cap: Positive
    bits: Annotated[int, msgspec.Meta(ge=2, le=24)] = 16
    lane: Literal["uint32", "uint16", "3x21", "dense"] = "uint32"
    noise_multiplier: float = 0.0


class SumTerms(Document, frozen=True):
    """How a plain sum or a metric is encoded: `maximum` for whole numbers, else `half_range` (and `bits`).

    Attributes:
        maximum: Largest whole number one device may contribute.
        half_range: Largest absolute value one device may contribute.
        bits: Width of one real value before summation.
        clip_norm: L2 bound over all of the result's values together.
    """

    maximum: Annotated[int, msgspec.Meta(ge=1, lt=2**48)] | None = None
    half_range: Annotated[float, msgspec.Meta(gt=0)] | None = None
    bits: Annotated[int, msgspec.Meta(ge=2, le=48)] | None = None
    clip_norm: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def encoding(self, where: str) -> Encoding:
        """Return the encoding that these terms name.

        Raises:
            ConfigError: Both or neither of `maximum` and `half_range`, or `bits` beside `maximum`.
        """
        if self.maximum is not None and self.half_range is None and self.bits is None:
            return Counted(maximum=self.maximum)
        if self.half_range is not None and self.maximum is None:
            return Quantised(half_range=self.half_range, bits=self.bits or 32)
        raise ConfigError(f"{where}: write either maximum (whole numbers) or half_range and bits (real values)")


class SecAggTerms(Document, frozen=True):
    """What is assumed of the fleet: the mode, and the shares of corrupt devices and of dropouts."""

    mode: Literal["active", "curious"] = "active"
    corrupt_share: Share = 0.05
    dropout_share: Share = 0.05


class Standardise(Document, frozen=True):
    """A first masked round of a moments program, from which `mean` and `std` of the inputs follow.

    Attributes:
        bundle: The moments bundle; its results are `count`, `sum` and `sum_of_squares`.
        results: How each of them is encoded.
    """

    bundle: str
    results: dict[str, SumTerms]


class Task(Document, frozen=True):
    """A task: train one model for some rounds, or sum something once. See `docs/coordinator.md`."""

    name: Name
    bundle: str
    collection: Name
    purpose: Annotated[str, msgspec.Meta(min_length=1)]
    cohort: CohortTerms
    rounds: Positive = 1
    time: Timing = Timing()
    work: WorkTerms = WorkTerms()
    optimizer: OptimizerTerms = OptimizerTerms()
    update: UpdateTerms | None = None
    metrics: dict[str, SumTerms] = msgspec.field(default_factory=dict)
    results: dict[str, SumTerms] = msgspec.field(default_factory=dict)
    secagg: SecAggTerms = SecAggTerms()
    standardise: Standardise | None = None


def read_task(text: str, *, where: str = "the task") -> Task:
    """Return the task in the TOML `text`; what depends on the bundle is checked by `program.build_program`.

    Raises:
        ConfigError: Something in it is wrong; the text names the key and says what to write.
    """
    task = read_toml(text, Task, where=where)
    rules = (
        (
            task.cohort.minimum <= task.cohort.goal,
            f"cohort.minimum: {task.cohort.minimum} is more than cohort.goal, {task.cohort.goal}; lower it",
        ),
        (
            task.cohort.wanted <= LARGEST_COHORT,
            f"cohort.goal: {task.cohort.wanted} devices with over-selection; at most {LARGEST_COHORT} in one round",
        ),
        (
            _answers_needed(task) <= task.cohort.wanted,
            f"cohort.goal: {task.cohort.wanted} devices are too few in {task.secagg.mode} mode, which needs "
            f'{_answers_needed(task)} of them; raise it (or, for a try without liars: secagg.mode = "curious")',
        ),
        (
            task.update is None or task.update.noise_multiplier == 0,
            "update.noise_multiplier: this release cannot add noise yet; remove the line",
        ),
        (bool(task.purpose.strip()), "purpose: say in plain words what this is for; device owners read it"),
    )
    for holds, text_if_not in rules:
        if not holds:
            raise ConfigError(f"{where}: {text_if_not}")
    if task.cohort.wanted > COMPLETE_GRAPH_LIMIT:
        graph_parameters(
            clients=task.cohort.wanted,
            corrupt_share=task.secagg.corrupt_share,
            dropout_share=task.secagg.dropout_share,
            mode=task.secagg.mode,
        )
    return task


def _answers_needed(task: Task) -> int:
    """Return how many of a full cohort must answer; in active mode a device needs the signatures of t others."""
    shares = threshold(task.secagg.mode, task.cohort.wanted, round(BASIS_POINTS * task.secagg.corrupt_share))
    return shares + (task.secagg.mode == "active")
