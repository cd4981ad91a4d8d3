"""Analytics on real messages and real temperatures, on simulated devices: the sums are those of the pooled data."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import simulation
import sottovoce as sv
from sottovoce import text
from sottovoce.language.analytics import CountTerms, WordCount, histogram, next_words, quantile, word_counts
from sottovoce.language.discovery import discover_words
from sottovoce.types import Array

RARE = "xylothek"
TERMS = CountTerms(most=3, entries=40, threshold=3, publish=True)
FIRST = ["call", "good"]


def senders(folder: Path) -> dict[str, list[str]]:
    """Return the messages of every known sender, one of whom uses a word of its own."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in gzip.decompress((folder / "sms_spam" / "smsspam.jsonl.gz").read_bytes()).splitlines():
        message = json.loads(line)
        if message["nus_user"] is not None:
            found[message["nus_user"]].append(message["text"])
    next(iter(found.values())).extend([f"call {RARE}", f"good {RARE} call"] * 5)
    return found


def plain_table(people: Mapping[str, Sequence[str]], second: Sequence[str]) -> dict[str, list[WordCount]]:
    """Return what follows each of FIRST, from all messages: the same bounds, the same threshold."""
    times: Counter[tuple[str, ...]] = Counter()
    held: Counter[tuple[str, ...]] = Counter()
    for messages in people.values():
        own = Counter(pair for message in messages for pair in text.bigrams(message))
        listed = sorted(pair for pair in own if pair[0] in FIRST and pair[1] in second)
        kept = sorted(listed, key=lambda pair: -own[pair])[: TERMS.entries]
        times.update({pair: min(own[pair], TERMS.most) for pair in kept})
        held.update(kept)
    published = {pair: times[pair] for pair in times if held[pair] >= TERMS.threshold}
    return {
        first: sorted(
            (WordCount(pair[1], count, held[pair]) for pair, count in published.items() if pair[0] == first),
            key=lambda each: (-each.count, each.word),
        )
        for first in FIRST
    }


@pytest.mark.shared_data
def test_what_follows_call_and_good_is_what_the_messages_say(shared_data: Path) -> None:
    people = senders(shared_data)
    texts = [{"text": messages} for messages in people.values()]
    with simulation.fleet(len(people), collections={"messages": texts}) as fleet:
        vocabulary = [each.word for each in discover_words(sv.collection("messages"), share=0.15).words]
        table = next_words(sv.collection("messages"), FIRST, vocabulary, terms=TERMS)
        rare = word_counts(sv.collection("messages"), [*vocabulary, "call"], name="words")
        home = fleet.device(fleet.devices[0]).home.path
        others = [path for path in home.parents[1].rglob("*") if path.is_file() and home not in path.parents]
        traces = [path for path in others if RARE.encode() in path.read_bytes()]
        events = repr(fleet.events)
    expected = plain_table(people, vocabulary)
    for first in FIRST:
        assert len(expected[first]) >= 4
        assert table.after(first) == expected[first]
    assert RARE not in vocabulary
    assert RARE not in {each.word for each in rare}
    assert RARE not in events
    assert not traces


def temperatures(folder: Path) -> list[Array]:
    """Return the hourly temperatures of 12 stations in even and in odd years: 24 devices."""
    stored = np.load(folder / "sensors_beijing12" / "prsa.npz", allow_pickle=False)
    readings = stored["x"][:, :, 0]
    hours = np.datetime64("2013-03-01T00") + np.arange(readings.shape[1]).astype("timedelta64[h]")
    is_even = hours.astype("datetime64[Y]").astype(int) % 2 == 0
    return [
        (station[years & (station != stored["missing"])] * np.float32(0.1)).astype(np.float32)
        for station in readings
        for years in (is_even, ~is_even)
    ]


@pytest.mark.shared_data
def test_quantiles_and_histograms_of_real_temperatures(shared_data: Path) -> None:
    devices = temperatures(shared_data)
    pooled = np.concatenate(devices)
    edges = np.arange(-20.05, 43, 1.0).astype(np.float32)
    with simulation.fleet(len(devices), collections={"temperature": devices}):
        collection = sv.collection("temperature")
        counted = histogram(collection, edges, terms=CountTerms(most=20000, newest=20000, threshold=0))
        median = quantile(collection, 0.5, low=-50, high=60, precision=0.02, newest=20000)
    np.testing.assert_array_equal(counted.counts, np.histogram(pooled, edges)[0])
    assert median.rounds <= 8
    assert median.value == pytest.approx(np.quantile(pooled, 0.5), rel=0.01)
    with sv.use(sv.reference_executor()):
        for fraction in (0.05, 0.25, 0.75, 0.95, 0.99):
            found = quantile(devices, fraction, low=-50, high=60, precision=0.02, newest=20000)
            assert found.rounds <= 8
            assert found.value == pytest.approx(np.quantile(pooled, fraction), rel=0.01)
