"""The owner's policy: every rule refuses, with its name, exactly what it is there for."""

import msgspec
import pytest

from edge_agent.policy import Policy, check_participation, check_plan, client_terms
from sottovoce.blobs import blob_ref
from sottovoce.errors import ConfigError, PolicyRefusal
from sottovoce.plan import (
    Aggregation,
    Counted,
    Extraction,
    LocalWork,
    ParticipationTerms,
    Plan,
    PrivacyTerms,
    Quantised,
)
from sottovoce.sketches import WordSketch

NOW_S = 1_800_000_000.0


def plan(name="digits", collection="digits", aggregations=None, extraction=None, publish=False, **terms) -> Plan:
    privacy = {"purpose": "read handwriting", "minimum_cohort": 12, "weight_cap": 100} | terms
    return Plan(
        fleet="clinic",
        name=name,
        collection=collection,
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=aggregations or (update(1.0),),
        privacy=PrivacyTerms(**privacy),
        extraction=extraction,
        publish=publish,
    )


def discovering(extractor: str) -> Plan:
    table = {"heavy": bytes([128, 0]), "cells": 6} if extractor == "text.word_table/1" else {}
    sketch = WordSketch(seed=bytes(16), rows=1, width=16, words=9, **table)
    return plan(extraction=Extraction(extractor=extractor, column="text", sketch=sketch))


def words(*vocabularies: tuple[str, ...], extractor: str = "text.words/1") -> Plan:
    return plan(extraction=Extraction(extractor=extractor, column="text", vocabularies=vocabularies))


def update(clip: float | None) -> Aggregation:
    return Aggregation(
        name="delta",
        tensors=("float32[3]",),
        encoding=Quantised(half_range=1.0, bits=16),
        weighted=True,
        clip_norm=clip,
    )


COUNT = Aggregation(name="correct", tensors=("float32[1]",), encoding=Counted(maximum=9), lane="uint64")
COUNTS = Aggregation(name="counts", tensors=("int32[64]",), encoding=Counted(maximum=9), entries=8)
ALL_COUNTS = Aggregation(name="counts", tensors=("int32[64]",), encoding=Counted(maximum=9))
DEVICES = Aggregation(name="devices", tensors=("int32[64]",), encoding=Counted(maximum=1), presence_of="counts")
LEADING = Aggregation(name="leading", tensors=("float32[64]",), encoding=Quantised(half_range=1.0, bits=16))
FOLLOWING = Aggregation(name="counts", tensors=("int32[64]",), encoding=Counted(maximum=9), follows="leading")
FRACTIONS = Aggregation(name="fractions", tensors=("float32[64]",), encoding=Quantised(half_range=9.5, bits=16))
HELD = Aggregation(name="held", tensors=("int32[64]",), encoding=Counted(maximum=1), entries=4)
PAIR = Extraction(extractor="text.words/1", column="text", vocabularies=(("a", "b"),))


def test_the_default_policy_allows_an_ordinary_plan() -> None:
    check_plan(Policy(), plan(), NOW_S)


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        (Policy(collections=("digits", "steps")), plan()),
        (Policy(plans=("digits",)), plan()),
        (Policy(refused_plans=("other",)), plan()),
        (Policy(minimum_cohort=12), plan(minimum_cohort=12)),
        (Policy(minimum_cohort=3, minimum_honest_survivors=2), plan(minimum_cohort=3)),
        (Policy(max_weight=100), plan(weight_cap=100)),
        (Policy(max_clip_norm=1.0), plan(aggregations=(update(1.0), COUNT))),
        (Policy(), plan(aggregations=(update(None),))),
        (Policy(), plan(expires_unix_s=int(NOW_S))),
        (Policy(max_entries=8, max_count=9), plan(aggregations=(COUNTS, DEVICES, update(1.0)))),
        (Policy(), plan(aggregations=(ALL_COUNTS,))),
        (Policy(), words(("a", "b"))),
        (Policy(max_entries=12), plan(aggregations=(COUNTS, DEVICES, HELD))),
        (Policy(max_entries=64, max_count=9), plan(aggregations=(LEADING, FOLLOWING))),
        (Policy(max_entries=64), plan(aggregations=(FRACTIONS,), extraction=PAIR)),
        (Policy(max_entries=8, max_count=1), plan(aggregations=(LEADING,))),
        (Policy(), plan(aggregations=(COUNTS, DEVICES, HELD), publish=True, threshold=3)),
        (Policy(minimum_threshold=0), plan(aggregations=(COUNTS,), publish=True)),
        (Policy(), plan(aggregations=(COUNTS, DEVICES), threshold=0)),
        (Policy(discovery=True), discovering("text.word_sketch/1")),
        (Policy(discovery=True), discovering("text.word_table/1")),
        (Policy(minimum_vocabulary=1), words(("a",))),
        (Policy(minimum_vocabulary=3), words(("a", "b", "c"), ("x", "y", "z"), extractor="text.bigrams/1")),
    ],
)
def test_allows_at_the_limit(policy: Policy, allowed: Plan) -> None:
    check_plan(policy, allowed, NOW_S)


