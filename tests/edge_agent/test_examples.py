"""The example store: reading what was put in, numbers that are never given twice, and forgetting."""

from pathlib import Path

import numpy as np
import pytest

from edge_agent.examples import ExampleStore
from sottovoce.errors import BadExamples

NOW_S = 1_800_000_000.0


class TestReading:
    def test_nothing_says_how_to_import(self, store: ExampleStore) -> None:
        with pytest.raises(BadExamples, match="edge-agent import steps FILE"):
            store.read("steps")
        assert store.count("steps") == 0
        assert store.columns("steps") == {}

    def test_collections_are_apart_and_counted(self, store: ExampleStore, tmp_path: Path) -> None:
        store.add("b", {"x": np.arange(3)}, now_s=NOW_S)
        store.add("a", {"y": np.arange(2.0)}, now_s=NOW_S)
        store.add("b", {"x": np.arange(4)}, now_s=NOW_S)
        with ExampleStore(tmp_path / "examples.sqlite") as again:
            assert again.collections() == {"a": 2, "b": 7}
            assert list(again.collections()) == ["a", "b"]
            np.testing.assert_array_equal(again.read("b")["x"], [0, 1, 2, 0, 1, 2, 3])

    def test_the_newest_ones_alone_oldest_first(self, store: ExampleStore) -> None:
        for start in (0, 3):
            store.add("c", {"x": np.arange(start, start + 3, dtype=np.float32)}, now_s=NOW_S)
        for newest, wanted in ((1, [5]), (4, [2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5]), (99, [0, 1, 2, 3, 4, 5])):
            assert store.read("c", newest=newest)["x"].tolist() == wanted

    def test_numbers_are_never_given_twice(self, store: ExampleStore) -> None:
        assert store.span("c") == (1, 0)
        store.add("c", {"x": np.zeros(3)}, now_s=NOW_S)
        store.add("d", {"x": np.zeros(2)}, now_s=NOW_S)
        store.add("c", {"x": np.zeros(1)}, now_s=NOW_S)
        assert (store.span("c"), store.span("c", newest=2), store.span("d")) == ((1, 6), (3, 6), (4, 5))
        store.forget("c")
        store.add("c", {"x": np.zeros(1)}, now_s=NOW_S)
        assert store.span("c") == (7, 7)

    def test_arrays_are_the_callers_own(self, store: ExampleStore) -> None:
        store.add("c", {"x": np.arange(3.0), "y": np.arange(3)}, now_s=NOW_S)
        first = store.read("c")
        first["x"][:] = 9
        assert first["x"].flags.c_contiguous
        np.testing.assert_array_equal(store.read("c")["x"], [0, 1, 2])

    def test_another_process_reads_while_one_imports(self, store: ExampleStore, tmp_path: Path) -> None:
        store.add("c", {"x": np.arange(3)}, now_s=NOW_S)
        with ExampleStore(tmp_path / "examples.sqlite") as reader:
            counts = []

            def rows():
                yield "row 0", {"x": 1}
                counts.append(reader.count("c"))

            store._append("c", rows, NOW_S)
            assert counts[-1] == 3
            assert reader.count("c") == 4


class TestForgetting:
    def test_by_age_then_by_count(self, store: ExampleStore) -> None:
        for age in range(5):
            store.add("c", {"x": np.array([age, age])}, now_s=NOW_S - 100 * (4 - age))
        store.add("other", {"x": np.arange(9)}, now_s=0.0)
        assert store.retain("c", max_age_s=300, now_s=NOW_S) == 2
        np.testing.assert_array_equal(store.read("c")["x"], [1, 1, 2, 2, 3, 3, 4, 4])
        assert store.retain("c", max_count=3, now_s=NOW_S) == 5
        np.testing.assert_array_equal(store.read("c")["x"], [3, 4, 4])
        assert store.retain("c", max_age_s=50, max_count=2, now_s=NOW_S) == 1
        assert store.retain("c", now_s=NOW_S) == 0
        assert store.collections() == {"c": 2, "other": 9}

    def test_of_everything_leaves_an_empty_collection(self, store: ExampleStore) -> None:
        store.add("c", {"x": np.arange(3)}, now_s=NOW_S - 100)
        assert store.retain("c", max_age_s=1, now_s=NOW_S) == 3
        with pytest.raises(BadExamples, match="is empty"):
            store.read("c")
        store.add("c", {"x": np.arange(2)}, now_s=NOW_S)
        assert store.count("c") == 2

    def test_of_what_is_not_there_does_nothing(self, store: ExampleStore) -> None:
        assert store.retain("c", max_count=1, now_s=NOW_S) == 0
        assert store.forget("c") == 0

    def test_a_forgotten_collection_may_come_back_with_other_columns(self, store: ExampleStore) -> None:
        store.add("c", {"x": np.arange(3)}, now_s=NOW_S)
        assert store.forget("c") == 3
        store.add("c", {"z": np.arange(2.0)}, now_s=NOW_S)
        assert store.read("c").keys() == {"z"}

    @pytest.mark.parametrize("how", ["forget", "retain"])
    def test_overwrites_what_was_there(self, store: ExampleStore, tmp_path: Path, how: str) -> None:
        secret = np.arange(7_000_001, 7_000_200).astype(np.float32)
        store.add("keep", {"x": np.zeros((40, 50))}, now_s=NOW_S)
        store.add("c", {"x": secret[None]}, now_s=NOW_S - 100)
        planted = secret[:20].tobytes()

        def on_disk() -> bool:
            return any(planted in file.read_bytes() for file in tmp_path.glob("examples.sqlite*"))

        assert on_disk()
        assert (store.forget("c") if how == "forget" else store.retain("c", max_age_s=1, now_s=NOW_S)) == 1
        assert not on_disk()
        assert store.count("keep") == 40


def test_is_private(store: ExampleStore, tmp_path: Path) -> None:
    store.add("c", {"x": np.arange(3)}, now_s=NOW_S)
    for file in tmp_path.glob("examples.sqlite*"):
        assert file.stat().st_mode & 0o077 == 0, file
