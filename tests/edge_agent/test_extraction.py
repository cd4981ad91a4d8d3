"""From messages to rows: only what the plan's vocabularies list, by extractors that this device has."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.extraction import EXTRACTORS, extract, messages_of
from sottovoce.errors import BadExamples
from sottovoce.plan import Extraction
from sottovoce.sketches import WordSketch, sketch_columns

WORDS = Extraction(extractor="text.words/1", column="text", vocabularies=(("ciao", "mare", "sole"),))
PAIRS = Extraction(extractor="text.bigrams/1", column="text", vocabularies=(("ciao", "mare"), ("ciao", "sole")))


def test_words_become_their_indices_in_order_and_others_are_left_out() -> None:
    rows = extract(WORDS, ["Sole, mare!", "", "ciao segreto CIAO"])
    assert {port: list(column) for port, column in rows.items()} == {"word": [2, 1, 0, 0]}
    assert rows["word"].dtype == np.int32


def test_pairs_count_only_where_both_words_are_listed() -> None:
    rows = extract(PAIRS, ["ciao sole mare ciao", "ciao. sole", "mare segreto sole"])
    assert {port: list(column) for port, column in rows.items()} == {"first": [0, 1], "second": [1, 0]}


def test_messages_without_a_listed_word_give_no_row_but_columns() -> None:
    rows = extract(PAIRS, ["niente"])
    assert {port: column.shape for port, column in rows.items()} == {"first": (0,), "second": (0,)}


def test_a_sketch_is_made_of_all_messages_together() -> None:
    sketch = WordSketch(seed=bytes(16), rows=2, width=4096, words=10)
    messages = ["ciao mare", "mare sole"]
    rows = extract(Extraction(extractor="text.word_sketch/1", column="text", sketch=sketch), messages)
    expected = sketch_columns("text.word_sketch/1", sketch, messages)
    assert list(rows) == list(expected)
    np.testing.assert_array_equal(rows["word"], expected["word"])
    assert len(rows["word"]) == 6


def test_every_extractor_of_this_release_is_here() -> None:
    assert set(EXTRACTORS) == {"text.words/1", "text.bigrams/1", "text.word_sketch/1", "text.word_table/1"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"at": np.zeros(2)}, r"column 'text' \(text\) is missing; the examples have at"),
        ({"text": np.zeros(2)}, "column 'text' is float64; text.words/1 reads text"),
    ],
)
def test_a_collection_without_that_text_is_refused_by_name(columns, message: str) -> None:
    with pytest.raises(BadExamples, match=message):
        messages_of(WORDS, columns)
