"""The plan's own checks of what is extracted, bounded, thresholded and published: each refused with what to change."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sottovoce.blobs import blob_ref, canonical
from sottovoce.errors import ConfigError
from sottovoce.plan import (
    MAX_VOCABULARY,
    Aggregation,
    Counted,
    Extraction,
    LocalWork,
    ParticipationTerms,
    Plan,
    PrivacyTerms,
    Quantised,
    check_plan,
    decode_plan,
)
from sottovoce.sketches import WordSketch

COUNTS = Aggregation(name="counts", tensors=("int32[64]",), encoding=Counted(maximum=9), entries=8)
DEVICES = Aggregation(name="devices", tensors=("int32[64]",), encoding=Counted(maximum=1), presence_of="counts")
WORDS = Extraction(extractor="text.words/1", column="text", vocabularies=(("a", "b"),))
SKETCH = WordSketch(seed=bytes(16), rows=2, width=32, words=4)


def plan(*aggregations: Aggregation, extraction: Extraction | None = WORDS, work: Any = None, **terms: Any) -> Plan:
    privacy = {"purpose": "to count words", "minimum_cohort": 3, "weight_cap": 100, "threshold": 3} | terms
    return Plan(
        fleet="choir",
        name="words",
        collection="messages",
        program=blob_ref(b"program"),
        work=work or LocalWork(),
        aggregations=aggregations or (COUNTS, DEVICES),
        privacy=PrivacyTerms(**privacy),
        extraction=extraction,
        publish=True,
    )


def changed(aggregation: Aggregation, **changes: Any) -> Aggregation:
    return msgspec.structs.replace(aggregation, **changes)


def extracting(**changes: Any) -> Plan:
    return plan(extraction=msgspec.structs.replace(WORDS, **changes))


SUMS = changed(COUNTS, name="sums", encoding=Quantised(half_range=1.0, bits=16), entries=0, follows="counts")


@pytest.mark.parametrize(
    "allowed",
    [
        plan(),
        plan(COUNTS, DEVICES, SUMS),
        plan(changed(COUNTS, encoding=Counted(maximum=1))),
        plan(COUNTS, threshold=0),
        plan(participation=ParticipationTerms(once=True)),
        plan(participation=ParticipationTerms(every_days=0.5)),
        plan(work=LocalWork(max_examples=10, order="stored")),
        extracting(extractor="text.haiku/7", vocabularies=(("x", "a"),)),
        extracting(vocabularies=(("a", "così", "don't", "я"),)),
        plan(extraction=Extraction(extractor="text.word_sketch/1", column="text", sketch=SKETCH)),
    ],
)
def test_what_is_possible_survives_being_sent(allowed: Plan) -> None:
    assert decode_plan(canonical(allowed)) == allowed


@pytest.mark.parametrize(
    ("impossible", "text"),
    [
        (plan(changed(COUNTS, entries=65), DEVICES), r"'counts': entries must be 0 \(no limit\) to 64"),
        (plan(changed(COUNTS, entries=-1), DEVICES), "entries must be"),
        (plan(changed(DEVICES, presence_of="other")), "presence_of must name one aggregation of the program's own"),
        (plan(COUNTS, DEVICES, changed(DEVICES, name="d", presence_of="devices")), "not 'devices'"),
        (plan(COUNTS, changed(DEVICES, tensors=("int32[63]",))), "use its shapes, and no entries"),
        (plan(COUNTS, changed(DEVICES, entries=3)), "use its shapes, and no entries"),
        (plan(COUNTS, changed(DEVICES, encoding=Counted(maximum=2))), r"encoding must be Counted\(maximum=1\)"),
        (plan(changed(SUMS, name="counts", follows=""), DEVICES), "and 'counts' counted too"),
        (plan(COUNTS, DEVICES, changed(DEVICES, name="again")), "the same presence_of"),
        (plan(COUNTS, DEVICES, changed(SUMS, follows="devices")), "follows must name one aggregation"),
        (plan(COUNTS), "a threshold of 3 needs to know how many devices"),
        (plan(threshold=-1), "a threshold of -1"),
        (plan(participation=ParticipationTerms(once=True, every_days=1)), "not both"),
        (plan(participation=ParticipationTerms(every_days=-1)), "every_days from 0"),
        (plan(participation=ParticipationTerms(every_days=float("nan"))), "every_days from 0"),
        (plan(participation=ParticipationTerms(every_days=1e300)), "every_days from 0"),
        (plan(work=LocalWork(max_examples=10)), 'set order = "stored"'),
        (extracting(column=""), "printable names"),
        (extracting(vocabularies=()), "needs 1 vocabularies, for word"),
        (extracting(extractor="text.bigrams/1"), "needs 2 vocabularies, for first, second"),
        (extracting(sketch=SKETCH), "and no sketch"),
        (extracting(vocabularies=((),)), "1 to 50000 words, not 0"),
        (extracting(vocabularies=(tuple(map(str, range(MAX_VOCABULARY + 1))),)), "not 50001"),
        (extracting(vocabularies=(("b", "a"),)), "'a' stands after 'b'; sort the vocabulary"),
        (extracting(vocabularies=(("a", "a"),)), "each word once"),
        (extracting(vocabularies=(("a", "two words"),)), "'two words' is not one word"),
        (extracting(vocabularies=(("Hello", "a"),)), "'Hello' is not one word as messages are read"),
        (extracting(vocabularies=(("a", "c3po"),)), "'c3po' is not one word"),
        (extracting(extractor="text.word_sketch/1"), "needs a sketch, and no vocabularies"),
        (
            plan(extraction=Extraction(extractor="text.word_sketch/1", column="text", sketch=WordSketch(
                seed=b"short", rows=2, width=32, words=4))),
            "a seed of 16 bytes",
        ),
    ],
)  # fmt: skip
def test_what_is_not_is_refused_with_what_to_change(impossible: Plan, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_plan(impossible)
