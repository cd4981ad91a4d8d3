"""What a device is asked to do, as data: local work, aggregations, privacy terms, the plan.

A plan is the same document in every round; what changes (weights, learning rate, round number) is broadcast as the
state blob. Its digest is its name; the signed announcement carries that digest, so the announcement's signature
covers the plan. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import msgspec

from sottovoce.blobs import BlobRef, Document, canonical, digest_of
from sottovoce.errors import ConfigError, SottovoceError
from sottovoce.sketches import EXTRACTORS as SKETCHES
from sottovoce.sketches import WordSketch, check_sketch
from sottovoce.text import PORTS, is_word
from sottovoce.types import TensorType

MAX_EVERY_DAYS = 36_500.0
MAX_VOCABULARY = 50_000
"""Words in one vocabulary; a device checks every one of them, which takes a Pi a second."""

LaneName: TypeAlias = Literal["uint32", "uint16", "3x21", "dense", "uint64"]
"""How wide an entry of the masked vector is, and so how many bits there are for the sum of all devices.

32, 16 or 64 bits; 21 bits, three entries in a word of 64; or, for slow links, as many bits as the sum needs, up to 32.
`sottovoce.secagg.lanes` says how exact each is.
"""
OrderName: TypeAlias = Literal["shuffled", "stored"]
"""How a program walks over the examples: in a random order, or as they are stored."""


class Quantised(Document, tag="quantised", frozen=True):
    """Real values, clamped to [-half_range, half_range] and rounded stochastically to `bits` bits.

    Attributes:
        half_range: r, in the value's own units, > 0; the quantum is 2r / (2^bits - 1).
        bits: Width of one coordinate before summation, 1 to 48.
    """

    half_range: float
    bits: int

    @property
    def maximum(self) -> int:
        """Largest integer one device may put into a lane."""
        return int(2**self.bits - 1)


class Counted(Document, tag="counted", frozen=True):
    """Whole numbers from 0 to `maximum`, summed exactly; a device clamps and counts what lies outside."""

    maximum: int


Encoding: TypeAlias = Quantised | Counted


class Aggregation(Document, frozen=True):
    """One named value that every device contributes and whose sum the coordinator learns.

    Attributes:
        name: The client program's result (or metric) of that name.
        tensors: The types of its tensors, in order, fully known shapes.
        weighted: The device multiplies by min(weight, cap) / cap, and the coordinator divides by the summed weight.
        clip_norm: L2 bound over all its tensors together, applied first; None leaves them as they are.
        encoding: How values become lane integers.
        lane: Width of one entry; see `LaneName`.
        entries: L0 bound: of one device at most so many entries over all tensors are not zero; 0 is no limit. Every
            device keeps its largest ones itself, whatever the program gave (`edge_agent.contributions`).
        presence_of: Name of a counted aggregation: this one, which no program computes, is 1 where the bounded entry
            of that one is not zero on the same device, so that its sum counts devices. Empty: an ordinary one.
        follows: Name of an aggregation: this one keeps exactly the entries that that one keeps on the same device, and
            is thresholded with it; such as a sum in every group beside the count in every group. Empty: none.
    """

    name: str
    tensors: tuple[str, ...]
    encoding: Encoding
    weighted: bool = False
    clip_norm: float | None = None
    lane: LaneName = "uint32"
    entries: int = 0
    presence_of: str = ""
    follows: str = ""

    @property
    def size(self) -> int:
        """Number of lane entries over all tensors."""
        return sum(TensorType.parse(t).size for t in self.tensors)


class ParticipationTerms(Document, frozen=True):
    """How often one device answers plans of one name in one fleet; its own ledger enforces it.

    Attributes:
        once: Never a second time.
        every_days: Again only after so many days; 0 allows every round.
    """

    once: bool = False
    every_days: float = 0.0


class PrivacyTerms(Document, frozen=True):
    """What the plan promises about privacy, checked by every device's policy before anything runs.

    Attributes:
        purpose: What this is for, in words a device's owner understands.
        minimum_cohort: Fewest survivors whose sum may be unmasked.
        weight_cap: Largest weight (number of examples) of one device.
        noise_multiplier: Reserved for differential privacy; anything but 0 is refused until noise exists.
        expires_unix_s: The plan is refused after this time; 0 means never.
        threshold: Entries that fewer devices have contributed to, by their presence aggregation, are set to 0 by the
            coordinator before anything is written down, logged or published; 0 publishes all. An aggregation of counts
            up to 1 counts devices itself. It is hygiene of what is published and no protection from the coordinator,
            which has seen the sum before.
        participation: How often one device answers.
    """

    purpose: str
    minimum_cohort: int
    weight_cap: int
    noise_multiplier: float = 0.0
    expires_unix_s: int = 0
    threshold: int = 0
    participation: ParticipationTerms = ParticipationTerms()


class Extraction(Document, frozen=True):
    """How the messages of a collection become the rows that the client program reads; a plan ships no code for it.

    A message may give many rows or none. By the extractors of `sottovoce.text` a row is the index of a word in its
    vocabulary, int32, in every port of the extractor; what is not in the vocabularies is left out. By those of
    `sottovoce.sketches` it is an entry of a sketch of all messages together. A device whose messages give no row takes
    part with zeros: that it has nothing to say must not show.

    Attributes:
        extractor: Its name; a device that does not have it refuses the plan.
        column: The column of text.
        vocabularies: One for each port, each strictly ascending by code points, so that the same words always make the
            same plan; none for a sketch.
        sketch: What a sketch is like; None for vocabularies.
    """

    extractor: str
    column: str
    vocabularies: tuple[tuple[str, ...], ...] = ()
    sketch: WordSketch | None = None


class LocalWork(Document, frozen=True):
    """How the client program walks over the local examples.

    Attributes:
        epochs: Passes over the examples, >= 1.
        batch_size: Examples in a batch; the last batch of a pass may be smaller.
        max_examples: At most this many examples (messages, where a plan extracts) are used in a round; 0 means all.
        order: `shuffled`: examples chosen at random, in another order in every epoch. `stored`: the newest examples,
            oldest first, in every epoch alike; the newest one alone is `max_examples=1`.
    """

    epochs: int = 1
    batch_size: int = 32
    max_examples: int = 0
    order: OrderName = "shuffled"


class Plan(Document, frozen=True):
    """What a device is asked to do: the same document in every round; its digest is its name.

    Attributes:
        fleet: The fleet it is meant for.
        name: For people and for the round counter: round numbers grow per fleet and plan name.
        collection: The collection of local examples that the program reads.
        program: The bundle with the client program.
        work: Epochs and batches.
        aggregations: What is summed; the weight and the clip counter are always summed beside them.
        privacy: The terms.
        extraction: How messages become rows; None for a collection of numbers.
        publish: The thresholded sums go back to every device, as the outcome's state blob: named tensors, one for each
            aggregation (`NAME.0`, `NAME.1` where it has several).
    """

    fleet: str
    name: str
    collection: str
    program: BlobRef
    work: LocalWork
    aggregations: tuple[Aggregation, ...]
    privacy: PrivacyTerms
    extraction: Extraction | None = None
    publish: bool = False

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical encoding: the plan's name."""
        return digest_of(canonical(self))


