"""Words that nobody listed: found exactly, while what is rare leaves no trace anywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import simulation
import sottovoce as sv
from simulation.memory_fleet import MemoryFleet
from sottovoce import text
from sottovoce.errors import ConfigError
from sottovoce.language.analytics import CountTerms, next_words
from sottovoce.language.discovery import FoundWord, discover_words, distinct_words

RARE = "xylothek"
"""One device's word, in its messages many times."""
FREQUENT = ["good", "morning", "hello", "there", "call", "me"]


def messages_of(device: int) -> list[str]:
    own = [f"{FREQUENT[at]} {FREQUENT[at + 1]}" for at in (0, 2, 4) if (device + at) % 4]
    several = ["seldom seen"] if device in (1, 2) else []
    return own + several + ([f"good {RARE}", f"{RARE} call me"] * 5 if device == 3 else [])


MESSAGES = [messages_of(device) for device in range(12)]


def held_by(devices: Sequence[Sequence[str]]) -> Counter[str]:
    return Counter(word for own in devices for word in {word for message in own for (word,) in text.words(message)})


@pytest.fixture(scope="module")
def fleet() -> Iterator[MemoryFleet]:
    texts = [{"text": messages} for messages in MESSAGES]
    with simulation.fleet(len(MESSAGES), collections={"messages": texts}) as made:
        yield made


def test_frequent_words_are_found_with_their_devices(fleet: MemoryFleet) -> None:
    found = discover_words(sv.collection("messages"), share=0.25)
    held = held_by(MESSAGES)
    expected = sorted((word for word in held if held[word] >= 3), key=lambda word: (-held[word], word))
    assert set(expected) == set(FREQUENT)
    assert found.words == tuple(FoundWord(word, held[word]) for word in expected)
    assert (found.rounds, found.survivors) == (2, 12)
    with sv.use(sv.reference_executor()):
        assert discover_words(MESSAGES, share=0.25) == found


def test_a_rare_word_is_in_no_result_journal_log_or_blob(fleet: MemoryFleet) -> None:
    found = discover_words(sv.collection("messages"), share=0.25)
    table = next_words(
        sv.collection("messages"), [each.word for each in found.words], terms=CountTerms(publish=True), name="pairs"
    )
    assert {each.word for each in table.after("hello")} == {"there"}
    root = fleet.device("device-00").home.path.parents[1]
    writer = fleet.device("device-03").home.path
    others = [path for path in root.rglob("*") if path.is_file() and writer not in path.parents]
    written = [path for path in others if RARE.encode() in path.read_bytes()]
    assert not written
    assert not re.search(RARE, repr(fleet.events))
    assert sum(path.is_file() and RARE.encode() in path.read_bytes() for path in writer.rglob("*")) >= 1
    # The search finds what is there: frequent words stand in the plan, which is a blob in the coordinator's journal.
    assert any(b"morning" in path.read_bytes() for path in others)


def test_distinct_words_are_estimated_in_one_round(fleet: MemoryFleet) -> None:
    before = sum(name == "committed" for name, _ in fleet.events)
    found = distinct_words(sv.collection("messages"))
    assert found.estimate == pytest.approx(len(held_by(MESSAGES)), abs=max(1.0, 3 * found.error))
    assert sum(name == "committed" for name, _ in fleet.events) == before + 1


def test_words_that_do_not_fit_are_left_out_not_cut_off(fleet: MemoryFleet) -> None:
    found = discover_words(sv.collection("messages"), share=0.25, words=2)
    held = held_by(MESSAGES)
    assert all(each.devices <= held[each.word] for each in found.words)
    assert {each.word for each in found.words} <= set(FREQUENT)


def test_where_nothing_is_frequent_no_second_round_is_asked(fleet: MemoryFleet) -> None:
    before = sum(name == "committed" for name, _ in fleet.events)
    found = discover_words(sv.collection("messages"), share=1.0, threshold=13)
    assert (found.words, found.rounds, found.survivors) == ((), 1, 12)
    assert sum(name == "committed" for name, _ in fleet.events) == before + 1
    with sv.use(sv.reference_executor()):
        assert discover_words(MESSAGES, share=1.0, threshold=13) == found


def test_a_filter_that_would_let_everything_pass_is_refused() -> None:
    words = [chr(97 + at // 676) + chr(97 + at // 26 % 26) + chr(97 + at % 26) for at in range(4000)]
    with sv.use(sv.reference_executor()), pytest.raises(ConfigError, match="ask for more frequent words"):
        discover_words([[" ".join(words)]] * 3, words=4000)


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="share is above 0"):
        discover_words(MESSAGES, share=0.0)


@pytest.mark.shared_data
def test_discovery_on_real_messages(real_messages: list[list[str]]) -> None:
    """200 devices, words of at least 5 % of them: precision 1, recall at least 0.9."""
    wanted = {word for word, count in held_by(real_messages).items() if count >= 10}
    with sv.use(sv.reference_executor()):
        found = discover_words(real_messages)
        distinct = distinct_words(real_messages)
    words = {each.word for each in found.words}
    assert not words - wanted
    assert len(words & wanted) / len(wanted) >= 0.9
    assert found.rounds == 2
    assert distinct.estimate == pytest.approx(len(held_by(real_messages)), rel=0.03)


@pytest.fixture
def real_messages(shared_data: Path) -> list[list[str]]:
    """The messages of the collection, dealt to 200 devices."""
    import gzip
    import json

    lines = gzip.decompress((shared_data / "sms_spam" / "smsspam.jsonl.gz").read_bytes()).splitlines()
    messages = [json.loads(line)["text"] for line in lines]
    order = np.random.default_rng(5).permutation(len(messages))
    return [[messages[at] for at in order[device::200]] for device in range(200)]
