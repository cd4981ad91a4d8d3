"""Analytics without a model: counts of words and of what follows them, histograms, quantiles, moments by group.

Every function asks the devices in one round or in a few, and runs in the current executor: on a fleet,
`word_counts(sv.collection("messages"), vocabulary)`, or in this process, with a list that has one entry a device. What
one device can contribute is bounded, stands in the plan, and is enforced by the device (`CountTerms`). The programs are
committed, so TensorFlow is not needed. Inside a federated program every round has a key, so a program that is started
again does not ask twice. Words that nobody listed: `sottovoce.language.discovery`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.counting import BINS, GROUPS, counting_program
from sottovoce.language.ports import RoundSums
from sottovoce.language.tallies import COUNTS, DEVICES, CountTerms, Examples, Tally, counted
from sottovoce.plan import Aggregation, Counted, Extraction, Quantised
from sottovoce.types import Array

__all__ = [
    "CountTerms",
    "Group",
    "Histogram",
    "NextWords",
    "Quantile",
    "WordCount",
    "group_statistics",
    "histogram",
    "next_words",
    "quantile",
    "word_counts",
]

_LARGEST = float(np.finfo(np.float32).max)
_SUM_BITS = 40
_MAX_QUANTILE_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class WordCount:
    """A word, how often it was counted on all devices together, and on how many devices."""

    word: str
    count: int
    devices: int


def word_counts(
    examples: Examples,
    vocabulary: Iterable[str],
    *,
    terms: CountTerms = CountTerms(),  # noqa: B008 - immutable
    column: str = "text",
    name: str = "word_counts",
    purpose: str = "",
) -> list[WordCount]:
    """Return the listed words of all devices' messages, the most frequent first, equal ones by the alphabet.

    Args:
        examples: Messages.
        vocabulary: The words to count, as `sottovoce.text.is_word` has them; at most 65536.
        terms: Bounds and publication.
        column: Of the collection, with the text.
        name: Of the plan; what a device may answer once or every so many days goes by it.
        purpose: In words that a device's owner understands.

    Returns:
        Words that no device, or too few, contributed are left out.

    Raises:
        ConfigError: Too many words, or what is no word.
        RoundAbandoned: The fleet gave no answer.
    """
    listed = _vocabulary(vocabulary)
    program, size = counting_program("words", len(listed))
    sums = Tally(
        name=name,
        purpose=purpose or f"How often each of {len(listed)} listed words is written.",
        program=program,
        aggregations=counted(size, terms),
        terms=terms,
        broadcast={},
        extraction=Extraction(extractor="text.words/1", column=column, vocabularies=(listed,)),
    ).run(examples)
    return _ranked(listed, _of(sums, COUNTS), _of(sums, DEVICES))


@dataclass(frozen=True, slots=True)
class NextWords:
    """What follows what, on all devices together.

    Attributes:
        first: The words that are followed, ascending.
        second: The words that follow, ascending.
        counts: int64 [first, second]: how often.
        devices: int64 [first, second]: on how many devices.
        survivors: Devices in the sum.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    counts: Array
    devices: Array
    survivors: int

    def after(self, word: str) -> list[WordCount]:
        """Return what follows `word`, the most frequent first, equal ones by the alphabet; nothing if it is unknown."""
        if word not in self.first:
            return []
        row = self.first.index(word)
        return _ranked(self.second, self.counts[row], self.devices[row])


