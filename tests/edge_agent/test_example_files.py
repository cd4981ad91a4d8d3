"""Files of examples: three formats, one meaning; all or nothing; errors that name the place."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_agent.example_files import measure, rows_of
from edge_agent.examples import ExampleStore
from sottovoce.errors import BadExamples, ConfigError
from sottovoce.types import TensorType

NOW_S = 1_800_000_000.0


def put(store: ExampleStore, folder: Path, name: str, content: str | dict, collection="c") -> int:
    """Write a file of the given name and import it."""
    file = folder / name
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    else:
        np.savez(file, **content)
    return store.import_file(collection, file, now_s=NOW_S)


def same(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array)


WANTED = {
    "x": np.array([[0.5, 1.0, -2.0], [4.0, 5.5, 6.0]], np.float32),
    "y": np.array([3, 0], np.int32),
    "stamp": np.array([1, 2**40], np.int64),
}


class TestFormats:
    def test_npz(self, store: ExampleStore, tmp_path: Path) -> None:
        arrays = {name: array.astype(np.float64) if name == "x" else array for name, array in WANTED.items()}
        assert put(store, tmp_path, "a.npz", arrays) == 2
        same(store.read("c"), WANTED)

    def test_csv_with_columns_of_a_vector_in_any_order(self, store: ExampleStore, tmp_path: Path) -> None:
        text = "x[2],y,x[0],stamp,x[1]\n-2,3,0.5,1,1\n6.0,0,4,1099511627776,5.5\n"
        assert put(store, tmp_path, "a.csv", text) == 2
        same(store.read("c"), WANTED)

    def test_csv_with_lists_a_byte_order_mark_and_blank_lines(self, store: ExampleStore, tmp_path: Path) -> None:
        text = '\ufeffx,y,stamp\r\n"[0.5, 1, -2]",3,1\r\n\r\n"[4, 5.5, 6]",0,1099511627776\r\n'
        assert put(store, tmp_path, "a.csv", text) == 2
        same(store.read("c"), WANTED)

    def test_jsonl_with_keys_in_any_order(self, store: ExampleStore, tmp_path: Path) -> None:
        text = '{"x": [0.5, 1, -2], "y": 3, "stamp": 1}\n\n{"stamp": 1099511627776, "y": false, "x": [4, 5.5, 6]}'
        assert put(store, tmp_path, "a.JSONL", text) == 2
        same(store.read("c"), WANTED)

    @settings(max_examples=20)
    @given(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
            elements={"allow_nan": False, "allow_infinity": False},
        ),
        st.data(),
    )
    def test_a_round_trip_through_every_format_is_exact(self, tmp_path_factory, x, data) -> None:
        y = data.draw(hnp.arrays(np.int64, len(x), elements=st.integers(-(2**63), 2**63 - 1)))
        folder = tmp_path_factory.mktemp("formats")
        x.flat[0] = 0.5  # With whole numbers only, text would rightly become int32.
        np.savez(folder / "a.npz", x=x, y=y)
        with (folder / "a.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["x", "y"])
            writer.writerows((json.dumps(row.tolist()), label) for row, label in zip(x, y, strict=True))
        lines = [json.dumps({"x": row.tolist(), "y": int(label)}) for row, label in zip(x, y, strict=True)]
        (folder / "a.jsonl").write_text("\n".join(lines))
        fits = y.size and y.min() >= -(2**31) and y.max() < 2**31
        wanted = {"x": x, "y": y.astype(np.int32 if fits else np.int64)}
        with ExampleStore(folder / "examples.sqlite") as store:
            for suffix in ("npz", "csv", "jsonl"):
                assert store.import_file(suffix, folder / f"a.{suffix}", now_s=NOW_S) == len(x)
                same(store.read(suffix), wanted)


class TestTypes:
    @pytest.mark.parametrize(
        ("array", "dtype"),
        [
            (np.array([0, 255], np.uint8), np.int32),
            (np.array([-(2**31), 2**31 - 1]), np.int32),
            (np.array([2**31]), np.int64),
            (np.array([2**63 - 1], np.uint64), np.int64),
            (np.array([True, False]), np.int32),
            (np.array([0.1], np.float64), np.float32),
            (np.array([0.1], np.float16), np.float32),
        ],
    )
    def test_whole_numbers_and_real_ones(self, store: ExampleStore, array, dtype) -> None:
        store.add("c", {"x": array}, now_s=NOW_S)
        assert store.read("c")["x"].dtype == dtype
        np.testing.assert_allclose(store.read("c")["x"], array.astype(dtype))
        assert store.columns("c") == {"x": TensorType(np.dtype(dtype).name)}

    def test_a_late_row_can_decide_the_type_of_the_whole_file(self, store: ExampleStore, tmp_path: Path) -> None:
        put(store, tmp_path, "a.csv", "x,y\n1,1\n2,2\n0.5,3000000000\n")
        same(store.read("c"), {"x": np.array([1, 2, 0.5], np.float32), "y": np.array([1, 2, 3_000_000_000])})

    def test_a_second_file_takes_the_collections_types(self, store: ExampleStore, tmp_path: Path) -> None:
        put(store, tmp_path, "a.csv", "x,y\n0.5,3000000000\n")
        assert put(store, tmp_path, "b.csv", "y,x\n7,2\n") == 1
        same(store.read("c"), {"x": np.array([0.5, 2], np.float32), "y": np.array([3_000_000_000, 7])})

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("x,y\n1,2\n0.5,2\n", "line 3, column 'x': float32 does not fit the int32 of collection 'c'"),
            ("x,y\n1,2\n1,3000000000\n", "line 3, column 'y': int64 does not fit the int32"),
            ("x,y\n[1],2\n", r"line 2, column 'x': int32\[1\] does not fit the int32"),
            ("x,z\n1,2\n", "it has columns x, z, and collection 'c' has x, y"),
            ("x\n1\n", "it has columns x, and collection 'c' has x, y"),
        ],
    )
    def test_a_second_file_that_does_not_fit_is_refused(self, store, tmp_path, text: str, place: str) -> None:
        put(store, tmp_path, "a.csv", "x,y\n1,2\n")
        with pytest.raises(BadExamples, match=rf"b\.csv: {place}.*nothing was imported"):
            put(store, tmp_path, "b.csv", text)
        assert store.count("c") == 1


class TestText:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl", '{"text": "Ciao, come va?", "at": 7}\n{"at": 0.5, "text": ""}\n'),
            ("a.csv", 'at,text\n7,"Ciao, come va?"\n0.5,\n'),
        ],
    )
    def test_messages_beside_numbers(self, store: ExampleStore, tmp_path: Path, name: str, content: str) -> None:
        assert put(store, tmp_path, name, content) == 2
        kept = store.read("c")
        assert list(kept["text"]) == ["Ciao, come va?", ""]
        assert kept["at"].dtype == np.float32
        assert list(kept["at"]) == [7.0, 0.5]
        assert {column: str(kind) for column, kind in store.columns("c").items()} == {"text": "str", "at": "float32"}

    def test_a_line_of_digits_stays_what_was_written(self, store: ExampleStore, tmp_path: Path) -> None:
        put(store, tmp_path, "a.csv", "text\nhello\n042\n")
        assert list(store.read("c", newest=1)["text"]) == ["042"]

    def test_messages_survive_reopening_and_are_appended(self, tmp_path: Path) -> None:
        for text in ("eins", "zwei"):
            with ExampleStore(tmp_path / "again.sqlite") as store:
                store.append("c", [("message 1", {"text": text})], now_s=1.0)
        with ExampleStore(tmp_path / "again.sqlite") as store:
            assert list(store.read("c")["text"]) == ["eins", "zwei"]

    def test_numbers_do_not_become_text_later(self, store: ExampleStore, tmp_path: Path) -> None:
        put(store, tmp_path, "a.csv", "x\n1\n")
        with pytest.raises(BadExamples, match="line 2, column 'x': str does not fit the int32 of collection 'c'"):
            put(store, tmp_path, "b.csv", "x\nwalking\n")


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "", "line 1: the header must name every column"),
            ("a.csv", "x,y\n", "there is no example"),
            ("a.csv", "x,x\n1,2\n", "each name once"),
            ("a.csv", "x,\n1,2\n", "each name once"),
            ("a.csv", "x[0],x[2]\n1,2\n", r"x\[\.\.\.\] must be x\[0\], x\[1\]"),
            ("a.csv", "x,x[0]\n1,2\n", "no plain x"),
            ("a.csv", "x,y\n1,2\n3\n", "line 3: 1 cells, and the header has 2 columns"),
            ("a.csv", "x,y\n1,2\n3,\n", "line 3, column 'y': empty"),
            ("a.csv", "x,y\n1,2\n1,walking\n", "line 3, column 'y': 'walking', not a number; write numbers"),
            ("a.csv", "x[0],x[1]\n1,walking\n", r"line 2, column 'x\[1\]': 'walking', not a number"),
            ("a.csv", "x\n" + "a" * 10_001, "line 2, column 'x': a text of 10001 characters; at most 10000"),
            ("a.csv", "x\nnan\n", "line 2, column 'x': nan is NaN"),
            ("a.csv", "x\n1\n-inf\n", "line 3, column 'x': -inf is NaN, infinite"),
            ("a.csv", "x\n1e39\n", "too large"),
            ("a.csv", "x\n9223372036854775808\n", "too large"),
            ("a.csv", "x\n100000000000000000000000000\n", "too large"),
            ("a.csv", 'x\n"[1, 2"\n', "line 2, column 'x': not a JSON list"),
            ("a.csv", 'x\n"1\n', "line 2: unexpected end of data"),
            ("a.csv", 'x,y\n"[1, 2]",1\n"[1, 2, 3]",1\n', r"line 3, column 'x': shape \[3\], but \[2\] before"),
            ("a.jsonl", '{"x": 1}\n{"x": }\n', "line 2: not JSON"),
            ("a.jsonl", "[1, 2]\n", "line 1: not an object"),
            ("a.jsonl", "{}\n", "line 1: not an object"),
            ("a.jsonl", '{"x": 1}\n{"y": 1}\n', "line 2: column x, y is not in every example"),
            ("a.jsonl", '{"x": 1}\n{"x": "walking"}\n', "line 2, column 'x': text, but numbers before; one column"),
            ("a.jsonl", '{"x": "a"}\n{"x": 1}\n', "line 2, column 'x': a number, but text before; one column"),
            ("a.jsonl", '{"x": "\\ud800"}\n', "line 1, column 'x': .* is not Unicode text"),
            ("a.jsonl", '{"x": ["a", "b"]}\n', "line 1, column 'x': .* is neither a number nor text"),
            ("a.jsonl", '{"x": null}\n', "line 1, column 'x': None is neither a number nor text"),
            ("a.jsonl", '{"x": {"a": 1}}\n', "is neither a number nor text"),
            ("a.jsonl", '{"x": [[1, 2], [3]]}\n', "line 1, column 'x': the lists have different lengths"),
            ("a.jsonl", '{"x": []}\n', "line 1, column 'x': the list is empty"),
            ("a.jsonl", '{"x": NaN}\n', "NaN"),
            ("a.jsonl", '{"": 1}\n', "line 1: a column has no name"),
            ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
            ("a.jsonl", "", "there is no example"),
        ],
    )
    def test_a_bad_text_file(self, store, tmp_path: Path, name: str, text: str, message: str) -> None:
        with pytest.raises(BadExamples, match=rf"{name}: .*{message}.*nothing was imported"):
            put(store, tmp_path, name, text)
        assert store.collections() == {}

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, "different numbers of examples: x 3, y 2"),
            ({"x": np.float32(1)}, "one entry per example"),
            ({}, "one entry per example"),
            ({"x": np.zeros((0, 4))}, "there is no example"),
            ({"x": np.array([1.0, np.nan])}, "row 1, column 'x': .*NaN"),
            ({"x": np.array(["a", "b" * 10_001])}, "row 1, column 'x': a text of 10001 characters"),
            ({"x": np.array([1j])}, "neither a number nor text"),
            ({"x": np.array([{}], dtype=object)}, "not a readable .npz of plain numbers"),
        ],
    )
    def test_a_bad_npz(self, store: ExampleStore, tmp_path: Path, arrays, message: str) -> None:
        with pytest.raises(BadExamples, match=rf"a\.npz: .*{message}.*nothing was imported"):
            put(store, tmp_path, "a.npz", arrays)
        assert store.collections() == {}

    def test_bytes_that_are_no_such_file(self, store: ExampleStore, tmp_path: Path) -> None:
        for name in ("a.npz", "a.csv", "a.jsonl"):
            (tmp_path / name).write_bytes(b"\xff\xfe\x00garbage" * 50)
            with pytest.raises(BadExamples, match=name):
                store.import_file("c", tmp_path / name, now_s=NOW_S)

    def test_a_truncated_npz(self, store: ExampleStore, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "a.npz", x=np.arange(1000.0))
        whole = (tmp_path / "a.npz").read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 5):
            (tmp_path / "a.npz").write_bytes(whole[:length])
            with pytest.raises(BadExamples, match="not a readable"):
                store.import_file("c", tmp_path / "a.npz", now_s=NOW_S)

    def test_a_damaged_npz_is_refused_or_read_never_a_crash(self, store: ExampleStore, tmp_path: Path) -> None:
        file = tmp_path / "a.npz"
        np.savez_compressed(file, x=np.arange(20.0))
        whole = file.read_bytes()
        refused = 0
        for index in range(0, len(whole), 3):
            for bit in (1, 0x80):
                file.write_bytes(whole[:index] + bytes([whole[index] ^ bit]) + whole[index + 1 :])
                try:
                    columns = measure(rows_of(file)())
                except BadExamples:
                    refused += 1
                else:
                    assert [column.shape for column in columns.values()] == [()]
        assert refused > len(whole) / 3

    def test_a_bare_array_says_how_to_save_it(self, store: ExampleStore, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.arange(3))
        (tmp_path / "a.npy").rename(tmp_path / "a.npz")
        with pytest.raises(BadExamples, match=r"np\.savez"):
            store.import_file("c", tmp_path / "a.npz", now_s=NOW_S)

    def test_other_names(self, store: ExampleStore, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"must end in \.npz, \.csv, \.jsonl"):
            put(store, tmp_path, "a.txt", "x\n1\n")
        with pytest.raises(ConfigError, match="there is no file"):
            store.import_file("c", tmp_path / "no.csv", now_s=NOW_S)
        with pytest.raises(ConfigError, match="the collection 'my steps'"):
            put(store, tmp_path, "a.csv", "x\n1\n", collection="my steps")

    def test_an_import_is_all_or_nothing(self, store: ExampleStore, tmp_path: Path) -> None:
        put(store, tmp_path, "a.csv", "x\n1\n2\n")
        with pytest.raises(BadExamples):
            put(store, tmp_path, "b.csv", "x\n3\n4\nfive\n")
        np.testing.assert_array_equal(store.read("c")["x"], [1, 2])

    def test_a_file_that_changes_between_the_two_readings(self, store: ExampleStore) -> None:
        readings = iter([[("line 2", {"x": 1})], [("line 2", {"x": 1}), ("line 3", {"x": [1, 2]})]])
        with pytest.raises(BadExamples, match="line 3: the file changed"):
            store._append("c", lambda: iter(next(readings)), NOW_S)
        assert store.collections() == {}
