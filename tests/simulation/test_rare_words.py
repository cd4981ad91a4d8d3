"""A rare word of one device, on the whole stack: after the threshold it is nowhere, and neither is its count."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import simulation
from simulation.memory_fleet import MemoryFleet
from sottovoce.bundle import decode_bundle
from sottovoce.language.counting import counting_program
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.plan import Aggregation, Counted, Extraction, LocalWork
from sottovoce.tensors import encode_tensors

LISTED, UNLISTED = "zanzibar", "kalamazoo"
TIMES = 1_237
"""How often the one device says either: a number that stands nowhere else."""
VOCABULARY = tuple(sorted(["mare", "sole", "vento", LISTED]))
COMMON = {"mare": 3, "sole": 2, "vento": 1}
"""How often every device says each."""
DEVICES = 5


@pytest.fixture
def fleet() -> Iterator[MemoryFleet]:
    everybody = " ".join(word for word, times in COMMON.items() for _ in range(times))
    messages = [{"text": np.array([everybody], object)} for _ in range(DEVICES)]
    rare = {"text": np.array([everybody, *[f"{LISTED} {UNLISTED}"] * TIMES], object)}
    with simulation.fleet(DEVICES, collections={"messages": [rare, *messages[1:]]}) as made:
        yield made


def request(threshold: int) -> RoundRequest:
    bundle, _ = counting_program("words", len(VOCABULARY))
    tensors = (decode_bundle(bundle).results[0].ports[0].type,)
    return RoundRequest(
        key="",
        name="rare-words",
        purpose="to count words",
        collection="messages",
        bundle=bundle,
        work=LocalWork(batch_size=256, order="stored"),
        aggregations=(
            Aggregation(name="counts", tensors=tensors, encoding=Counted(maximum=10_000), lane="uint32"),
            Aggregation(name="devices", tensors=tensors, encoding=Counted(maximum=1), presence_of="counts"),
        ),
        weight_cap=1,
        broadcast=encode_tensors({"start": np.zeros(1, np.int32)}),
        extraction=Extraction(extractor="text.words/1", column="text", vocabularies=(VOCABULARY,)),
        threshold=threshold,
        publish=True,
    )


def coordinators_files(fleet: MemoryFleet) -> bytes:
    """Everything of the coordinator that is on its disk: the journal, what is in its write-ahead log, and the rest."""
    files = [path for path in fleet._folder.iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"journal.sqlite", "journal.sqlite-wal"}
    return b"".join(path.read_bytes() for path in files)


def heard(fleet: MemoryFleet, caplog: pytest.LogCaptureFixture) -> bytes:
    """Everything that anybody but the devices can read after the round: files, events, logs, retained blobs."""
    retained = [topic.encode() + content for topic, content in fleet._broker.retained().items()]
    told = json.dumps(fleet.events, default=str).encode()
    return b"".join([coordinators_files(fleet), told, caplog.text.encode(), *retained])


def traces(content: bytes) -> set[str]:
    """Return in which forms the count of the rare word, or the word that no plan lists, stands in `content`."""
    forms = {
        "word": UNLISTED.encode(),
        "float64": struct.pack("<d", TIMES),
        "int32": struct.pack("<i", TIMES),
        "text": str(TIMES).encode(),
    }
    return {name for name, form in forms.items() if form in content}


def counts(sums: RoundSums, name: str = "counts") -> dict[str, int]:
    entries = sums.sums[name][0]
    assert not entries[len(VOCABULARY) :].any()
    return {word: int(entries[index]) for index, word in enumerate(VOCABULARY)}


def test_after_the_threshold_it_appears_nowhere(fleet: MemoryFleet, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        sums = fleet.run(request(threshold=3))
    assert counts(sums) == {word: DEVICES * times for word, times in COMMON.items()} | {LISTED: 0}
    assert counts(sums, "devices") == dict.fromkeys(COMMON, DEVICES) | {LISTED: 0}
    assert traces(heard(fleet, caplog)) == set()
    assert published(fleet) == counts(sums)


def test_without_one_it_is_found_in_the_same_places(fleet: MemoryFleet, caplog: pytest.LogCaptureFixture) -> None:
    """What the test above looks for can be found; and a word that no plan lists has not left the device even so."""
    with caplog.at_level(logging.DEBUG):
        sums = fleet.run(request(threshold=0))
    assert counts(sums)[LISTED] == TIMES
    assert {"float64", "int32"} <= traces(heard(fleet, caplog))
    assert "word" not in traces(heard(fleet, caplog))


def published(fleet: MemoryFleet) -> dict[str, int]:
    """What every device has been given: all the same."""
    tables = [device_table(fleet.device(name).home.path) for name in fleet.devices]
    assert all(table == tables[0] for table in tables)
    return tables[0]


def device_table(home: Path) -> dict[str, int]:
    from edge_agent.published import PUBLISHED_FOLDER, read_published

    (found,) = read_published(home / PUBLISHED_FOLDER)
    assert found.plan.name == "rare-words"
    return {word: int(found.sums["counts"][index]) for index, word in enumerate(VOCABULARY)}