def check_plan(plan: Plan) -> None:
    """Raise ConfigError, saying what to change, unless every number in `plan` is possible."""
    rules: Sequence[tuple[bool, Callable[[], str]]] = (
        (
            plan.privacy.noise_multiplier == 0.0,
            lambda: "this plan asks for noise, which this release cannot add yet: remove noise_multiplier",
        ),
        (
            plan.privacy.minimum_cohort >= 3,
            lambda: f"minimum_cohort is {plan.privacy.minimum_cohort}; a sum needs at least 3 devices to hide in",
        ),
        (plan.privacy.weight_cap >= 1, lambda: "weight_cap must be at least 1"),
        (plan.work.epochs >= 1 and plan.work.batch_size >= 1, lambda: "epochs and batch_size must be at least 1"),
        (plan.work.max_examples >= 0, lambda: "max_examples must be 0 (all) or more"),
        (bool(plan.aggregations), lambda: "a plan needs at least one aggregation"),
        (
            len({a.name for a in plan.aggregations}) == len(plan.aggregations),
            lambda: "two aggregations have the same name",
        ),
        (
            all(text.isprintable() for text in (plan.name, plan.collection, *(a.name for a in plan.aggregations)))
            and plan.privacy.purpose.replace("\n", " ").isprintable(),
            lambda: "names and purpose are shown to people: they must be printable text",
        ),
        (bool(plan.privacy.purpose.strip()), lambda: "say in `purpose`, in plain words, what this is for"),
    )
    for holds, text in rules:
        if not holds:
            raise ConfigError(f"plan {plan.name!r}: {text()}")
    for aggregation in plan.aggregations:
        _check_aggregation(plan, aggregation)
        _check_links(plan, aggregation)
    _check_publication(plan)
    if plan.extraction is not None:
        _check_extraction(plan, plan.extraction)


