"""What an operator asks for: a task file (TOML) as a frozen document. `docs/coordinator.md` describes every key."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from coordinator.settings import Name, Positive, read_toml
from coordinator.terms import CohortTerms, RoundTerms, SecAggTerms, Timing, check_terms
from sottovoce.blobs import Document
from sottovoce.errors import ConfigError
from sottovoce.language.server_optimizer import by_name
from sottovoce.plan import Counted, Encoding, Quantised


class WorkTerms(Document, frozen=True):
    """How a device walks over its examples; see `sottovoce.plan.LocalWork`."""

    epochs: Positive = 1
    batch_size: Positive = 32
    max_examples: Annotated[int, msgspec.Meta(ge=0)] = 0


class OptimizerTerms(Document, frozen=True):
    """The devices' learning rate, and what the server makes of their mean update.

    Attributes:
        learning_rate: The devices', broadcast to the program's port `learning_rate`; None leaves the bundle's own.
        learning_rate_decay: Each round's is the one before times this.
        server: A name of `sottovoce.language.server_optimizer`; sgd with rate 1 is federated averaging.
        server_learning_rate, server_momentum, server_beta_1, server_beta_2, server_tau: Its rates, None for its own
            default; each server optimizer has some of them.
    """

    learning_rate: Annotated[float, msgspec.Meta(gt=0)] | None = None
    learning_rate_decay: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    server: str = "sgd"
    server_learning_rate: float | None = None
    server_momentum: float | None = None
    server_beta_1: float | None = None
    server_beta_2: float | None = None
    server_tau: float | None = None

    @property
    def server_options(self) -> dict[str, float]:
        """The rates that were given, by the names that `sottovoce.language.server_optimizer` has for them."""
        names = ("learning_rate", "momentum", "beta_1", "beta_2", "tau")
        given = {name: getattr(self, f"server_{name}") for name in names}
        return {name: value for name, value in given.items() if value is not None}


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


class Standardise(Document, frozen=True):
    """A first masked round of a moments program, from which `mean` and `variance` of the inputs follow.

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

    @property
    def terms(self) -> RoundTerms:
        """The terms of every one of its rounds."""
        return RoundTerms(cohort=self.cohort, time=self.time, secagg=self.secagg)


def read_task(text: str, *, where: str = "the task") -> Task:
    """Return the task in the TOML `text`; what depends on the bundle is checked by `hosted.hosted_program`.

    Raises:
        ConfigError: Something in it is wrong; the text names the key and says what to write.
    """
    task = read_toml(text, Task, where=where)
    check_terms(task.terms, where=where)
    try:
        by_name(task.optimizer.server, task.optimizer.server_options)
    except ConfigError as error:
        raise ConfigError(f"{where}: optimizer.server: {error}; its keys begin with server_, as server_tau") from error
    rules = (
        (
            task.update is None or task.update.noise_multiplier == 0,
            "update.noise_multiplier: this release cannot add noise yet; remove the line",
        ),
        (bool(task.purpose.strip()), "purpose: say in plain words what this is for; device owners read it"),
    )
    for holds, text_if_not in rules:
        if not holds:
            raise ConfigError(f"{where}: {text_if_not}")
    return task
