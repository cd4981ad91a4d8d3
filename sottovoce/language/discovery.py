"""Words that nobody listed, but many devices use: found in two rounds, while rare words stay where they are.

Round 1 sums a count-min sketch (`text.word_sketch/1`): of 3 times 8192 buckets, how many devices have a word in each.
Round 2 sends the bitmap of the heavy buckets back, and devices write those of their words that are heavy in all three
rows into an invertible Bloom lookup table (`text.word_table/1`), whose sum is read by peeling. `sottovoce.sketches` has
the arithmetic, modulo the prime 65537. A word's count is read with it and is exact: so what is returned is held by as
many devices as asked for, and what is missing is only what a device had to leave out (its bounds) or a table too small,
which is noticed, and asked for again with twice the cells.

Chosen by measurement, 200 devices with real text messages (7,758 words, 996 of them held by at least 5 %;
`docs/analytics.md`): this takes 74 kB a device in 2 rounds. One table of all words takes 326 kB in one round, and tells
the coordinator every word of everybody. A prefix tree takes 79 kB in 16 rounds.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sottovoce.errors import ConfigError, RoundAbandoned
from sottovoce.language.counting import AMOUNT_SIZES, counting_program
from sottovoce.language.tallies import COUNTS, CountTerms, Examples, Tally, counted, narrow_lane
from sottovoce.plan import Aggregation, Counted, Extraction
from sottovoce.sketches import (
    FIELD,
    FIELDS,
    SEED_BYTES,
    WORD_SKETCH,
    WORD_TABLE,
    WordSketch,
    cells_of,
    check_sketch,
    fields_of,
    word_in,
)
from sottovoce.types import Array

_ROWS, _WIDTH = 3, 8192
_CELLS_A_WORD = 1.35
"""Peeling three cells a word succeeds, for many words, above 1.22 cells a word (Goodrich and Mitzenmacher, table 1)."""
_DISTINCT_WIDTH = 16384


@dataclass(frozen=True, slots=True)
class FoundWord:
    """A word, and how many devices have it."""

    word: str
    devices: int


@dataclass(frozen=True, slots=True)
class Discovery:
    """What was found.

    Attributes:
        words: Held by at least as many devices as asked for; the most frequent first, equal ones by the alphabet.
        survivors: Devices in the last sum.
        rounds: How many were asked; one, if no word can be so frequent.
        entries: Entries of the masked vectors, over all rounds.
    """

    words: tuple[FoundWord, ...]
    survivors: int
    rounds: int
    entries: int


def discover_words(
    examples: Examples,
    *,
    share: float = 0.05,
    words: int = 400,
    threshold: int = 3,
    seed: int = 0,
    column: str = "text",
    name: str = "discover_words",
    purpose: str = "",
) -> Discovery:
    """Return the words that at least `share` of the devices have in their messages: the heavy hitters among all words.

    Devices take part only if their owners allow to be asked for words that nobody has listed (`policy.discovery`).

    Args:
        examples: Messages.
        share: 0 to 1.
        words: Most words of one device that count, its most frequent ones.
        threshold: Fewest devices of a word, also where `share` of them are fewer; at least 1.
        seed: Of the hash functions. Of one discovery it must not change, so it is not drawn.
        column: Of the collection, with the text.
        name: Of the plans, with `_sketch` and `_table`.
        purpose: In words that a device's owner understands.

    Raises:
        ConfigError: Impossible numbers, or so many words are frequent that a filter could hold nothing back.
        RoundAbandoned: The fleet gave no answer, or so few devices came that nothing can be read.
    """
    if not (0 < share <= 1 and threshold >= 1 and words >= 1):
        raise ConfigError(f"{name}: share is above 0 and at most 1, threshold and words are at least 1")
    why = purpose or f"Words that at least {share:.0%} of all devices use and that nobody has listed."
    sketch = WordSketch(seed=_seed(seed), rows=_ROWS, width=_WIDTH, words=words)
    heavy, survivors, entries = _ask_sketch(
        examples, sketch, share, threshold=threshold, column=column, name=name, purpose=why
    )
    rounds = 1
    if not heavy.any(axis=1).all():
        return Discovery((), survivors, rounds, entries)  # A word of so many devices would be heavy in every row.
    for size in _table_sizes(heavy):
        table = table_of(sketch, heavy, size)
        check_sketch(WORD_TABLE, table)
        cells, survivors = _ask_table(examples, table, size, column=column, name=f"{name}_table", purpose=why)
        rounds, entries = rounds + 1, entries + size
        found, is_complete = read_table(table, cells, devices=survivors)
        if is_complete:
            return Discovery(_ranked(found, _needed(share, survivors, threshold)), survivors, rounds, entries)
    raise RoundAbandoned("not_readable", f"{name}: the table could not be read; ask for more frequent words")


@dataclass(frozen=True, slots=True)
class DistinctWords:
    """How many different words all devices together use.

    Attributes:
        estimate: By linear counting (Whang, Vander-Zanden and Taylor 1990).
        error: Its standard error.
        survivors: Devices in the sum.
    """

    estimate: float
    error: float
    survivors: int


def distinct_words(
    examples: Examples,
    *,
    words: int = 1000,
    seed: int = 0,
    column: str = "text",
    name: str = "distinct_words",
    purpose: str = "",
) -> DistinctWords:
    """Return how many different words all devices' messages have, estimated from 16384 hashed buckets in one round.

    Words of one device count here, so there is no threshold; but only buckets are known, never words.

    Args:
        examples: Messages.
        words: Most words of one device that count.
        seed, column, name, purpose: As for `discover_words`.

    Raises:
        ConfigError: Impossible numbers, or so many words that every bucket is taken.
        RoundAbandoned: The fleet gave no answer.
    """
    sketch = WordSketch(seed=_seed(seed), rows=1, width=_DISTINCT_WIDTH, words=words)
    why = purpose or "How many different words all devices together use."
    sums, survivors = _sum_sketch(examples, sketch, threshold=0, column=column, name=name, purpose=why)
    empty = float((sums[0] == 0).mean())
    if not empty:
        raise ConfigError(f"{name}: every one of {_DISTINCT_WIDTH} buckets is taken; lower `words`")
    load = -math.log(empty)
    error = math.sqrt(_DISTINCT_WIDTH * (math.exp(load) - load - 1))
    return DistinctWords(_DISTINCT_WIDTH * load, error, survivors)


# --- the sketch ---------------------------------------------------------------------------------------------------


def _ask_sketch(
    examples: Examples, sketch: WordSketch, share: float, *, threshold: int, column: str, name: str, purpose: str
) -> tuple[Array, int, int]:
    """Return which buckets are heavy, bool [rows, width], how many devices were asked, and how many entries it took."""
    sums, survivors = _sum_sketch(
        examples, sketch, threshold=threshold, column=column, name=f"{name}_sketch", purpose=purpose
    )
    return sums >= _needed(share, survivors, threshold), survivors, sketch.rows * sketch.width


def _sum_sketch(
    examples: Examples, sketch: WordSketch, *, threshold: int, column: str, name: str, purpose: str
) -> tuple[Array, int]:
    """Return the summed sketch, float64 [rows, width], and how many devices are in it."""
    check_sketch(WORD_SKETCH, sketch)
    used = sketch.rows * sketch.width
    program, size = counting_program("words", used)
    terms = CountTerms(most=1, entries=sketch.rows * sketch.words, threshold=threshold)
    tally = Tally(
        name=name,
        purpose=purpose,
        program=program,
        aggregations=counted(size, terms, with_devices=False),
        terms=terms,
        broadcast={},
        extraction=Extraction(extractor=WORD_SKETCH, column=column, sketch=sketch),
    )
    sums = tally.run(examples)
    counts = np.rint(np.asarray(sums.sums[COUNTS][0], np.float64))[:used]
    return counts.reshape(sketch.rows, sketch.width), sums.survivors


# --- the table ----------------------------------------------------------------------------------------------------


def _table_sizes(heavy: Array) -> tuple[int, ...]:
    """Return the entries of the first table, and of the two next larger ones, for as many words as are expected.

    Each row says it by linear counting: so many words leave so many buckets light.
    """
    light = np.maximum((~heavy).mean(axis=1), 0.5)
    expected = float(np.max(-np.log(light))) * heavy.shape[1]
    wanted = FIELDS * (_CELLS_A_WORD * expected + 30)
    first = next((at for at, size in enumerate(AMOUNT_SIZES) if size >= wanted), len(AMOUNT_SIZES) - 1)
    return AMOUNT_SIZES[first : first + 5 : 2]


def table_of(sketch: WordSketch, heavy: Array, entries: int) -> WordSketch:
    """Return `sketch` as that of a table of at most `entries` entries, with the filter `heavy`, bool [rows, width]."""
    cells = entries // FIELDS // 3 * 3
    return WordSketch(
        seed=sketch.seed,
        rows=sketch.rows,
        width=sketch.width,
        words=sketch.words,
        heavy=np.packbits(heavy.reshape(-1)).tobytes(),
        cells=cells,
    )


def _ask_table(
    examples: Examples, table: WordSketch, entries: int, *, column: str, name: str, purpose: str
) -> tuple[Array, int]:
    """Return the summed cells, int64 [cells, FIELDS], and how many devices are in them."""
    program, size = counting_program("amounts", entries)
    cells = Aggregation(
        name="cells",
        tensors=(f"int32[{size}]",),
        encoding=Counted(maximum=FIELD - 1),
        lane=narrow_lane(FIELD - 1, size),
        entries=min(3 * FIELDS * table.words, size),
    )
    tally = Tally(
        name=name,
        purpose=purpose,
        program=program,
        aggregations=(cells,),
        terms=CountTerms(threshold=0),
        broadcast={},
        extraction=Extraction(extractor=WORD_TABLE, column=column, sketch=table),
    )
    sums = tally.run(examples)
    found = np.rint(np.asarray(sums.sums["cells"][0], np.float64)).astype(np.int64) % FIELD
    return found[: table.cells * FIELDS].reshape(table.cells, FIELDS), sums.survivors


def read_table(table: WordSketch, cells: Array, *, devices: int) -> tuple[dict[str, int], bool]:
    """Return the words of a summed table with their counts, and whether these are all that was written into it.

    Args:
        table: Of whom the table is.
        cells: int64 [cells, FIELDS], modulo 65537.
        devices: How many are in the sum.
    """
    rest = cells.copy()
    found: dict[str, int] = {}
    waiting = deque(range(len(rest)))
    while waiting:
        at = waiting.popleft()
        word = word_in(table, rest[at], devices=devices)
        if word is None or word in found or at not in (places := cells_of(table, word)):
            continue
        count = found[word] = int(rest[at, 0])
        for place in places:
            rest[place] = (rest[place] - count * fields_of(table, word)) % FIELD
            waiting.append(place)
    return found, not rest.any()


def _ranked(found: Mapping[str, int], need: int) -> tuple[FoundWord, ...]:
    kept = [FoundWord(word, count) for word, count in found.items() if count >= need]
    return tuple(sorted(kept, key=lambda each: (-each.devices, each.word)))


def _needed(share: float, survivors: int, threshold: int) -> int:
    return max(threshold, math.ceil(share * survivors))


def _seed(seed: int) -> bytes:
    return hashlib.sha256(f"sottovoce discovery {seed}".encode()).digest()[:SEED_BYTES]
