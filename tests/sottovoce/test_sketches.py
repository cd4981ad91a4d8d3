"""Sketches and tables of words: linear, readable again, and holding back what is rare."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce import sketches
from sottovoce.errors import ConfigError
from sottovoce.language.discovery import read_table
from sottovoce.sketches import (
    FIELD,
    FIELDS,
    WORD_SKETCH,
    WORD_TABLE,
    WordSketch,
    cells_of,
    check_sketch,
    chosen_words,
    fields_of,
    heavy_buckets,
    sketch_columns,
    word_in,
)
from sottovoce.types import Array

VECTORS = Path(__file__).parent.parent / "vectors" / "sketches.json"
SKETCH = WordSketch(seed=b"0123456789abcdef", rows=3, width=64, words=4)


WORDS = ["apple", "banana", "cherry", "dädalus", "eve", "fox'n"]


def table(*heavy: str, cells: int = 30, words: int = 100) -> WordSketch:
    """Return a table whose filter lets `heavy` pass."""
    bits = np.zeros((SKETCH.rows, SKETCH.width), bool)
    for word in heavy:
        for row, at in enumerate(sketches.buckets_of(SKETCH, word)):
            bits[row, at] = True
    packed = np.packbits(bits.reshape(-1)).tobytes()
    return WordSketch(seed=SKETCH.seed, rows=3, width=64, words=words, heavy=packed, cells=cells)


def summed(sketch: WordSketch, devices: list[list[str]]) -> Array:
    """Return the cells of all devices, added as the client programs do."""
    total = np.zeros(sketch.cells * FIELDS, np.int64)
    for messages in devices:
        columns = sketch_columns(WORD_TABLE, sketch, messages)
        own = np.zeros_like(total)
        np.add.at(own, columns["index"], columns["amount"])
        total += own % FIELD
    return (total % FIELD).reshape(sketch.cells, FIELDS)


def test_vectors() -> None:
    for vector in json.loads(VECTORS.read_text())["vectors"]:
        made = WordSketch(
            seed=bytes.fromhex(vector["seed"]),
            rows=vector["rows"],
            width=vector["width"],
            words=vector["words"],
            heavy=bytes.fromhex(vector["heavy"]),
            cells=vector["cells"],
        )
        found = sketch_columns(vector["extractor"], made, vector["messages"])
        assert {name: column.tolist() for name, column in found.items()} == vector["columns"], vector["id"]


def test_a_word_counts_once_however_often_it_is_written() -> None:
    once = sketch_columns(WORD_SKETCH, SKETCH, ["hello world"])
    often = sketch_columns(WORD_SKETCH, SKETCH, ["Hello hello WORLD", "world, hello!"])
    np.testing.assert_array_equal(once["word"], often["word"])
    assert len(once["word"]) == 6


def test_a_device_contributes_its_most_frequent_words() -> None:
    messages = ["a b c d e f", "c d e f", "d e f", "é" * 9]
    assert set(chosen_words(SKETCH, messages)) == {"c", "d", "e", "f"}
    assert chosen_words(SKETCH, reversed(messages)) == chosen_words(SKETCH, messages)


def test_words_longer_than_a_key_are_left_out() -> None:
    assert chosen_words(SKETCH, ["a" * 16]) == ["a" * 16]
    assert chosen_words(SKETCH, ["a" * 17]) == []
    assert chosen_words(SKETCH, ["é" * 9]) == []


def test_only_heavy_words_are_written_down() -> None:
    made = table("hello")
    with_rare = sketch_columns(WORD_TABLE, made, ["hello secretword"])
    without = sketch_columns(WORD_TABLE, made, ["hello"])
    np.testing.assert_array_equal(with_rare["index"], without["index"])
    np.testing.assert_array_equal(with_rare["amount"], without["amount"])
    assert len(without["index"]) == 3 * FIELDS


@given(st.lists(st.lists(st.sampled_from(WORDS)), min_size=1, max_size=9))
def test_a_summed_table_is_read_back_exactly(devices: list[list[str]]) -> None:
    made = table(*WORDS, cells=90)
    found, is_complete = read_table(made, summed(made, devices), devices=len(devices))
    held = [word for messages in devices for word in set(messages)]
    assert is_complete
    assert found == {word: held.count(word) for word in held}


def test_an_even_count_can_be_divided_by() -> None:
    made = table("hello")
    cell = fields_of(made, "hello") * 65536 % FIELD
    assert word_in(made, cell, devices=65536) == "hello"
    assert word_in(made, cell, devices=10) is None


def test_two_words_in_a_cell_are_not_taken_for_one() -> None:
    made = table("hello", "world")
    both = (fields_of(made, "hello") + fields_of(made, "world")) % FIELD
    assert word_in(made, both, devices=100) is None
    assert len(set(cells_of(made, "hello"))) == 3


def test_a_full_table_says_that_it_is_incomplete() -> None:
    words = [f"{chr(97 + at)}x" for at in range(26)]
    made = table(*words, cells=6)
    assert heavy_buckets(made).shape == (3, 64)
    _, is_complete = read_table(made, summed(made, [[word] for word in words]), devices=26)
    assert not is_complete


@pytest.mark.parametrize(
    ("extractor", "changed", "text"),
    [
        (WORD_SKETCH, {"seed": b"short"}, "a seed of 16 bytes"),
        (WORD_SKETCH, {"rows": 5}, "1 to 4 rows"),
        (WORD_SKETCH, {"width": 2**20}, "entries are more than"),
        (WORD_SKETCH, {"cells": 3}, "neither a filter nor cells"),
        (WORD_TABLE, {"cells": 4}, "a multiple of 3"),
        (WORD_TABLE, {"cells": 3, "heavy": b"\0"}, "one bit for each of 192"),
        (WORD_TABLE, {"cells": 3, "heavy": b"\xff" * 24}, "the filter lets 100% of all buckets pass"),
        (
            WORD_TABLE,
            {"cells": 3, "rows": 1, "heavy": b"\xff\xff" + bytes(6)},
            "25.0% of all words pass, more than 1.6%",
        ),
        (WORD_TABLE, {"cells": 3, "rows": 2, "heavy": (b"\xff" + bytes(7)) * 2}, None),
        (WORD_TABLE, {"cells": 3, "rows": 2, "heavy": (b"\xff\x80" + bytes(6)) * 2}, "2.0% of all words pass"),
        (WORD_TABLE, {"cells": 3, "heavy": (b"\xff\xff" + bytes(6)) * 3}, None),
    ],
)
def test_impossible_sketches_are_refused(extractor: str, changed: dict[str, object], text: str | None) -> None:
    fields = {"seed": SKETCH.seed, "rows": 3, "width": 64, "words": 4, "heavy": b"", "cells": 0, **changed}
    refused = pytest.raises(ConfigError, match=text) if text else contextlib.nullcontext()
    with refused:
        check_sketch(extractor, WordSketch(**fields))  # type: ignore[arg-type]
