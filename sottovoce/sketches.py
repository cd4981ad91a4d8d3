"""Two more extractors, for words that nobody listed: linear sketches, so that sums of them are sketches of all devices.

`text.word_sketch/1` says in which buckets the words of a device fall: `rows` hash functions, each onto `width` buckets,
and every word is counted once however often it occurs. The sum over all devices says of every bucket how many devices
have a word in it (a count-min sketch, Cormode and Muthukrishnan 2005), and names no word.

`text.word_table/1` writes words down in an invertible Bloom lookup table (Goodrich and Mitzenmacher 2011), but only
those whose buckets were heavy in every row of an earlier sketch: a rare word stays where it is. Every word goes into
three cells, one in each third of the table, and adds there the fields (1, check, key 1 … key 8): a key is two bytes of
the word's UTF-8, zeros after its end; check is 16 bits of its hash. All of it is added modulo the prime
65537 = 2^16 + 1, on the device as in the sum. So a cell in which c devices have written the same word, and nothing
else, holds c times its fields, and since every c from 1 to 65536 has an inverse modulo a prime, the division by c gives
the word back.
What is read is taken out of its other two cells, in which then other words stand alone: peeling, which reads everything
while there are fewer than about 0.8 words a cell.

Both take the same words of a device: those of at most 16 bytes, and of these the `words` most frequent ones in its own
messages, equal ones by their hash. SPEC.md has the bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec
import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.text import is_word, words
from sottovoce.types import Array

WORD_SKETCH: Final = "text.word_sketch/1"
WORD_TABLE: Final = "text.word_table/1"
FIELD: Final = 65537
"""The prime 2^16 + 1, modulo which cells are added."""
KEYS: Final = 8
"""Two bytes of a word each."""
FIELDS: Final = KEYS + 2
"""Numbers in a cell: how many devices, the check, the keys."""
WORD_BYTES: Final = 2 * KEYS
"""Longer words are left out."""
SEED_BYTES: Final = 16
MAX_ROWS: Final = 4
MAX_ENTRIES: Final = 2**20
LARGEST_FILTER: Final = 0.25
"""At most so much of every row of a filter may be heavy; one that lets everything pass would be no filter."""
LARGEST_PASS: Final = LARGEST_FILTER**3
"""At most so much of all words may pass a filter: what rows of these shares let pass together, their product."""
_TABLES = 3


class WordSketch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How words become entries of a sketch or a table.

    Attributes:
        seed: Of the hash functions, 16 bytes, the same in both rounds.
        rows: Hash functions of the sketch, 1 to 4.
        width: Buckets of each.
        words: Most words that one device contributes.
        heavy: For the table: which buckets were heavy, one bit for each of rows * width, the first in the highest bit
            of the first byte. Empty for the sketch.
        cells: Of the table, a multiple of 3; 0 for the sketch.
    """

    seed: bytes
    rows: int
    width: int
    words: int
    heavy: bytes = b""
    cells: int = 0


def check_sketch(extractor: str, sketch: WordSketch) -> None:
    """Refuse what `extractor` cannot use.

    Raises:
        ConfigError: A number is impossible, or the filter would let too much pass.
    """
    sizes = sketch.rows * sketch.width, sketch.cells * FIELDS
    if len(sketch.seed) != SEED_BYTES or not 1 <= sketch.rows <= MAX_ROWS or sketch.width < 1 or sketch.words < 1:
        raise ConfigError(
            f"{extractor}: a sketch has a seed of {SEED_BYTES} bytes, 1 to {MAX_ROWS} rows, and at least 1 bucket "
            "and 1 word"
        )
    if max(sizes) > MAX_ENTRIES:
        raise ConfigError(f"{extractor}: {max(sizes)} entries are more than {MAX_ENTRIES}: use fewer buckets or cells")
    if extractor == WORD_SKETCH and (sketch.heavy or sketch.cells):
        raise ConfigError(f"{extractor}: a sketch has neither a filter nor cells; {WORD_TABLE} has")
    if extractor == WORD_TABLE:
        _check_table(extractor, sketch)


