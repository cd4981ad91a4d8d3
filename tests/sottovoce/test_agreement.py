"""A plan, its broadcast and its client program fit together, or the text says where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sottovoce.agreement import check_aggregations, check_broadcast, check_extraction
from sottovoce.blobs import blob_ref
from sottovoce.bundle import Bundle, Port, read_bundle
from sottovoce.errors import BadBundle, ProgramError
from sottovoce.plan import Aggregation, Counted, Extraction, LocalWork, Plan, PrivacyTerms, Quantised
from sottovoce.sketches import WordSketch
from sottovoce.tensors import decode_tensors

BUNDLES = Path(__file__).resolve().parents[2] / "simulation" / "bundles"
MEAN = Quantised(half_range=1.0, bits=16)


@pytest.fixture(scope="module")
def digits() -> Bundle:
    return read_bundle(BUNDLES / "digits.svp")[0]


def plan_with(*aggregations: Aggregation) -> Plan:
    return Plan(
        fleet="choir",
        name="digits",
        collection="digits",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=aggregations,
        privacy=PrivacyTerms(purpose="to test", minimum_cohort=3, weight_cap=10),
    )


def delta_of(bundle: Bundle, **changed: Any) -> Aggregation:
    tensors = tuple(port.type for port in bundle.results[0].ports)
    return Aggregation(**{"name": "delta", "tensors": tensors, "encoding": MEAN, **changed})


def test_results_metrics_and_what_the_device_counts_itself_can_be_summed(digits: Bundle) -> None:
    correct = Aggregation(name="correct", tensors=("float32[1]",), encoding=Counted(maximum=100))
    devices = Aggregation(name="devices", tensors=("float32[1]",), encoding=Counted(maximum=1), presence_of="correct")
    check_aggregations(plan_with(delta_of(digits), correct, devices), digits)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"name": "update"}, r"plan 'digits' sums 'update' .*program 'digits' computes no such thing"),
        ({"tensors": ("float32[2]",)}, r"sums 'delta' of float32\[2\]; program 'digits' computes float32\[64,"),
    ],
)
def test_what_a_program_does_not_compute_is_not_summed(digits: Bundle, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(BadBundle, match=says):
        check_aggregations(plan_with(delta_of(digits, **changed)), digits)


def test_a_broadcast_has_every_port_and_no_more(digits: Bundle) -> None:
    good = decode_tensors(digits.initial)
    check_broadcast(digits, good)
    rate = np.array([0.1], np.float32)
    wrong: dict[str, Any] = {
        r"the broadcast of program 'digits': 'learning_rate' is missing; it is a float32\[1\]": {
            name: value for name, value in good.items() if name != "learning_rate"
        },
        r"'learning_rate' is a float32\[1\], not a float64\[1\]": {**good, "learning_rate": rate.astype(np.float64)},
        r"'learning_rate' is a float32\[1\], not a float32\[2\]": {**good, "learning_rate": np.tile(rate, 2)},
        r"program 'digits' takes no 'momentum' in its broadcast": {**good, "momentum": rate},
    }
    for says, broadcast in wrong.items():
        with pytest.raises(ProgramError, match=says):
            check_broadcast(digits, broadcast)


WORDS = Extraction(extractor="text.words/1", column="text", vocabularies=(("maybe", "no", "yes"),))
SKETCH = WordSketch(seed=bytes(16), rows=1, width=8, words=4)


@pytest.mark.parametrize(
    ("ports", "extraction", "says"),
    [
        ((Port(name="word", type="int32[?]", low=0, high=2),), WORDS, ""),
        ((Port(name="word", type="int32[?]", low=0, high=1),), WORDS, r"'word' up to 1; .* has 3 words.* at most 2"),
        ((Port(name="token", type="int32[?]"),), WORDS, r"reads 'token', int32\[\?\]; text.words/1 gives word, one"),
        ((Port(name="word", type="int32[?,2]"),), WORDS, r"reads 'word', int32\[\?,2\]; text.words/1 gives word, one"),
        (
            (Port(name="first", type="int32[?]"), Port(name="word", type="int32[?]")),
            Extraction(extractor="text.word_sketch/1", column="text", sketch=SKETCH),
            r"reads 'first', int32\[\?\]; text.word_sketch/1 gives word",
        ),
        (
            (Port(name="amount", type="int32[?]"), Port(name="index", type="int32[?]")),
            Extraction(extractor="text.word_table/1", column="text", sketch=SKETCH),
            "",
        ),
        ((Port(name="token", type="int32[?]"),), Extraction(extractor="text.later/2", column="text"), ""),
    ],
)
def test_a_program_reads_what_is_extracted(
    digits: Bundle, ports: tuple[Port, ...], extraction: Extraction, says: str
) -> None:
    program = msgspec.structs.replace(digits, batch=ports)
    if not says:
        check_extraction(program, extraction)
        return
    with pytest.raises(BadBundle, match=says):
        check_extraction(program, extraction)
