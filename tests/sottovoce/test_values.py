"""Values of typed things: converted once where nothing is lost, refused with a cure elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sottovoce.errors import ConfigError, TypeMismatch
from sottovoce.types import type_of
from sottovoce.values import Record, flatten, leaves, to_value, unflatten


def value(notation: str, x: object) -> Any:
    return to_value(type_of(notation), x, what="the argument x")


def refusal(notation: str, x: object) -> str:
    with pytest.raises(TypeMismatch) as refused:
        value(notation, x)
    assert str(refused.value.expected) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("notation", "given", "expected"),
    [
        ("int32", 7, np.int32(7)),
        ("int32", np.int64(-7), np.int32(-7)),
        ("float32", 3, np.float32(3)),
        ("float32", 0.1, np.float32(0.1)),
        ("float32", float("inf"), np.float32(np.inf)),
        ("bool", True, np.bool_(True)),
        ("bool", np.bool_(False), np.bool_(False)),
        ("uint8[2]", [0, 255], np.array([0, 255], np.uint8)),
        ("float32[?,2]", [[1, 2], [3, 4]], np.array([[1, 2], [3, 4]], np.float32)),
        ("int32[0]", [], np.empty(0, np.int32)),
        ("uint64", 2**64 - 1, np.uint64(2**64 - 1)),
    ],
)
def test_a_tensor_has_the_declared_dtype(notation: str, given: object, expected: Any) -> None:
    result = value(notation, given)
    assert result.dtype == expected.dtype
    assert np.ndim(result) == np.ndim(expected)
    assert np.array_equal(result, expected)


def test_a_float_where_an_int_is_declared() -> None:
    assert refusal("int32", 21.5) == (
        "the argument x does not fit its type\n"
        "    expected: int32\n"
        "    found:    the float 21.5\n"
        "A float is not turned into an int32 by itself: give int(...) or round(...), or declare float32."
    )
    assert "found:    float64[2]" in refusal("int32[2]", np.zeros(2))


@pytest.mark.parametrize(
    ("notation", "given", "cure"),
    [
        ("int32", 2**31, "An int32 holds -2147483648 to 2147483647: declare a wider type, such as int64."),
        ("uint8", -1, "An uint8 holds 0 to 255"),
        ("int32", 2**80, "Give a number"),
        ("int32", True, "A truth value is not a number by itself"),
        ("float32", True, "A truth value is not a number by itself"),
        ("bool", 1, "A number is not a truth value by itself"),
        ("float32", 2**24 + 1, "A float32 cannot hold it exactly"),
        ("float32", 1e39, "It is too large for a float32"),
        ("float32", "21", "Give a number"),
        ("float32", None, "Give a number"),
        ("float32", [1.0], "Give one number, not an array of them."),
        ("float32[2]", [1.0, 2.0, 3.0], "Give it the shape [2]."),
        ("float32[2,2]", [[1.0], [2.0, 3.0]], "Give every row the same number of values."),
        ("str", 3, "Give text in quotes."),
        ("str[?]", [["a"], ["b", "c"]], "Give every row the same number of texts."),
        ("<int32,int32>", 3, "Give a dict by the names of the elements, or a tuple by their order."),
        ("<int32,int32>", (1, 2, 3), "Give 2 elements"),
        ("<int32,int32>", {"a": 1, "b": 2}, "elements without a name are given by position, in a tuple"),
        ("int32*", 3, "Give a list, one value of type int32 for each element."),
        ("int32*", "123", "Give a list"),
        ("{float32}@CLIENTS", 21.5, "Give a list, one value of type float32 for each client."),
        ("{float32}@CLIENTS", np.float32(21.5), "Give a list, one value of type float32 for each client."),
        ("(int32 -> int32)", 3, "A function cannot be an argument here"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(notation: str, given: object, cure: str) -> None:
    assert cure in refusal(notation, given)


def test_struct_fields_that_are_missing_or_unknown_are_named() -> None:
    text = refusal("<a=int32,b=int32>", {"a": 1, "c": 2})
    assert "Give exactly the declared elements (missing: b; unknown: c)." in text


def test_the_element_that_is_wrong_is_named() -> None:
    assert refusal("<a=int32,b=<c=int32>>", {"a": 1, "b": (2.5,)}).startswith(
        "element c of element b of the argument x does not fit its type"
    )
    assert "client 1 of the argument x " in refusal("{int32}@CLIENTS", [1, 2.5])
    assert "element 1 of the argument x " in refusal("float32[2]*", [[1, 2], [1, 2, 3]])


def test_structs_come_out_as_records_and_tuples() -> None:
    point = namedtuple("Point", "y x")(2.5, 1)
    for given in ({"y": 2.5, "x": 1}, (1, 2.5), [1, 2.5], point, Record({"x": 1, "y": 2.5})):
        assert value("<x=int32,y=float32>", given) == Record({"x": np.int32(1), "y": np.float32(2.5)})
    assert value("<int32,float32>", (1, 2)) == (np.int32(1), np.float32(2))
    assert value("<>", ()) == ()


def test_sequences_are_lists_of_elements() -> None:
    assert value("int32*", np.array([1, 2], np.int64)) == [1, 2]
    assert value("int32*", iter([3])) == [3]
    assert value("int32*", []) == []
    assert [v.dtype for v in value("float32*", [1, 2.5])] == [np.float32, np.float32]
    assert [row.tolist() for row in value("float32[2]*", np.eye(2))] == [[1.0, 0.0], [0.0, 1.0]]
    assert [len(row) for row in value("float32[?]*", [[1, 2], [3]])] == [2, 1]
    rows = [{"x": [1, 2], "y": 0}, {"x": [3, 4], "y": 1}]
    columns = {"x": np.array([[1, 2], [3, 4]]), "y": [0, 1]}
    assert value("<x=float32[2],y=int32>*", rows) == value("<x=float32[2],y=int32>*", columns)
    assert "columns of [1, 2] values" in refusal("<x=int32,y=int32>*", {"x": [1], "y": [1, 2]})


def test_placed_values() -> None:
    assert value("{float32}@CLIENTS", [1, 2.5]) == (np.float32(1), np.float32(2.5))
    assert value("{int32*}@CLIENTS", [[1], [2, 3]]) == ([1], [2, 3])
    assert value("float32@CLIENTS", 1) == value("float32@SERVER", 1) == np.float32(1)
    assert value("str", "Küche") == "Küche"


def test_a_record_is_reached_by_name_attribute_and_position() -> None:
    record = Record({"a": 1.0, "b": 2})
    assert (record.a, record["a"], record[0], record[-1], len(record)) == (1.0, 1.0, 1.0, 2, 2)
    assert repr(record) == "<a=1.0,b=2>"
    a, b = record
    assert (a, b) == (1.0, 2)
    assert dict(record) == {**record} == {"a": 1.0, "b": 2}
    assert list(record.keys()) == ["a", "b"]
    assert "a" in record
    assert "c" not in record
    assert record.get("c", 5) == 5
    assert record == {"a": 1.0, "b": 2}
    assert record != {"b": 2, "a": 1.0}
    assert Record({"a": np.arange(3)}) == Record({"a": np.arange(3)})
    assert Record({"a": np.arange(3)}) != Record({"a": np.zeros(3)})
    assert repr(Record([(None, 1), ("b", 2)])) == "<1,b=2>"


def test_a_record_does_not_change() -> None:
    record = Record({"a": 1})
    with pytest.raises(AttributeError, match="a record does not change"):
        record.a = 2
    with pytest.raises(AttributeError, match="no element 'b'"):
        _ = record.b
    with pytest.raises(KeyError, match="not among a"):
        _ = record["b"]
    with pytest.raises(TypeError):
        hash(record)
    assert copy.deepcopy(record) == pickle.loads(pickle.dumps(record)) == record  # noqa: S301 - our own bytes


NESTED = type_of("<a=float32,b=<int32[2],c=bool>>")


def test_leaves_and_flattening() -> None:
    assert [(path, str(t)) for path, t in leaves(NESTED)] == [("a", "float32"), ("b.0", "int32[2]"), ("b.c", "bool")]
    assert leaves(type_of("int32@SERVER")) == (("", type_of("int32")),)
    marks = object(), object(), object()
    nested = unflatten(NESTED, marks)
    assert nested.b.c is marks[2]
    assert flatten(NESTED, nested) == list(marks)
    assert flatten(NESTED, {"b": (marks[1], marks[2]), "a": marks[0]}) == list(marks)
    with pytest.raises(ConfigError, match="has 3 tensors, not 2"):
        unflatten(NESTED, marks[:2])
    with pytest.raises(ConfigError, match="reduce a sequence first"):
        leaves(type_of("<int32*>"))
    with pytest.raises(TypeMismatch, match="missing: b"):
        flatten(NESTED, {"a": 1})


def test_of_many_values_the_one_that_does_not_fit_is_named() -> None:
    assert refusal("{float32}@CLIENTS", [1.0, 2.0, [3.0, 4.0]]).startswith("client 2 of the argument x does not fit")
    assert refusal("{float32}@CLIENTS", [True, False]) == (
        "client 0 of the argument x does not fit its type\n"
        "    expected: float32\n"
        "    found:    the bool True\n"
        "A truth value is not a number by itself: give float32(...) of it, or declare bool."
    )
    assert refusal("int32*", np.zeros(3)).startswith("element 0 of the argument x does not fit")


def test_a_set_loses_equal_values_so_it_is_no_list_of_them() -> None:
    assert refusal("{float32}@CLIENTS", {20.0, 21.0}).endswith(
        "found:    a set\nA set has no order and holds equal values once: give a list."
    )


_TYPES = ["int32", "str", "float32[2]", "<a=int32,b=float32>", "<int32,float32>", "float32*", "<a=int32>*"]
_TYPES += [
    "{float32}@CLIENTS",
    "{<a=int32,b=bool>}@CLIENTS",
    "{float32*}@CLIENTS",
    "uint64",
    "str*",
    "(int32 -> int32)",
]
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
_ANYTHING = st.recursive(
    _SCALARS | st.complex_numbers() | st.dates() | st.decimals(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c", 1]), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.sampled_from(_TYPES), _ANYTHING)
def test_anything_is_a_value_or_a_type_mismatch(notation: str, anything: object) -> None:
    try:
        once = value(notation, anything)
    except TypeMismatch:
        return
    assert repr(value(notation, once)) == repr(once)