@pytest.mark.parametrize(
    ("rule", "policy", "refused", "text"),
    [
        ("paused", Policy(paused=True), plan(), "policy.paused = false"),
        ("collections", Policy(collections=("steps",)), plan(), "'digits'"),
        ("collections", Policy(collections=()), plan(), "'digits'"),
        ("plans", Policy(plans=("steps",)), plan(), "'digits'"),
        ("refused_plans", Policy(plans=("digits",), refused_plans=("digits",)), plan(), "'digits'"),
        ("purpose", Policy(), plan(purpose=""), "what it is for"),
        ("purpose", Policy(), plan(purpose=" \n"), "what it is for"),
        ("expired", Policy(), plan(expires_unix_s=int(NOW_S) - 60), "expired 60 s ago"),
        ("minimum_cohort", Policy(), plan(minimum_cohort=9), "sums of 9 devices; this device asks for at least 10"),
        ("minimum_cohort", Policy(minimum_cohort=3), plan(minimum_cohort=2), "at least 3"),
        ("noise", Policy(), plan(noise_multiplier=0.5), "0.5"),
        ("noise", Policy(), plan(noise_multiplier=float("nan")), "nan"),
        ("max_weight", Policy(max_weight=99), plan(), "up to 100 examples of a device; this one allows 99"),
        ("max_clip_norm", Policy(max_clip_norm=0.5), plan(), "clipped to 1; this device asks for 0.5"),
        ("max_clip_norm", Policy(max_clip_norm=0.5), plan(aggregations=(update(None),)), "is not clipped"),
        ("max_entries", Policy(max_entries=7), plan(aggregations=(COUNTS,)), "'counts' takes up to 8 .* allows 7"),
        ("max_entries", Policy(max_entries=63), plan(aggregations=(ALL_COUNTS,)), "up to 64 entries of a device"),
        ("max_count", Policy(max_count=8), plan(aggregations=(COUNTS,)), "counts up to 9; this device allows 8"),
        (
            "max_entries",
            Policy(max_entries=11),
            plan(aggregations=(COUNTS, DEVICES, HELD)),
            "'counts', 'held' together take up to 12 entries of a device; this one allows 11",
        ),
        ("max_entries", Policy(max_entries=63), plan(aggregations=(LEADING, FOLLOWING)), "'counts' takes up to 64"),
        ("max_entries", Policy(max_entries=63), plan(aggregations=(FRACTIONS,), extraction=PAIR), "takes up to 64"),
        ("max_count", Policy(max_count=9), plan(aggregations=(FRACTIONS,), extraction=PAIR), "counts up to 9.5; this"),
        (
            "minimum_threshold",
            Policy(),
            plan(aggregations=(COUNTS, DEVICES), publish=True, threshold=2),
            "publishes what 2 devices have contributed; this device asks for at least 3",
        ),
        ("minimum_threshold", Policy(), plan(aggregations=(COUNTS, DEVICES), publish=True), "what 1 devices have"),
        (
            "minimum_threshold",
            Policy(),
            plan(aggregations=(COUNTS, HELD), publish=True, threshold=3),
            "'counts' without counting devices in its entries, so its threshold of 3 takes nothing out",
        ),
        ("minimum_threshold", Policy(), plan(aggregations=(HELD, LEADING), publish=True, threshold=9), "'leading' wit"),
        ("discovery", Policy(), discovering("text.word_sketch/1"), "policy.discovery = true to allow that"),
        ("discovery", Policy(), discovering("text.word_table/1"), r"does not list \(text.word_table/1\)"),
        ("extractor", Policy(), words(("a", "b"), extractor="text.haiku/7"), "'text.haiku/7'; this device has text.wo"),
        ("minimum_vocabulary", Policy(), words(("a",)), "of one word: a test whether that one word is said"),
        ("minimum_vocabulary", Policy(), words(("a", "b"), ("x",), extractor="text.bigrams/1"), "at least 2"),
        ("minimum_vocabulary", Policy(minimum_vocabulary=3), words(("a", "b")), "of 2 words; this device asks for at"),
    ],
)
def test_refuses_with_the_rule_and_the_numbers(rule: str, policy: Policy, refused: Plan, text: str) -> None:
    with pytest.raises(PolicyRefusal, match=text) as refusal:
        check_plan(policy, refused, NOW_S)
    assert refusal.value.rule == rule