def _check_aggregation(plan: Plan, aggregation: Aggregation) -> None:
    where = f"plan {plan.name!r}, aggregation {aggregation.name!r}"
    if not aggregation.tensors or aggregation.size == 0:
        raise ConfigError(f"{where}: it sums nothing")
    if aggregation.clip_norm is not None and not aggregation.clip_norm > 0:
        raise ConfigError(f"{where}: clip_norm must be above 0")
    match aggregation.encoding:
        case Quantised(half_range=half_range, bits=bits):
            if not (0 < half_range < float("inf") and 1 <= bits <= 48):
                raise ConfigError(f"{where}: half_range must be above 0 and bits 1 to 48")
        case Counted(maximum=maximum):
            if not 1 <= maximum < 2**48:
                raise ConfigError(f"{where}: maximum must be 1 to 2^48 - 1")


def _check_links(plan: Plan, aggregation: Aggregation) -> None:
    """Check the bound on entries, and what an aggregation says about another one."""
    where = f"plan {plan.name!r}, aggregation {aggregation.name!r}"
    if not 0 <= aggregation.entries <= aggregation.size:
        raise ConfigError(f"{where}: entries must be 0 (no limit) to {aggregation.size}, the number of its entries")
    named = aggregation.presence_of or aggregation.follows
    if not named:
        return
    key = "presence_of" if aggregation.presence_of else "follows"
    other = next((a for a in plan.aggregations if a.name == named), None)
    if other is None or other.presence_of or other.follows or (aggregation.presence_of and aggregation.follows):
        raise ConfigError(f"{where}: {key} must name one aggregation of the program's own, not {named!r}")
    if _shapes(other) != _shapes(aggregation) or aggregation.entries:
        raise ConfigError(f"{where}: it has the shapes and the entries of {named!r}: use its shapes, and no entries")
    if aggregation.presence_of and not (
        isinstance(other.encoding, Counted) and aggregation.encoding == Counted(maximum=1)
    ):
        raise ConfigError(f"{where}: it counts devices: encoding must be Counted(maximum=1), and {named!r} counted too")


def counts_devices(aggregation: Aggregation) -> bool:
    """Say whether the sum of every entry is a number of devices: each adds 0 or 1."""
    return aggregation.encoding == Counted(maximum=1)


