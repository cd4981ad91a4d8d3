"""From messages to words: the vectors of the SPEC, and what holds for every message."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.text import EXTRACTORS, MAX_WORD_CHARACTERS, bigrams, is_word, normalised, words

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "text.json").read_text())["cases"]


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: str(case["id"]))
def test_the_vectors(case: dict[str, Any]) -> None:
    assert [word for (word,) in words(case["message"])] == case["words"]
    assert [list(pair) for pair in bigrams(case["message"])] == case["bigrams"]


def test_a_word_of_a_vocabulary_is_as_short_as_one_in_a_message() -> None:
    assert is_word("é" * MAX_WORD_CHARACTERS)
    assert not is_word("é" * (MAX_WORD_CHARACTERS + 1))
    assert not is_word("e\u0301" * MAX_WORD_CHARACTERS)
    assert not is_word("good" + " " * 100)


def test_the_names_that_plans_use() -> None:
    assert {"text.words/1": words, "text.bigrams/1": bigrams} == EXTRACTORS


@given(st.text())
def test_every_word_found_is_a_word_by_itself(message: str) -> None:
    """A vocabulary made of found words lists them in the form in which devices find them."""
    for (word,) in words(message):
        assert is_word(word), (message, word)
        assert not any(character.isdigit() for character in word)


@given(st.text())
def test_normalising_twice_changes_nothing(message: str) -> None:
    assert words(normalised(message)) == words(message)


@given(st.text(alphabet=st.characters(codec="utf-8")), st.text(alphabet=st.characters(codec="utf-8")))
def test_two_sentences_are_read_one_by_one(one: str, other: str) -> None:
    assert words(f"{one}\n{other}") == words(one) + words(other)
    assert bigrams(f"{one}\n{other}") == bigrams(one) + bigrams(other)


@given(st.text())
def test_pairs_are_made_of_words(message: str) -> None:
    found = {word for (word,) in words(message)}
    assert {word for pair in bigrams(message) for word in pair} <= found