def test_the_floor_holds_even_against_a_policy_that_was_never_checked() -> None:
    broken = Policy()
    object.__setattr__(broken, "minimum_cohort", 1)
    with pytest.raises(PolicyRefusal, match="at least 3"):
        check_plan(broken, plan(minimum_cohort=2), NOW_S)


def test_a_policy_itself_refuses_the_impossible() -> None:
    for wrong in (
        {"minimum_cohort": 2},
        {"minimum_honest_survivors": 1},
        {"modes": ()},
        {"threads": 0},
        {"minimum_vocabulary": 0},
    ):
        with pytest.raises(ConfigError, match=f"policy.{next(iter(wrong))}"):
            Policy(**wrong)


DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("terms", "round_", "days", "text"),
    [
        (ParticipationTerms(), 5, 0.0, None),
        (ParticipationTerms(once=True), 5, 4000.0, "asks once, and was answered in round 4"),
        (ParticipationTerms(every_days=7), 5, 6.99, "every 7 days, .* round 4; it is too early until 2027-01-22 08:00"),
        (ParticipationTerms(every_days=7), 5, 7.0, None),
        (ParticipationTerms(every_days=7), 5, -1.0, "too early"),
        # Another attempt of the round that was answered.
        (ParticipationTerms(once=True), 4, 0.0, None),
        (ParticipationTerms(every_days=7), 4, 0.0, None),
    ],
)
def test_a_plan_that_asks_seldom_is_answered_seldom(terms, round_: int, days: float, text: str | None) -> None:
    def check() -> None:
        check_participation(plan(participation=terms), round=round_, last=(4, NOW_S), now_s=NOW_S + days * DAY_S)

    if text is None:
        check()
        return
    with pytest.raises(PolicyRefusal, match=text) as refusal:
        check()
    assert refusal.value.rule == "participation"


def test_the_first_answer_is_never_too_early() -> None:
    check_participation(plan(participation=ParticipationTerms(once=True)), round=1, last=None, now_s=NOW_S)


def test_the_session_gets_the_owners_terms() -> None:
    terms = client_terms(
        Policy(minimum_cohort=7, minimum_honest_survivors=4, modes=("curious", "active"), minimum_corrupt_share_bp=1000)
    )
    assert (terms.minimum_cohort, terms.minimum_honest_survivors) == (7, 4)
    assert terms.modes == ("curious", "active")
    assert terms.minimum_corrupt_share_bp == 1000


def test_no_limit_loosens_when_a_plan_is_sent_and_parsed_again() -> None:
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(plan(minimum_cohort=9)), type=Plan)
    with pytest.raises(PolicyRefusal):
        check_plan(Policy(), sent, NOW_S)