def _check_publication(plan: Plan) -> None:
    """Check the threshold and how often a device answers."""
    counted = [a.presence_of for a in plan.aggregations if a.presence_of]
    counts = any(counts_devices(aggregation) for aggregation in plan.aggregations)
    threshold, often = plan.privacy.threshold, plan.privacy.participation
    if len(set(counted)) < len(counted):
        raise ConfigError(f"plan {plan.name!r}: two aggregations have the same presence_of")
    if threshold < 0 or (threshold and not counts):
        raise ConfigError(
            f"plan {plan.name!r}: a threshold of {threshold} needs to know how many devices there are in every entry; "
            "add an aggregation with presence_of, count up to 1, or set threshold = 0"
        )
    if not 0 <= often.every_days <= MAX_EVERY_DAYS or (often.once and often.every_days):
        raise ConfigError(
            f"plan {plan.name!r}: participation is once, or every_days from 0 to {MAX_EVERY_DAYS:g}, not both"
        )


def _check_extraction(plan: Plan, extraction: Extraction) -> None:
    where = f"plan {plan.name!r}, extraction"
    if not all(name.isprintable() and 0 < len(name) <= 64 for name in (extraction.extractor, extraction.column)):
        raise ConfigError(f"{where}: extractor and column must be printable names of up to 64 characters")
    if plan.work.max_examples and plan.work.order != "stored":
        raise ConfigError(f'{where}: max_examples takes the newest messages: set order = "stored", or max_examples = 0')
    if extraction.extractor in SKETCHES:
        if extraction.sketch is None or extraction.vocabularies:
            raise ConfigError(f"{where}: {extraction.extractor} needs a sketch, and no vocabularies")
        check_sketch(extraction.extractor, extraction.sketch)
    ports = PORTS.get(extraction.extractor)
    if ports is None:
        return  # A newer coordinator may know it; the device's policy refuses it by name.
    if len(extraction.vocabularies) != len(ports) or extraction.sketch is not None:
        raise ConfigError(
            f"{where}: {extraction.extractor} needs {len(ports)} vocabularies, for {', '.join(ports)}, and no sketch"
        )
    for vocabulary in extraction.vocabularies:
        _check_vocabulary(where, vocabulary)


def _check_vocabulary(where: str, vocabulary: tuple[str, ...]) -> None:
    if not 1 <= len(vocabulary) <= MAX_VOCABULARY:
        raise ConfigError(f"{where}: a vocabulary has 1 to {MAX_VOCABULARY} words, not {len(vocabulary)}")
    for earlier, later in pairwise(vocabulary):
        if earlier >= later:
            raise ConfigError(f"{where}: {later!r} stands after {earlier!r}; sort the vocabulary, each word once")
    for word in vocabulary:
        if not is_word(word):
            raise ConfigError(f"{where}: {word!r} is not one word as messages are read; see sottovoce.text.is_word")


def _shapes(aggregation: Aggregation) -> list[tuple[int | None, ...]]:
    return [TensorType.parse(notation).shape for notation in aggregation.tensors]


def decode_plan(content: bytes) -> Plan:
    """Parse the bytes of a plan blob (already verified against its digest) and check them.

    Raises:
        ConfigError: The bytes are not a plan of this version, or a number in it is impossible.
    """
    try:
        plan = msgspec.msgpack.decode(content, type=Plan)
    except (msgspec.ValidationError, msgspec.DecodeError, SottovoceError) as error:
        raise ConfigError(f"not a plan of this version: {error}") from error
    if canonical(plan) != content:
        raise ConfigError("the bytes of a plan are not in its one encoding, so they would have two digests")
    check_plan(plan)
    return plan


def settled(plan: Plan) -> Plan:
    """Return `plan` with every number in its declared kind (1 as 1.0 where a real one is meant), as devices decode it.

    Raises:
        ConfigError: A value is not of its declared type.
    """
    try:
        return msgspec.msgpack.decode(canonical(plan), type=Plan)
    except (msgspec.ValidationError, SottovoceError) as error:
        raise ConfigError(f"plan {plan.name!r}: {error}") from error
