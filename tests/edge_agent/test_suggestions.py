"""Suggestions: the fleet's table and the owner's own words, mixed by the documented formula."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.examples import ExampleStore
from edge_agent.published import MOST_PLANS, Published, keep_published, read_published
from edge_agent.suggestions import PRIOR, last_word, newest_table, own_pairs, suggest
from sottovoce.blobs import blob_ref, canonical
from sottovoce.errors import ConfigError
from sottovoce.plan import Aggregation, Counted, Extraction, LocalWork, Plan, PrivacyTerms
from sottovoce.tensors import encode_tensors

FIRST, SECOND = ("come", "il"), ("sole", "stai", "va")
PAIRS = Extraction(extractor="text.bigrams/1", column="text", vocabularies=(FIRST, SECOND))


def plan(name: str = "next-word", **changes: Any) -> Plan:
    made = Plan(
        fleet="choir",
        name=name,
        collection="messages",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=(
            Aggregation(name="devices", tensors=("int32[8]",), encoding=Counted(maximum=1), presence_of="counts"),
            Aggregation(name="counts", tensors=("int32[8]",), encoding=Counted(maximum=9)),
        ),
        privacy=PrivacyTerms(purpose="to suggest", minimum_cohort=3, weight_cap=10),
        extraction=PAIRS,
        publish=True,
    )
    return msgspec.structs.replace(made, **changes)


def published(*counts: int, name: str = "next-word", round_: int = 3, **changes: Any) -> Published:
    table = np.array([*counts, 0, 0], np.int32)
    sums = {"devices": np.minimum(table, 1), "counts": table}
    return Published(plan(name, **changes), round_, sums)


FLEET = published(0, 10, 30, 7, 0, 0)  # come stai 10, come va 30, il sole 7


def shares(word: str, own: Counter[tuple[str, ...]], limit: int = 9) -> dict[str, float]:
    return {each.word: each.share for each in suggest(FLEET, word, own, limit=limit)}


def test_after_a_word_that_was_never_written_here_the_fleet_answers() -> None:
    assert shares("come", Counter()) == {"va": 0.75, "stai": 0.25}
    assert shares("il", Counter()) == {"sole": 1.0}


def test_what_the_owner_writes_weighs_as_the_formula_says() -> None:
    own = Counter({("come", "mai"): 3, ("come", "stai"): 2, ("altro", "va"): 100})
    assert shares("come", own) == pytest.approx(
        {"va": PRIOR * 0.75 / (5 + PRIOR), "stai": (2 + PRIOR * 0.25) / (5 + PRIOR), "mai": 3 / (5 + PRIOR)}
    )
    assert list(shares("come", own)) == ["va", "stai", "mai"]
    habit = Counter({("come", "mai"): 300})
    assert next(iter(shares("come", habit))) == "mai"
    assert sum(shares("come", own).values()) == pytest.approx(1.0)


def test_where_the_fleet_knows_nothing_the_owners_words_answer_alone() -> None:
    assert shares("buona", Counter({("buona", "notte"): 1})) == {"notte": 1.0}
    assert shares("buona", Counter()) == {}


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        ((5, -5, 0), {"sole": 1.0}),  # Together they are nothing: no share can be computed of that.
        ((-1, -2, -3), {}),
        ((math.nan, math.inf, -math.inf), {}),
        ((2**53, 1e308, 3), {"va": 1.0}),
        ((0.4, 2.0, 2.0), {"stai": 0.5, "va": 0.5}),
    ],
)
def test_wild_values_in_a_published_table_are_no_counts(counts: tuple[float, ...], kept: dict[str, float]) -> None:
    table = np.array([*counts, *counts], np.float64)
    wild = Published(plan(), 3, {"devices": np.zeros(8, np.int32), "counts": table})
    assert {each.word: each.share for each in suggest(wild, "come", Counter(), limit=9)} == kept
    own = suggest(wild, "come", Counter({("come", "mai"): 2}), limit=9)
    assert sum(each.share for each in own) == pytest.approx(1.0)
    assert {each.word for each in own} == {*kept, "mai"}


def test_equal_ones_come_by_the_alphabet_and_only_so_many() -> None:
    own = Counter({("x", "b"): 1, ("x", "a"): 1, ("x", "c"): 2})
    assert list(shares("x", own)) == ["c", "a", "b"]
    assert list(shares("x", own, limit=2)) == ["c", "a"]


def test_the_word_is_read_as_messages_are() -> None:
    assert last_word("Ciao, COME!") == "come"
    with pytest.raises(ConfigError, match="there is no word in '42'"):
        last_word("42")


class TestNewestTable:
    def test_is_the_newest_or_the_one_that_is_named(self) -> None:
        newer, other = published(*range(6), round_=9), published(*range(6), name="other", round_=1)
        assert newest_table([newer, FLEET, other]) is newer
        assert newest_table([newer, other], "other") is other
        with pytest.raises(ConfigError, match=r"plan 'third' .*there is one of next-word, other"):
            newest_table([newer, other], "third")

    @pytest.mark.parametrize(
        "no_table",
        [
            published(*range(6), extraction=None),
            published(*range(6), extraction=msgspec.structs.replace(PAIRS, extractor="text.words/1")),
            published(1, 2),
            published(*range(6), aggregations=plan().aggregations[:1]),
        ],
    )
    def test_is_none_of_what_holds_no_pairs(self, no_table: Published) -> None:
        with pytest.raises(ConfigError, match="no table of pairs of words yet"):
            newest_table([no_table])


def test_own_pairs_come_from_the_collection_that_the_plan_reads(tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "examples.sqlite") as store:
        assert own_pairs(store, FLEET) == Counter()
        store.add("messages", {"text": np.array(["Come va? come va", "il mare"], object)}, now_s=1.0)
        assert own_pairs(store, FLEET) == Counter({("come", "va"): 2, ("il", "mare"): 1})


class TestKept:
    def test_the_last_sums_of_every_plan_name(self, tmp_path: Path) -> None:
        for round_, each in ((1, FLEET), (2, FLEET), (3, published(1, 1, 1, 1, 1, 1, name="a/../b"))):
            keep_published(tmp_path / "p", canonical(each.plan), encode_tensors(each.sums), round=round_)
        found = read_published(tmp_path / "p")
        assert [(each.plan.name, each.round) for each in found] == [("a/../b", 3), ("next-word", 2)]
        assert found[1].plan == FLEET.plan
        np.testing.assert_array_equal(found[1].sums["counts"], FLEET.sums["counts"])
        assert len(list(tmp_path.iterdir())) == 1

    def test_more_names_than_a_device_can_use_push_the_oldest_out(self, tmp_path: Path) -> None:
        for number in range(MOST_PLANS + 2):
            each = published(*range(6), name=f"plan {number}", round_=number)
            keep_published(tmp_path, canonical(each.plan), encode_tensors(each.sums), round=number)
        assert [each.round for each in read_published(tmp_path)] == list(range(MOST_PLANS + 1, 1, -1))

    def test_a_damaged_file_is_left_out(self, tmp_path: Path) -> None:
        keep_published(tmp_path, canonical(FLEET.plan), encode_tensors(FLEET.sums), round=1)
        (path,) = tmp_path.iterdir()
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        assert read_published(tmp_path) == []
        assert read_published(tmp_path / "missing") == []
