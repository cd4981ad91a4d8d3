"""The demonstration `words`: what it prints is what happened, over a real broker with real processes."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from simulation.words_demo import (
    MESSAGES,
    WORD,
    WordsReport,
    main,
    messages_by_sender,
    plain_counts,
    shown_word,
    unfollowed_word,
)
from sottovoce.errors import ConfigError
from sottovoce.language.analytics import NextWords
from sottovoce.text import bigrams

TABLE = NextWords(
    ("good", "see"), ("luck", "night", "you"), np.array([[3, 5, 0], [0, 0, 4]]), np.array([[3, 4, 0], [0, 0, 4]]), 5
)


def test_the_sum_is_that_of_all_messages_and_the_rows_are_noise(tmp_path: Path) -> None:
    report = tmp_path / "words.json"
    options = argparse.Namespace(data_file=None, devices=10, mode="active", report=report)
    printed = io.StringIO()
    main(options, Console(file=printed, width=120))
    found = msgspec.json.decode(report.read_bytes(), type=WordsReport)
    assert found.after == found.plain
    assert len(found.after) >= 2
    assert set(found.after) <= set(found.vocabulary)
    people = messages_by_sender(MESSAGES, 10)
    seen = [value for row in found.masked.values() for value in row]
    # Nobody wrote it more than a few times; masked, the numbers go up to 2^6 and are hardly ever all small.
    assert max(seen) > 5
    assert len(found.masked) == 4
    for suggested in found.suggested:
        assert suggested.suggestions
        own = {pair[0] for message in people[suggested.device] for pair in bigrams(message)}
        assert suggested.word not in own
    assert len(found.suggested) >= 5
    assert WORD in printed.getvalue()


def test_messages_are_grouped_by_sender() -> None:
    people = messages_by_sender(MESSAGES, 20)
    assert len(people) == 20
    assert all(len(messages) >= 10 for messages in people.values())


def test_a_file_that_is_none_is_refused_with_an_example(tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    file.write_text('{"sender": "ada"}\n')
    with pytest.raises(ConfigError, match="write one JSON object a line"):
        messages_by_sender(file, 20)
    file.write_text('{"sender": "ada", "text": "hello"}\n')
    with pytest.raises(ConfigError, match="1 senders"):
        messages_by_sender(file, 20)


def test_plain_counts_keep_bounds_and_threshold() -> None:
    people = {str(at): ["good night"] * 9 for at in range(3)} | {"3": ["good luck", "see you, see you"]}
    assert plain_counts(people, TABLE) == {("good", "night"): (15, 3)}


def test_a_word_is_chosen_that_the_owner_never_followed_up() -> None:
    assert unfollowed_word(["see you"], TABLE) == "good"
    assert unfollowed_word(["good night"], TABLE) == "see"
    assert unfollowed_word(["good night, see you"], TABLE) is None


def test_the_shown_word_is_one_that_these_people_write() -> None:
    assert shown_word(TABLE) == "good"
    other = NextWords(("day", "see"), ("luck", "you"), np.array([[0, 0], [3, 4]]), np.array([[0, 0], [3, 4]]), 5)
    assert shown_word(other) == "see"
    nothing = NextWords(("day",), ("luck",), np.array([[0]]), np.array([[0]]), 5)
    with pytest.raises(ConfigError, match="add messages"):
        shown_word(nothing)