def _check_table(extractor: str, sketch: WordSketch) -> None:
    if sketch.cells < _TABLES or sketch.cells % _TABLES:
        raise ConfigError(f"{extractor}: {sketch.cells} cells; a table has a multiple of {_TABLES}")
    if len(sketch.heavy) != -(-sketch.rows * sketch.width // 8):
        raise ConfigError(f"{extractor}: the filter must have one bit for each of {sketch.rows * sketch.width} buckets")
    shares = heavy_buckets(sketch).mean(axis=1)
    if shares.max() > LARGEST_FILTER:
        raise ConfigError(
            f"{extractor}: the filter lets {shares.max():.0%} of all buckets pass, more than {LARGEST_FILTER:.0%}, so "
            "rare words would leave the device too: use more buckets, or ask for more frequent words"
        )
    if shares.prod() > LARGEST_PASS:
        raise ConfigError(
            f"{extractor}: the filter lets {shares.prod():.1%} of all words pass, more than {LARGEST_PASS:.1%}, so "
            "rare words would leave the device too: use more rows"
        )


def heavy_buckets(sketch: WordSketch) -> Array:
    """Return the filter as bool [rows, width]."""
    bits = np.unpackbits(np.frombuffer(sketch.heavy, np.uint8), count=sketch.rows * sketch.width)
    return bits.astype(bool).reshape(sketch.rows, sketch.width)


def sketch_columns(extractor: str, sketch: WordSketch, messages: Iterable[str]) -> dict[str, Array]:
    """Return the rows that `extractor` makes of all messages of a device: port -> int32 [rows].

    Args:
        extractor: WORD_SKETCH: port `word`, the bucket of each word in each row, numbered through. WORD_TABLE: ports
            `index`, an entry of the table (cell * FIELDS + field), and `amount`, what is added to it.
        sketch: Checked.
        messages: Text.
    """
    return _COLUMNS[extractor](sketch, chosen_words(sketch, messages))


def chosen_words(sketch: WordSketch, messages: Iterable[str]) -> list[str]:
    """Return the words that a device contributes: its most frequent ones, at most `sketch.words`."""
    counts = Counter(word for message in messages for (word,) in words(message) if len(word.encode()) <= WORD_BYTES)
    return sorted(counts, key=lambda word: (-counts[word], _hash(sketch, word)))[: sketch.words]


def buckets_of(sketch: WordSketch, word: str) -> list[int]:
    """Return the bucket of `word` in every row."""
    digest = _hash(sketch, word)
    return [int.from_bytes(digest[4 * row : 4 * row + 4], "big") % sketch.width for row in range(sketch.rows)]


def cells_of(sketch: WordSketch, word: str) -> list[int]:
    """Return the three cells of `word`, one in each third of the table."""
    digest, third = _hash(sketch, word)[16:], sketch.cells // _TABLES
    return [third * at + int.from_bytes(digest[4 * at : 4 * at + 4], "big") % third for at in range(_TABLES)]


def fields_of(sketch: WordSketch, word: str) -> Array:
    """Return what `word` adds to each of its cells: int64 [FIELDS]."""
    keys = np.frombuffer(word.encode().ljust(WORD_BYTES, b"\0"), ">u2").astype(np.int64)
    check = int.from_bytes(_hash(sketch, word)[28:30], "big")
    return np.concatenate([np.array([1, check], np.int64), keys])


def word_in(sketch: WordSketch, cell: Array, *, devices: int) -> str | None:
    """Return the word that stands alone in a cell, None if there is none, or several.

    Args:
        sketch: Of the table.
        cell: int64 [FIELDS], each from 0 to 65536.
        devices: How many are in the sum: no word has more.
    """
    count = int(cell[0])
    if not 1 <= count <= devices:
        return None
    keys = cell[2:] * pow(count, -1, FIELD) % FIELD
    if (keys > np.iinfo(np.uint16).max).any():
        return None
    try:
        word = keys.astype(">u2").tobytes().rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return None
    is_alone = is_word(word) and np.array_equal(fields_of(sketch, word) * count % FIELD, cell)
    return word if is_alone else None


def _word_sketch(sketch: WordSketch, chosen: list[str]) -> dict[str, Array]:
    found = {row * sketch.width + at for word in chosen for row, at in enumerate(buckets_of(sketch, word))}
    return {"word": np.array(sorted(found), np.int32)}


def _word_table(sketch: WordSketch, chosen: list[str]) -> dict[str, Array]:
    heavy = heavy_buckets(sketch)
    passed = [word for word in chosen if all(heavy[row, at] for row, at in enumerate(buckets_of(sketch, word)))]
    index = [cell * FIELDS + field for word in passed for cell in cells_of(sketch, word) for field in range(FIELDS)]
    amount = [fields_of(sketch, word) for word in passed for _ in range(_TABLES)]
    amounts = np.concatenate(amount) if amount else np.zeros(0)
    return {"index": np.array(index, np.int32), "amount": amounts.astype(np.int32)}


def _hash(sketch: WordSketch, word: str) -> bytes:
    return hashlib.sha256(b"sottovoce word sketch 1" + sketch.seed + word.encode()).digest()


_COLUMNS: Mapping[str, Callable[[WordSketch, list[str]], dict[str, Array]]] = {
    WORD_SKETCH: _word_sketch,
    WORD_TABLE: _word_table,
}
EXTRACTORS: Final = frozenset(_COLUMNS)
"""The names of the extractors that are here."""
PORTS: Final[Mapping[str, tuple[str, ...]]] = {WORD_SKETCH: ("word",), WORD_TABLE: ("index", "amount")}
"""The batch ports that each of them fills."""