def next_words(
    examples: Examples,
    first: Iterable[str],
    second: Iterable[str] | None = None,
    *,
    terms: CountTerms = CountTerms(entries=300, publish=True),  # noqa: B008 - immutable
    column: str = "text",
    name: str = "next_words",
    purpose: str = "",
) -> NextWords:
    """Return how often each of `second` follows each of `first` in all devices' messages.

    Published (`terms.publish`), it is what `edge-agent suggest WORD` on every device of the fleet reads.

    Args:
        examples: Messages.
        first: The words that are followed.
        second: The words that follow; None takes those of `first`. Both together make at most 65536 pairs.
        terms: Bounds and publication.
        column, name, purpose: As for `word_counts`.

    Raises:
        ConfigError: Too many words, or what is no word.
        RoundAbandoned: The fleet gave no answer.
    """
    rows = _vocabulary(first)
    columns = rows if second is None else _vocabulary(second)
    program, size = counting_program("pairs", len(rows) * len(columns))
    sums = Tally(
        name=name,
        purpose=purpose or f"Which of {len(columns)} listed words follow which of {len(rows)}, to suggest words.",
        program=program,
        aggregations=counted(size, terms),
        terms=terms,
        broadcast={"seconds": np.array([len(columns)], np.int32)},
        extraction=Extraction(extractor="text.bigrams/1", column=column, vocabularies=(rows, columns)),
    ).run(examples)
    shape = len(rows), len(columns)
    counts, devices = (_of(sums, each)[: math.prod(shape)].reshape(shape) for each in (COUNTS, DEVICES))
    return NextWords(rows, columns, counts, devices, sums.survivors)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie in each bin.

    Attributes:
        edges: float32 [bins + 1], ascending; a value on an edge belongs to the bin above it.
        counts: int64 [bins].
        devices: int64 [bins]: how many devices have values there.
        survivors: Devices in the sum.
    """

    edges: Array
    counts: Array
    devices: Array
    survivors: int


def histogram(
    examples: Examples,
    edges: Sequence[float] | Array,
    *,
    terms: CountTerms = CountTerms(most=1000, newest=1000),  # noqa: B008 - immutable
    name: str = "histogram",
    purpose: str = "",
) -> Histogram:
    """Return how many of all devices' values lie in each bin, exactly.

    Args:
        examples: A collection of one column of numbers, all of them, not only the newest.
        edges: Of 1 to 64 bins, strictly ascending, in the values' units; compared as float32.
        terms: Bounds and publication.
        name, purpose: As for `word_counts`.

    Raises:
        ConfigError: Impossible edges.
        RoundAbandoned: The fleet gave no answer.
    """
    ends = np.asarray(edges, np.float32)
    if not (ends.ndim == 1 and 2 <= len(ends) <= BINS + 1 and np.isfinite(ends).all() and (np.diff(ends) > 0).all()):
        raise ConfigError(f"{name}: edges must be 2 to {BINS + 1} finite numbers, each larger than the last")
    program, size = counting_program("bins", BINS)
    padded = np.append(ends, np.full(BINS + 1 - len(ends), _LARGEST, np.float32))
    sums = Tally(
        name=name,
        purpose=purpose or f"How many values lie in each of {len(ends) - 1} bins from {ends[0]:g} to {ends[-1]:g}.",
        program=program,
        aggregations=counted(size, terms),
        terms=terms,
        broadcast={"edges": padded},
    ).run(examples)
    counts, devices = (_of(sums, each)[: len(ends) - 1] for each in (COUNTS, DEVICES))
    return Histogram(ends, counts, devices, sums.survivors)


@dataclass(frozen=True, slots=True)
class Quantile:
    """The value that a fraction of all values is at or below.

    Attributes:
        low, high: It lies between these two; -inf or inf where it is outside of the window.
        rounds: How many were asked.
        survivors: Devices in the last sum.
    """

    low: float
    high: float
    rounds: int
    survivors: int

    @property
    def value(self) -> float:
        """The middle of the two."""
        return (self.low + self.high) / 2


def quantile(
    examples: Examples,
    fraction: float,
    *,
    low: float,
    high: float,
    precision: float,
    newest: int = 1000,
    name: str = "quantile",
    purpose: str = "",
) -> Quantile:
    """Return the quantile of all devices' values, by histograms of ever narrower windows: 62 times narrower a round.

    A device with more values weighs more. Bins of few devices must count here, so there is no threshold: the counts in
    the coordinator's journal are those of all bins.

    Args:
        examples: A collection of one column of numbers.
        fraction: 0 to 1; 0.5 is the median. The value of rank ceil(fraction * n) is meant, of n values.
        low, high: Where to look, in the values' units.
        precision: How far apart low and high of the answer may be.
        newest: So many of a device's newest values count.
        name, purpose: As for `word_counts`; one plan for all its rounds.

    Raises:
        ConfigError: Impossible numbers, or more than 8 rounds would be needed.
        RoundAbandoned: The fleet gave no answer.
    """
    if not (0 <= fraction <= 1 and -_LARGEST < low < high < _LARGEST and precision > 0 and newest >= 1):
        raise ConfigError(f"{name}: give a fraction from 0 to 1, low below high, and a precision above 0")
    terms = CountTerms(most=newest, newest=newest, threshold=0)
    why = purpose or f"The value that {fraction:.0%} of all values are at or below."
    for asked in range(1, _MAX_QUANTILE_ROUNDS + 1):
        edges = _edges_within(low, high)
        found = histogram(examples, edges, terms=terms, name=name, purpose=why)
        below = np.cumsum(found.counts)
        at = int(np.searchsorted(below, max(1.0, math.ceil(fraction * float(below[-1])))))
        if at in (0, len(found.counts) - 1):
            outside = (-math.inf, low) if at == 0 else (high, math.inf)
            return Quantile(*outside, asked, found.survivors)
        low, high = float(edges[at]), float(edges[at + 1])
        if high - low <= precision or len(edges) < BINS + 1:
            return Quantile(low, high, asked, found.survivors)
    raise ConfigError(f"{name}: {_MAX_QUANTILE_ROUNDS} rounds are not enough; give a narrower window or less precision")


def _edges_within(low: float, high: float) -> Array:
    """Return the edges of equal bins, and of two more for what is below and above: every value is counted somewhere."""
    inner = np.unique(np.linspace(low, high, BINS - 1).astype(np.float32))
    return np.concatenate([[-_LARGEST], inner, [_LARGEST]]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Group:
    """What is known of one group's values, over all devices.

    Attributes:
        count: How many there are.
        mean: In the values' units; nan without values.
        variance: Mean squared deviation from the mean, in units squared; nan without values.
        devices: How many devices have values in the group.
    """

    count: int
    mean: float
    variance: float
    devices: int


def group_statistics(
    examples: Examples,
    groups: int,
    *,
    low: float,
    high: float,
    newest: int = 1000,
    threshold: int = 3,
    name: str = "group_statistics",
    purpose: str = "",
) -> list[Group]:
    """Return count, mean and variance of all devices' values in each group; `groups` = 1 with column `group` all 0.

    Args:
        examples: A collection with the columns `value` and `group`, an integer from 0 to groups - 1; others are left
            out.
        groups: At most 64.
        low, high: Values outside count as the nearer end; mean and variance are exact to about 1e-5 of the width.
        newest: So many of a device's newest values count.
        threshold: Groups of fewer devices are empty in the result.
        name, purpose: As for `word_counts`.

    Raises:
        ConfigError: Impossible numbers.
        RoundAbandoned: The fleet gave no answer.
    """
    if not (1 <= groups <= GROUPS and low < high and newest >= 1):
        raise ConfigError(f"{name}: give 1 to {GROUPS} groups, low below high, and newest of at least 1")
    program, size = counting_program("groups", groups)
    terms = CountTerms(most=newest, newest=newest, threshold=threshold)
    sums = Tally(
        name=name,
        purpose=purpose or f"Mean and variance of values from {low:g} to {high:g}, in {groups} groups.",
        program=program,
        aggregations=(_renamed(counted(size, terms)[0], "count"), *_moments(size, newest)),
        terms=terms,
        broadcast={"window": np.array([low, high], np.float32)},
    ).run(examples)
    columns = (np.asarray(sums.sums[each][0], np.float64)[:groups] for each in ("count", "sum", "squares", DEVICES))
    return [_group(*each, low=low, width=high - low) for each in zip(*columns, strict=True)]


def _moments(size: int, newest: int) -> tuple[Aggregation, ...]:
    encoding = Quantised(half_range=float(newest), bits=_SUM_BITS)
    reals, whole = (f"float32[{size}]",), (f"int32[{size}]",)
    return (
        Aggregation(name="sum", tensors=reals, encoding=encoding, lane="uint64", follows="count"),
        Aggregation(name="squares", tensors=reals, encoding=encoding, lane="uint64", follows="count"),
        Aggregation(name=DEVICES, tensors=whole, encoding=Counted(maximum=1), lane="dense", presence_of="count"),
    )


def _renamed(aggregation: Aggregation, name: str) -> Aggregation:
    return Aggregation(name=name, tensors=aggregation.tensors, encoding=aggregation.encoding, lane=aggregation.lane)


def _group(count: float, total: float, squares: float, devices: float, *, low: float, width: float) -> Group:
    """Return the statistics of one group from the moments of its values as fractions of the window."""
    if not count:
        return Group(0, math.nan, math.nan, int(devices))
    mean = total / count
    return Group(int(count), low + width * mean, width**2 * max(squares / count - mean**2, 0.0), int(devices))


def _vocabulary(words: Iterable[str]) -> tuple[str, ...]:
    """Return the words as a plan lists them: each once, ascending."""
    return tuple(sorted(set(words)))


def _of(sums: RoundSums, name: str) -> Array:
    return np.rint(np.asarray(sums.sums[name][0], np.float64)).astype(np.int64)


def _ranked(words: Sequence[str], counts: Array, devices: Array) -> list[WordCount]:
    """Return what was counted, the most frequent first, equal ones by the alphabet."""
    found = [
        WordCount(word, int(count), int(held))
        for word, count, held in zip(words, counts, devices, strict=False)
        if count
    ]
    return sorted(found, key=lambda each: (-each.count, each.word))
