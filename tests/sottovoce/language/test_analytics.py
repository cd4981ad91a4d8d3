"""Analytics: what a fleet counts is what the messages and values say, within the bounds, and nothing of too few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import simulation
import sottovoce as sv
from simulation.memory_fleet import MemoryFleet
from sottovoce.errors import ConfigError, RoundAbandoned
from sottovoce.language.analytics import (
    CountTerms,
    WordCount,
    group_statistics,
    histogram,
    next_words,
    quantile,
    word_counts,
)
from sottovoce.language.counting import BINS, SIZES

MESSAGES = [
    ["Good morning", "good morning, good night", "call me"],
    ["Good night!", "Call me later"],
    ["good morning", "Good luck", "zebra"],
    ["call me", "call you", "good night"],
    ["1234", "..."],
]
VOCABULARY = ["good", "morning", "night", "luck", "call", "me", "you", "later", "zebra", "unwritten"]
TEMPERATURES = [[20.0, 21.0, 19.5], [22.0], [20.5, 20.0, 18.0, 25.0], [19.0, 21.5], [30.0]]
ROOMS = [[0, 1, 1], [1], [0, 0, 2, 5], [1, 0], [1]]


@pytest.fixture(scope="module")
def fleet() -> Iterator[MemoryFleet]:
    texts = [{"text": messages} for messages in MESSAGES]
    rooms = [
        {"value": np.array(values, np.float32), "group": np.array(groups, np.int32)}
        for values, groups in zip(TEMPERATURES, ROOMS, strict=True)
    ]
    with simulation.fleet(
        5, collections={"messages": texts, "temperature": TEMPERATURES, "rooms": rooms}, minimum=3
    ) as made:
        yield made


@pytest.fixture
def messages(fleet: MemoryFleet) -> object:
    return sv.collection("messages")


def here(function, *arguments, **named):  # type: ignore[no-untyped-def]  # any question, on lists
    with sv.use(sv.reference_executor()):
        return function(*arguments, **named)


def test_words_are_counted_with_their_devices(messages: object) -> None:
    found = word_counts(messages, VOCABULARY, terms=CountTerms(threshold=0))
    assert found[:4] == [
        WordCount("good", 7, 4),
        WordCount("call", 4, 3),
        WordCount("me", 3, 3),
        WordCount("morning", 3, 2),
    ]
    assert WordCount("zebra", 1, 1) in found
    assert "unwritten" not in {each.word for each in found}
    assert here(word_counts, MESSAGES, VOCABULARY, terms=CountTerms(threshold=0)) == found


def test_what_fewer_devices_than_the_threshold_wrote_is_not_known(messages: object) -> None:
    found = word_counts(messages, VOCABULARY)
    assert {each.word for each in found} == {"good", "call", "me", "night"}
    assert here(word_counts, MESSAGES, VOCABULARY) == found


def test_one_device_moves_a_count_no_further_than_its_bounds(messages: object) -> None:
    clamped = word_counts(messages, VOCABULARY, terms=CountTerms(most=1, threshold=0))
    assert all(each.count == each.devices for each in clamped)
    single = word_counts(messages, VOCABULARY, terms=CountTerms(entries=1, threshold=0))
    # Each keeps its largest count, equal ones by the alphabet.
    assert single == [WordCount("good", 5, 2), WordCount("call", 3, 2)]
    assert here(word_counts, MESSAGES, VOCABULARY, terms=CountTerms(entries=1, threshold=0)) == single
    newest = word_counts(messages, VOCABULARY, terms=CountTerms(newest=1, threshold=0))
    assert {each.word: each.count for each in newest} == {
        "call": 2, "me": 2, "later": 1, "zebra": 1, "good": 1, "night": 1
    }  # fmt: skip
    assert here(word_counts, MESSAGES, VOCABULARY, terms=CountTerms(newest=1, threshold=0)) == newest


def test_what_follows_what(messages: object) -> None:
    table = next_words(messages, ["good", "call"], VOCABULARY, terms=CountTerms(threshold=2))
    assert table.after("good") == [WordCount("morning", 3, 2), WordCount("night", 3, 3)]
    assert table.after("call") == [WordCount("me", 3, 3)]
    assert table.after("morning") == []
    assert table.survivors == 5
    plain = here(next_words, MESSAGES, ["good", "call"], VOCABULARY, terms=CountTerms(threshold=2))
    np.testing.assert_array_equal(plain.counts, table.counts)
    np.testing.assert_array_equal(plain.devices, table.devices)


def test_a_histogram_is_exact_on_edges_too(fleet: MemoryFleet) -> None:
    edges = [18.0, 20.0, 21.0, 25.0]
    everything = np.concatenate([np.array(values, np.float32) for values in TEMPERATURES])
    found = histogram(sv.collection("temperature"), edges, terms=CountTerms(most=10, threshold=0))
    inside = everything[everything < edges[-1]]
    np.testing.assert_array_equal(found.counts, np.histogram(inside, edges)[0])
    np.testing.assert_array_equal(found.devices, [3, 2, 3])
    assert here(histogram, TEMPERATURES, edges, terms=CountTerms(most=10, threshold=0)).counts.tolist() == [3, 3, 3]


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_quantile_is_found_in_few_rounds(fleet: MemoryFleet, fraction: float) -> None:
    values = np.sort(np.concatenate([np.array(values) for values in TEMPERATURES]))
    expected = values[max(0, int(np.ceil(fraction * len(values))) - 1)]
    found = quantile(sv.collection("temperature"), fraction, low=-50, high=60, precision=0.05)
    assert found.low <= expected <= found.high
    assert found.high - found.low <= 0.05
    assert found.rounds == 2


def test_a_quantile_outside_of_the_window_is_said_to_be(fleet: MemoryFleet) -> None:
    found = here(quantile, TEMPERATURES, 0.5, low=0, high=10, precision=1)
    assert (found.low, found.high) == (10, float("inf"))
    assert here(quantile, TEMPERATURES, 0.5, low=30.5, high=40, precision=1).low == -float("inf")


def test_mean_and_variance_of_every_group(fleet: MemoryFleet) -> None:
    values = np.concatenate([np.array(each) for each in TEMPERATURES])
    groups = np.concatenate([np.array(each) for each in ROOMS])
    found = group_statistics(sv.collection("rooms"), 3, low=0, high=50, threshold=2)
    for number in (0, 1):
        members = values[groups == number]
        assert found[number].count == len(members)
        assert found[number].mean == pytest.approx(members.mean(), abs=1e-3)
        assert found[number].variance == pytest.approx(members.var(), abs=0.05)
    assert [each.devices for each in found] == [3, 4, 0]
    assert found[2].count == 0
    assert np.isnan(found[2].mean)


def test_one_device_cannot_move_a_mean_beyond_the_window(fleet: MemoryFleet) -> None:
    wild = [{"value": np.array([value]), "group": np.array([0])} for value in (10.0, 20.0, 1e9)]
    assert group_statistics(wild, 1, low=0, high=30)[0].mean == pytest.approx(20.0, abs=1e-4)


def test_a_program_that_is_started_again_asks_nobody_twice(fleet: MemoryFleet, tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        with sv.federated_program("median", tmp_path) as program:
            program.restore({})
            for _ in program.rounds(1):
                answers.append(quantile(sv.collection("temperature"), 0.5, low=-50, high=60, precision=0.05))
                # The process dies here, before the commit, and is started again.
                break
        committed = sum(name == "committed" for name, _ in fleet.events)
        answers.append(committed)
    assert answers[0] == answers[2]
    assert answers[1] == answers[3]


def test_devices_refuse_a_vocabulary_of_one_word(messages: object) -> None:
    with pytest.raises(RoundAbandoned, match="policy"):
        word_counts(messages, ["good"], name="test_for_membership")


def test_counting_has_a_program_of_every_listed_size() -> None:
    words = [f"{chr(97 + a)}{chr(97 + b)}" for a in range(26) for b in range(26)]
    counts = here(word_counts, [words, words, words[:5]], words, terms=CountTerms(threshold=0))
    assert Counter(each.count for each in counts) == {3: 5, 2: 671}
    assert SIZES[0] < len(words) < SIZES[-1]


def test_impossible_questions_are_refused_with_a_cure(messages: object) -> None:
    with pytest.raises(ConfigError, match="on a fleet they live on the devices"):
        word_counts(MESSAGES, VOCABULARY)
    with pytest.raises(ConfigError, match="give a list with one entry"):
        here(word_counts, sv.collection("messages"), VOCABULARY)
    with pytest.raises(ConfigError, match="too many"):
        here(next_words, MESSAGES, [f"w{'a' * at}" for at in range(30)], [f"v{'a' * at}" for at in range(3000)])
    with pytest.raises(ConfigError, match="is not one word"):
        word_counts(messages, ["Good", "night"])
    with pytest.raises(ConfigError, match="each larger than the last"):
        histogram(sv.collection("temperature"), [1.0, 1.0])
    with pytest.raises(ConfigError, match="finite numbers"):
        histogram(sv.collection("temperature"), np.linspace(0, 1, BINS + 2))
    with pytest.raises(ConfigError, match="most must be at least 1"):
        word_counts(messages, VOCABULARY, terms=CountTerms(most=0))
